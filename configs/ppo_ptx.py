"""InstructGPT (Ouyang et al. 2022, arXiv 2203.02155), end to end.

  python -m instruct_jax.main --config=configs/ppo_ptx.py

The default runs the whole recipe on the embedded world; see README.md for time
and figures. Other variants, after a colon:

  smoke           the same in under 90 seconds, for CI; figures mean nothing
  e2e             real human rankings (--config.data.root=DIR)
  1p3b 6b 175b    the RL stage alone at the paper's sizes (C.4)
  gpt2            the RL stage alone for published models of GPT-2's size
                  (--config.init=hf:FOLDER --config.reward_model=FOLDER)

`--config.stages.ppo_ptx.ptx_coef=0` and the like change one stage.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, nlp_suite, pretrain, reward, sft


def ppo_stage(seed, workdir, name='ppo_ptx'):
  """PPO-ptx with the paper's numbers (C.4); 13.4 fills what it leaves open."""
  config = common.stage(name, 'ppo_ptx', seed, workdir)
  common.models(common.loop(common.adam(config)))
  config.tokenizer = ''
  config.init = ''  # RL initialisation: start, and KL reference.
  config.reward_model = ''  # Also the start of the value model.
  config.reward_weight = 1.0  # Of its score, where there are others.
  # Python functions of the texts by their dotted names, NAME or NAME=WEIGHT,
  # added to the reward model's score or in its place (`score_fns.py`).
  config.reward_fn = ''
  config.prompts = ''  # JSONL of prompts.
  config.documents = ''  # JSONL of pretraining text for the ptx part.
  # Held-out text for the alignment tax; '' measures none.
  config.valid_documents = ''
  config.prompt_length = 1024  # Tokens; longer ones are dropped (C).
  config.response_length = 1024  # Tokens; responses are capped (C).
  config.ptx_row_length = 2048  # Tokens; not printed, full context (13.4).
  config.cut_documents = True  # Where a row ends; or rows have room left.
  config.num_episodes = 256_000  # C.4.
  config.batch_size = 512  # Episodes of an iteration (C.4).
  config.num_minibatches = 8  # Of 64 (C.4).
  config.num_microbatches = 1  # Gradient accumulation in a minibatch.
  config.num_epochs = 1  # Inner epochs (C.4).
  config.temperature = 1.0  # Of rollouts, and of every log-probability (C.4).
  config.learning_rate = 2.55e-6  # Scanned 2.55e-6 to 2.55e-5 (E.9).
  config.value_learning_rate = 9e-6  # C.4; 5e-6 for 175B.
  config.num_warmup_iterations = 10  # From a tenth of the peak (C.4).
  config.adam_eps = 1e-5  # Not printed; Ziegler et al.'s code.
  config.kl_coef = 0.02  # beta (C.4).
  config.kl_target = placeholder(
    float
  )  # Nats a response; None keeps beta fixed (ZIE).
  config.kl_horizon = 10_000  # Episodes (ZIE).
  config.discount = 1.0  # C.4: no discount.
  config.gae_lambda = 0.95  # Not printed; Stiennon et al. B.1.
  config.clip = 0.2  # C.4.
  config.value_clip = 0.2  # Not printed; Ziegler et al.'s code.
  config.whiten_advantages = True  # Not printed; ZIE code, N+.
  config.missing_end_score = placeholder(
    float
  )  # Score without end-of-text, or None.
  # gamma (C.4); 0 is PPO. `ptx/gradient_norm`, gamma included, is logged beside
  # `ppo/policy/ppo_gradient_norm`; an alarm says when one drowns the other.
  config.ptx_coef = 27.8
  config.ptx_per_episode = 8  # Pretraining examples (C.4, E.11).
  config.ema_decay = 0.992  # C.4.
  config.ema_every = 'update'  # Or 'iteration'; not printed.
  config.remat = 'none'
  config.attention = 'auto'  # The platform's flash kernel; or 'xla', 'flash'.
  config.logprob_chunk = 0  # Columns of float32 logits at a time; 0 is all.
  config.pack = True  # Score and update dense rows, without padding.
  config.pack_episodes = 8  # Of a row, about.
  # Rows are at the most so many times longer than needed. They come in few
  # lengths, this far apart: score and update are compiled for each that is met.
  config.pack_spare = 1.1
  # Nats: the sampler's log-probabilities are the old ones where those of a
  # minibatch of rows all agree with the training graph's to this; else, and at
  # 0, the graph's are computed for all. In float32 they agree to 4e-5. In
  # bfloat16 they do not (SmolLM2-135M: 0.03 on average, 0.26 at most), so the
  # old ones are the graph's there.
  config.sampler_tolerance = 1e-3
  config.num_slices = 1  # Parts in which a batch is scored.
  # Responses sampled at a time, the next prompt taking the slot of one that has
  # ended; 0 samples a whole batch.
  config.num_slots = 0
  # Whether sampling puts the policy's weights together over `fsdp` once a
  # rollout, in the compute dtype; otherwise again for every token.
  config.gather_weights = True
  config.frozen_dtype = 'float32'  # Of reference and reward model's weights.
  # Weights that wait in host memory while no program reads them: 'ema' (in
  # rollouts and scoring), 'reference' and 'reward' (but in scoring).
  config.offload = ()
  config.eval_every = 10  # Iterations between held-out losses.
  config.eval_batch_size = 64  # Rows.
  config.checkpoint_every = 10  # Iterations.
  config.snapshot_every = 0  # Iterations between policies kept; 0 keeps none.
  config.probe_every = 0  # Iterations between public NLP tasks; 0 asks none.
  config.probes = ''  # TASK=FILE,TASK=FILE; names of configs/nlp_suite.py.
  config.probe_items = 200  # Of each task, the same every time; 0 asks all.
  config.probe_few_shot = False  # As in Figures 33 and 34, where it fits.
  config.probe_batch_size = 32  # Queries a call.
  return config


def paper(size: str):
  """C.4 at the paper's sizes; the models come as folders."""
  common.check_size(size)
  config = ppo_stage(0, '')
  # E.9 tried 2.55e-6 and 3.74e-6 for 175B and does not print the choices.
  config.learning_rate = {'1p3b': 9.0e-6, '6b': 9.0e-6, '175b': 2.55e-6}[size]
  config.value_learning_rate = {'1p3b': 9e-6, '6b': 9e-6, '175b': 5e-6}[size]
  config.remat = 'full'
  config.logprob_chunk = 128
  config.num_slices = 8  # The activations of 512 rows would fill the chips.
  config.num_slots = 64  # So would their cache.
  config.frozen_dtype = 'bfloat16'
  config.num_microbatches = {'1p3b': 1, '6b': 2, '175b': 8}[size]
  return common.single(config, size)


def gpt2():
  """A published policy; none of these numbers is the paper's.

  Policy and value model of 124 M parameters with Adam, reference, reward model
  and moving average: 6 GB in float32 before activations; one GPU or a v4-8.
  """
  config = ppo_stage(0, '')
  config.prompt_length = 384
  config.response_length = 128
  config.ptx_row_length = 512
  config.num_episodes = 32_768
  config.batch_size = 128
  config.num_minibatches = 4
  config.num_microbatches = 2
  config.learning_rate = 1e-5
  config.value_learning_rate = 2e-5
  # gamma does not carry over between scales. The rule: of the two gradients
  # that metrics.jsonl logs, pretraining's is a fifth to a half of PPO's, as it
  # is on the miniature, where a tenth of that no longer undoes the tax and ten
  # times that costs reward. SmolLM2-135M, minibatches of 32: PPO's norm is 2.4,
  # pretraining's 4.3 before gamma; at 27.8 it would be 49 times PPO's.
  config.ptx_coef = 0.3
  config.ptx_per_episode = 1
  config.remat = 'dots'
  return common.single(config, 'gpt2')


def tiny_model(width: int, num_layers: int, context: int, unroll: int):
  return ConfigDict(
    {
      'vocab_size': 0,  # The tokenizer's.
      'context_length': context,
      'num_layers': num_layers,
      'width': width,
      'num_heads': max(1, width // 32),
      'head_dim': 32,
      'mlp_dim': 4 * width,
      'dropout': 0.0,
      'compute_dtype': 'float32',
      'remat': 'none',
      'vocab_multiple': 64,
      'scan_unroll': unroll,
    }
  )


def pipeline(name: str):
  """All stages of the recipe, wired to each other; sizes come after."""
  config = common.root(name)
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data = workdir + '/data'
  stages = config.stages
  stages.pretrain = pretrain.stage(seed, workdir)
  stages.sft = sft.stage(seed, workdir)
  stages.rl_init = sft.init_stage(seed, workdir)
  stages.reward = reward.stage(seed, workdir)
  stages.select = select_stage(seed, workdir)
  stages.crossval = reward.crossval_stage(seed, workdir)
  stages.ppo = ppo_stage(seed, workdir, 'ppo')
  stages.ppo_ptx = ppo_stage(seed, workdir, 'ppo_ptx')
  # Asks nothing unless told of files: --config.stages.nlp_suite.data.drop=FILE.
  stages.nlp_suite = nlp_suite.stage(seed, workdir)
  stages.nlp_suite.may_be_empty = True
  stages.nlp_suite.models = (
    'pretrained=' + workdir + '/pretrain/model,sft=' + workdir
    + '/select/model,ppo=' + workdir + '/ppo/ema,ppo_ptx=' + workdir
    + '/ppo_ptx/ema'
  )  # fmt: skip
  stages.evaluate = evaluate_stage(seed, workdir)
  for each in stages.values():
    each.tokenizer = data + '/tokenizer'
    each.mesh = config.get_ref('mesh')
  for each in (stages.pretrain, stages.rl_init, stages.ppo, stages.ppo_ptx):
    each.documents = data + '/documents_train.jsonl'
    each.cut_documents = False  # The logged runs had whole ones.
  stages.pretrain.valid = data + '/documents_valid.jsonl'
  for each in (stages.sft, stages.rl_init):
    each.init = workdir + '/pretrain/model'
    each.demonstrations = data + '/demonstrations_train.jsonl'
    each.valid_demonstrations = data + '/demonstrations_valid.jsonl'
  for each in (stages.reward, stages.crossval):
    each.init = workdir + '/sft/model'
    each.demonstrations = data + '/demonstrations_train.jsonl'
  stages.select.sft = workdir + '/sft'
  stages.select.prompts = data + '/prompts_valid.jsonl'
  for each in (stages.ppo, stages.ppo_ptx):
    each.init = workdir + '/rl_init/model'
    each.prompts = data + '/ppo_prompts_train.jsonl'
    each.valid_documents = data + '/documents_valid.jsonl'
  for each in (stages.select, stages.ppo, stages.ppo_ptx, stages.evaluate):
    each.reward_model = workdir + '/reward/model'
  stages.ppo.ptx_coef = 0.0
  stages.evaluate.suite = workdir + '/nlp_suite/suite.json'
  return config


def show_rankings(stages):
  """Tells the evaluation which rankings the reward model learned from."""
  for key in ('comparisons', 'valid_comparisons'):
    stages.evaluate[key] = stages.reward.get_ref(key)


def select_stage(seed, workdir):
  config = common.stage('select', 'select_sft', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.sft = ''  # Folder of the SFT stage with all of its epochs.
  config.reward_model = ''
  config.prompts = ''  # Validation prompts.
  config.num_prompts = 256  # At the most, drawn by seed.
  config.prompt_length = 32
  config.response_length = 20
  config.temperature = 1.0
  config.batch_size = 128  # Prompts sampled at a time.
  return config


def compare_stage(seed, workdir):
  config = common.stage('compare', 'compare', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  # Whose answers are ranked, in which shares, and how they are sampled. The
  # paper takes most from supervised policies; GPT's are among them here so that
  # the reward model also sees what tuning has taught. SFT's likely answers are
  # easier to order; at 0.4 they hide its slips, and RL finds those unpunished.
  config.policies = ConfigDict(
    {
      'sft': {'model': '', 'share': 0.5, 'temperature': 0.7},
      'pretrained': {'model': '', 'share': 0.5, 'temperature': 1.0},
    }
  )
  config.prompts = ''
  config.valid_prompts = ''
  config.num_labelers = 40  # 3.4; a quarter of them held out.
  config.labeler_noise = 0.30  # As in the data stage.
  config.min_candidates = 4  # K (3.5).
  config.max_candidates = 9
  # Labelers ranking a training prompt. Most of the paper's prompts have one;
  # simulated labelers cost nothing, and the K forwards serve them all.
  config.rankers_per_prompt = 5
  config.rankers_per_valid = 3  # Labelers ranking a validation prompt.
  config.prompt_length = 32
  config.response_length = 20
  config.batch_size = 256
  return config


def miniature_data_stage(seed, workdir):
  config = common.stage('data', 'miniature_data', seed, workdir)
  config.num_labelers = 40
  config.labeler_noise = 0.30  # Utility; agreement on samples near 73 %.
  config.num_documents = 40_000  # Training and held-out together.
  config.num_valid_documents = 400
  config.num_prompts = 30_000  # Before hygiene.
  config.num_demonstrations = 8_000
  config.num_reward_prompts = 5_000
  config.train_fraction = 0.76  # Of the users; the rest is halved.
  config.prompt_length = 32  # Tokens; longer prompts are dropped.
  config.prompts_per_user = 200  # 3.2, A.2.
  config.duplicate_prefix_words = 12  # Not printed (A.2); a choice.
  return config


def evaluate_stage(seed, workdir):
  config = common.stage('evaluate', 'evaluate', seed, workdir)
  common.models(config)
  config.tokenizer = ''
  config.judge = 'gold'  # Or 'restaurant': human data, a second reward model.
  config.reward_model = ''
  config.suite = ''  # suite.json for the model card, where there is one.
  # What the reward model learned from. Beside rankings of the labeling site
  # lies statistics.json, which the model card reads.
  config.comparisons = ''
  config.valid_comparisons = ''
  config.judge_model = ''  # Scalar model folder; judge 'restaurant' only.
  config.num_prompts = 1000  # Held-out prompts at the most, drawn by seed.
  config.samples_per_prompt = 1  # Intervals redraw prompts, not samples.
  # Validation prompts that choose a prefix, at the most; drawn by seed.
  config.num_prefix_prompts = 64
  config.prompt_length = 32
  config.prefix_length = 48  # Tokens that a few-shot prefix may add.
  config.response_length = 20
  config.row_length = 64  # Tokens; rows of comparisons and held-out text.
  config.temperature = 1.0  # Appendix F samples InstructGPT at 1.
  config.batch_size = 256  # Prompts sampled at a time.
  config.max_candidates = 9
  # C.4 averages the weights; 'policy' takes the last ones. What is not chosen
  # here is in a table of its own.
  config.rl_weights = 'ema'
  config.num_samples_shown = 12
  config.num_samples_in_html = 300  # Prompts that report.html can filter.
  return config


def miniature(name: str = 'ppo_ptx_miniature'):
  """The default: half a million parameters, a world of its own, 2 cores."""
  config = pipeline(name)
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  stages = config.stages
  stages.data = miniature_data_stage(seed, workdir)
  stages.compare = compare_stage(seed, workdir)
  stages.compare.tokenizer = workdir + '/data/tokenizer'
  stages.compare.mesh = config.get_ref('mesh')
  stages.compare.policies.sft.model = workdir + '/sft/model'
  stages.compare.policies.pretrained.model = workdir + '/pretrain/model'
  stages.compare.prompts = workdir + '/data/reward_prompts_train.jsonl'
  stages.compare.valid_prompts = workdir + '/data/reward_prompts_valid.jsonl'
  for each in (stages.reward, stages.crossval):
    each.comparisons = workdir + '/compare/comparisons_train.jsonl'
    each.valid_comparisons = workdir + '/compare/comparisons_valid.jsonl'
  show_rankings(stages)
  config.stage_order = (
    'data',
    'pretrain',
    'sft',
    'rl_init',
    'compare',
    'reward',
    'select',
    'crossval',
    'ppo',
    'ppo_ptx',
    'nlp_suite',
    'evaluate',
  )

  # Learning rates grow as models shrink; none of these is the paper's.
  stages.pretrain.model = tiny_model(
    width=128, num_layers=2, context=96, unroll=2
  )
  stages.pretrain.row_length = 64
  # Copying a name from the prompt is learned late and by steps, not tokens:
  # small batches and two layers get there three times sooner than four layers
  # and twice the batch.
  stages.pretrain.batch_size = 16
  stages.pretrain.num_steps = 2000
  stages.pretrain.num_warmup = 50
  stages.pretrain.learning_rate = 4e-3
  stages.pretrain.eval_every = 500
  stages.pretrain.checkpoint_every = 500
  for each in (stages.sft, stages.rl_init):
    each.row_length = 64
    each.pack = True  # About 2.5 demonstrations to a row.
    each.batch_size = 16
    each.checkpoint_every = 100
  stages.sft.learning_rate = 1e-3
  stages.sft.num_epochs = 6  # The paper: 16, of 13k demonstrations.
  stages.rl_init.learning_rate = 1e-3
  stages.rl_init.num_epochs = 3  # The paper: 2.
  for each in (stages.reward, stages.crossval):
    each.row_length = 96
    each.batch_size = 4
    each.learning_rate = 7e-4
    each.eval_batch_size = 64
    each.checkpoint_every = 50
  stages.crossval.num_fold_seeds = 1  # The paper: 3 (reward.py:6b,folds).
  stages.crossval.max_comparisons = 2_000  # Of 400 prompts.
  stages.crossval.max_valid_comparisons = 1_200  # Of 400 others.
  for each in (stages.ppo, stages.ppo_ptx):
    each.prompt_length = 32
    each.response_length = 20
    each.ptx_row_length = 64
    each.num_episodes = 3_840
    each.batch_size = 128
    # The paper's 0.02 lets so small a policy drift 7 nats to where its reward
    # model errs; PPO then falls behind SFT (experiments/README.md).
    each.kl_coef = 0.06
    each.learning_rate = 2e-4
    each.value_learning_rate = 5e-4
    each.num_warmup_iterations = 4
    each.pack_spare = 1.25  # Compiling costs as much as a dozen iterations.
  stages.ppo_ptx.ptx_coef = 1.0  # gamma does not carry over between scales.
  stages.ppo_ptx.ptx_per_episode = 2
  return config


def smoke():
  """Every stage, as little of it as still runs."""
  config = miniature('ppo_ptx_smoke')
  # Compiling is nearly all of this run; unoptimised code compiles fastest.
  config.xla_flags = '--xla_backend_optimization_level=0'
  stages = config.stages
  stages.data.num_documents = 1_500
  stages.data.num_valid_documents = 50
  stages.data.num_prompts = 600
  stages.data.num_demonstrations = 64
  stages.data.num_reward_prompts = 48
  stages.pretrain.model = tiny_model(
    width=32, num_layers=2, context=96, unroll=1
  )
  stages.pretrain.num_steps = 40
  stages.pretrain.num_warmup = 5
  stages.pretrain.eval_every = 20
  stages.pretrain.checkpoint_every = 20
  stages.sft.num_epochs = 3
  stages.sft.batch_size = 8
  stages.sft.checkpoint_every = 10
  stages.rl_init.batch_size = 8
  stages.compare.batch_size = 64
  stages.select.num_prompts = 32
  stages.select.batch_size = 32
  stages.reward.checkpoint_every = 5
  stages.reward.batch_size = 8
  stages.crossval.batch_size = 8
  stages.crossval.num_folds = 2
  stages.crossval.max_comparisons = 200
  for each in (stages.ppo, stages.ppo_ptx):
    each.num_episodes = 96
    each.batch_size = 32
    each.eval_every = 2
    each.checkpoint_every = 1
  stages.evaluate.num_prompts = 48
  stages.evaluate.num_prefix_prompts = 8
  stages.evaluate.batch_size = 48
  return config


def e2e_data_stage(seed, workdir):
  config = common.stage('data', 'e2e_data', seed, workdir)
  config.root = ''  # Folder that holds e2e_nlg, e2e_rankings and books.
  config.vocab_size = 4_096  # Of a BPE trained on the text; 0 takes GPT-2's.
  # 'quality' asks whether a sentence says the facts well, and longer ones win;
  # for 'naturalness' shorter ones do. One reward cannot follow both.
  config.criteria = ('quality',)
  config.words_per_document = 100  # Books are cut into pieces of about that.
  config.valid_documents = 0.01  # Share of the pieces held out.
  config.prefix_length = 96  # Tokens that a few-shot prefix may add.
  return config


def e2e():
  """Human data: the same loops on restaurant sentences and crowd rankings."""
  config = pipeline('ppo_ptx_e2e')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data = workdir + '/data'
  stages = config.stages
  stages.data = e2e_data_stage(seed, workdir)
  # One value under two names: the short one is for the command line.
  config.data = ConfigDict({'root': ''})
  stages.data.root = config.data.get_ref('root')
  # The judge is a second reward model, on the other half of the workers.
  stages.judge = reward.stage(seed + 1, workdir, 'judge')
  stages.judge.tokenizer = data + '/tokenizer'
  stages.judge.mesh = config.get_ref('mesh')
  stages.judge.init = workdir + '/sft/model'
  stages.judge.demonstrations = data + '/demonstrations_train.jsonl'
  stages.judge.comparisons = data + '/judge_comparisons_train.jsonl'
  stages.judge.valid_comparisons = data + '/judge_comparisons_valid.jsonl'
  for each in (stages.reward, stages.crossval):
    each.comparisons = data + '/comparisons_train.jsonl'
    each.valid_comparisons = data + '/comparisons_valid.jsonl'
  show_rankings(stages)
  stages.evaluate.judge = 'restaurant'
  stages.evaluate.judge_model = workdir + '/judge/model'
  config.stage_order = (
    'data',
    'pretrain',
    'sft',
    'rl_init',
    'reward',
    'judge',
    'select',
    'crossval',
    'ppo',
    'ppo_ptx',
    'nlp_suite',
    'evaluate',
  )

  # Tokens. Facts have 43 at the most; 99.5 % of the sentences 52 or fewer, and
  # 99.5 % of facts, ranked sentence and end 98 or fewer.
  prompt_length, response_length, prefix_length = 44, 52, 96
  row_length = prompt_length + response_length
  context = prefix_length + row_length
  for each in (stages.select, stages.ppo, stages.ppo_ptx, stages.evaluate):
    each.prompt_length = prompt_length
    each.response_length = response_length
  stages.data.prefix_length = prefix_length
  stages.evaluate.prefix_length = prefix_length

  # Learning rates grow as models shrink; none of these is the paper's.
  stages.pretrain.model = tiny_model(
    width=192, num_layers=3, context=context, unroll=3
  )  # 2.2M parameters.
  stages.pretrain.row_length = context
  stages.pretrain.batch_size = 12
  stages.pretrain.num_steps = 800
  stages.pretrain.num_warmup = 50
  stages.pretrain.learning_rate = 2e-3
  stages.pretrain.eval_every = 200
  stages.pretrain.checkpoint_every = 200
  for each in (stages.sft, stages.rl_init):
    each.row_length = context
    each.pack = True  # About 3.3 demonstrations to a row.
    # Small batches: to copy a fact takes so small a model many updates.
    each.batch_size = 4
    each.learning_rate = 1e-3
    each.checkpoint_every = 200
  stages.sft.num_epochs = 6  # The paper: 16; a matter of minutes here.
  stages.sft.dropout = 0.1  # The paper: 0.2.
  stages.rl_init.num_epochs = 4  # The paper: 2; too few to copy facts.
  for each in (stages.reward, stages.judge, stages.crossval):
    each.max_candidates = 5
    each.merge_rankings = False  # The logged runs had them apart.
    each.row_length = context  # Two or three sentences with their facts.
    each.batch_size = 8
    each.learning_rate = 3e-4  # One epoch, as in the paper.
    each.eval_batch_size = 32
    each.checkpoint_every = 50
  stages.crossval.num_fold_seeds = 1  # The paper: 3 (reward.py:6b,folds).
  stages.crossval.max_comparisons = 600
  stages.select.num_prompts = 100
  stages.select.batch_size = 100
  for each in (stages.ppo, stages.ppo_ptx):
    each.ptx_row_length = context
    each.num_episodes = 1_536
    each.batch_size = 64
    each.learning_rate = 2e-4
    each.value_learning_rate = 5e-4
    each.num_warmup_iterations = 4
    each.pack_spare = 1.25
  stages.ppo_ptx.ptx_coef = 1.0  # gamma does not carry over between scales.
  stages.ppo_ptx.ptx_per_episode = 1
  stages.evaluate.row_length = context
  stages.evaluate.num_prompts = 100
  stages.evaluate.samples_per_prompt = 2
  stages.evaluate.batch_size = 100
  return config


def get_config(variant: str = 'miniature'):
  if variant in ('1p3b', '6b', '175b'):
    return paper(variant)
  if variant == 'gpt2':
    return gpt2()
  makers = {'miniature': miniature, 'smoke': smoke, 'e2e': e2e}
  if variant not in makers:
    raise ValueError(
      f'unknown variant {variant!r}; known: miniature, smoke, e2e, gpt2, 1p3b, '
      '6b, 175b'
    )
  config = makers[variant]()
  config.lock()
  return config
