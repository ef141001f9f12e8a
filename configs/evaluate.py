"""Any models, any judge, one report (3.6, 4.1).

  python -m instruct_jax.main --config=configs/evaluate.py --workdir=DIR \
    --config.models='sft=RUN/select/model,ppo_ptx=RUN/ppo_ptx/policy' \
    --config.prompts=RUN/data/prompts_test.jsonl \
    --config.tokenizer=RUN/data/tokenizer

A model is a folder of ours, a folder in the Hugging Face format, `hf:NAME`, or
a file of recorded answers (`samples.py`; FILE.jsonl#NAME if it has several
models). The judge is the miniature's gold utility; `:reward`, `:people` and
`:http` choose others, and --config.judge=package.module.f any Python function
of the texts (`judge_fns.py`):

  reward  --config.judge_model=FOLDER
  people  --config.rankings=FILE.jsonl, see `judges.People`
  http    --config.endpoint.url=URL/chat/completions
          --config.endpoint.model=NAME, with the key in the environment,
          JUDGE_API_KEY by default

Output: report.md, report.html and plots, model_card.md, summary.json,
samples.jsonl, judgements.jsonl, ratings.jsonl.
"""

from ml_collections.config_dict import placeholder

from configs import common

JUDGES = {
  'gold': 'instruct_jax.worlds.miniature.Gold',
  'reward': 'instruct_jax.judge_fns.RewardModel',
  'people': 'instruct_jax.evals.judges.People',
  'http': 'instruct_jax.evals.chat_judge.ChatJudge',
}


def stage(seed, workdir):
  """Models, judge and measurements of a report."""
  config = common.stage('evaluate', 'evaluate', seed, workdir)
  common.models(config)
  # Who answers: NAME=FOLDER or NAME=FILE.jsonl, comma-separated. Tables and
  # plots keep this order; `other_models` are only in the table of all models.
  config.models = ''
  config.other_models = ''
  config.baseline = 'sft'  # Of `models`; the paper's is the 175B SFT model.
  config.pairs = ''  # Other pairs to compare: NAME=NAME,... or 'all'.
  config.tokenizer = ''  # For models without their own.
  config.prompts = ''  # JSONL of held-out prompts.
  config.num_prompts = 1000  # At most; drawn by seed.
  config.samples_per_prompt = 1  # Intervals redraw prompts, not samples.
  # Tokens; longer prompts are left out and counted. None: as in the run whose
  # folder has the models or, failing that, the prompts.
  config.prompt_length = placeholder(int)
  config.response_length = placeholder(int)
  config.temperature = 1.0  # Appendix F samples InstructGPT at 1.
  config.batch_size = 256  # Prompts sampled at a time.
  config.cache = ''  # Folder of sampled answers; '' keeps them in the workdir.
  # Models that get a few-shot prefix: of those in a JSON file, the one whose
  # answers to other prompts have the highest reward-model score (3.5).
  config.prompted = ''  # NAME,NAME of `models`.
  config.prefixes = ''
  config.prefix_prompts = ''
  config.num_prefix_prompts = 64  # At most; drawn by seed.
  config.prefix_length = 48  # Tokens that a prefix may add.
  # The judge: dotted name of a class or function, and its own keys.
  config.judge = JUDGES['gold']
  config.other_judges = ''  # More judges, comma-separated; adds a table.
  # gold: seed of the judged world. None: that of the run whose folder has the
  # prompts.
  config.world_seed = placeholder(int)
  config.judge_model = ''  # reward: scalar folder.
  config.rankings = ''  # people: JSONL of comparisons.
  config.endpoint = common.endpoint('JUDGE_API_KEY')  # http.
  config.endpoint.model = ''
  config.endpoint.max_tokens = 512  # Of a reply, its reasoning included.
  # JSON object of other keys of a request; null drops one. For OpenAI's
  # reasoning models: {"temperature": null, "max_tokens": null,
  # "max_completion_tokens": 4096}.
  config.endpoint.body = ''
  config.endpoint.prompt_price = 0.0  # Per million tokens, any currency.
  config.endpoint.completion_price = 0.0
  config.rate_answers = True  # Likert and labels too, if the judge gives them.
  # Above this share of pairs whose verdict changes with the order of the
  # answers, the report calls the judge unreliable.
  config.max_contradictions = 0.2
  config.num_bootstrap = 2000
  # Other measurements; '' leaves one out.
  config.world = ''  # Dotted name of a `figures.World`: labels and tables.
  config.reward_model = ''  # Scalar folder: scores beside the judge's.
  # FILE or NAME=FILE,NAME=FILE of rankings: those that test the reward model
  # against labelers, and those it learned from, to fit simple baselines on. The
  # model card also reads statistics.json beside rankings of the labeling site.
  config.test_comparisons = ''
  config.comparisons = ''
  config.crossval = ''  # results.json of that stage.
  config.reference = ''  # The model to which KL and losses are relative.
  # FILE of held-out pretraining text (JSONL or plain text; 4.2); or
  # NAME=FILE,NAME=FILE, where 'pretraining' is that text, and other names are
  # other kinds of text.
  config.documents = ''
  config.row_length = 64  # Tokens of its rows.
  config.suite = ''  # suite.json of configs/nlp_suite.py.
  config.num_samples_shown = 12
  config.num_samples_in_html = 300  # Prompts that report.html can filter.
  return config


def get_config(argument: str = 'gold'):
  """The stage with one of `JUDGES`."""
  common.check(argument, JUDGES, 'judge')
  config = stage(0, '')
  config.judge = JUDGES[argument]
  return common.single(config, argument)
