"""Benchmarks whose answers a chat model judges.

  python -m instruct_jax.main --config=configs/chat_bench.py:alpaca_eval \
    --workdir=DIR --config.models='ppo=RUN/ppo/policy' \
    --config.questions=alpaca_eval.json \
    --config.baseline=gpt4=alpaca_eval_gpt4_baseline.json \
    --config.judge_layout=alpaca_eval_clf.txt --config.gamed=df_gamed.csv \
    --config.endpoint.url=URL/chat/completions --config.endpoint.model=NAME

`:mt_bench` grades single answers (or, with a baseline, compares pairs) and
needs `references`; `:arena_hard` compares with a baseline. Its version 2 has a
baseline for each category, so run one at a time, such as with
--config.categories=hard_prompt. All files are in upstream's formats
(`instruct_jax/evals/chat_benchmarks.py`), including answers and judgements
below DIR. The judge's key is in the environment, JUDGE_API_KEY by default; its
replies are kept, so none is paid for twice.

Output: chat_bench.md, chat_bench.json.
"""

from ml_collections.config_dict import placeholder

from configs import common

# Tokens of the judge's reply: one letter, a grade with reasons, a verdict.
MAX_TOKENS = {'alpaca_eval': 1, 'mt_bench': 2048, 'arena_hard': 4096}


def get_config(argument: str = 'alpaca_eval'):
  """The stage for one benchmark."""
  common.check(argument, MAX_TOKENS, 'benchmark')
  config = common.stage('chat_bench', 'chat_bench', 0, '')
  common.models(config)
  config.benchmark = argument
  # NAME=FOLDER, NAME=hf:NAME, or NAME=FILE of answers in upstream's form.
  config.models = ''
  config.tokenizer = ''  # For models without their own.
  config.questions = ''  # Upstream's file.
  config.categories = ''  # Comma-separated; '' asks all questions.
  config.num_questions = 0  # Use only the first N; 0 is all.
  config.baseline = ''  # NAME=FILE of answers in upstream's form.
  config.judge_layout = ''  # Upstream's file of the judge's prompt.
  config.references = ''  # mt_bench: FILE of reference answers.
  # alpaca_eval: df_gamed.csv, for the length-controlled win rate; '' omits it.
  config.gamed = ''
  # Tokens; longer questions, with their earlier turns, get an empty answer.
  config.prompt_length = 2048
  config.response_length = 1024
  # None: the authors' (for MT-Bench, by category); 0.7 for AlpacaEval.
  config.temperature = placeholder(float)
  config.batch_size = 32  # Questions sampled at a time.
  config.endpoint = common.endpoint('JUDGE_API_KEY')
  config.endpoint.model = ''
  config.endpoint.max_tokens = MAX_TOKENS[argument]  # Of a reply.
  config.endpoint.body = ''  # As in `evaluate.py`.
  config.num_bootstrap = 2000
  return common.single(config, argument)
