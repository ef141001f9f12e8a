"""The recipe on human data: restaurant sentences and crowd rankings."""

from ml_collections import ConfigDict

from configs import common, pipeline, reward


def data_stage(seed, workdir):
  """Files of the E2E data and of books, and their preparation."""
  config = common.stage('data', 'instruct_jax.worlds.restaurant', seed, workdir)
  config.root = ''  # Folder with e2e_nlg, e2e_rankings and books.
  config.vocab_size = 4_096  # Of a BPE trained on the text; 0 takes GPT-2's.
  # By 'quality' (how well a sentence states the facts) longer sentences win, by
  # 'naturalness' shorter ones. One reward model cannot follow both.
  config.criteria = ('quality',)
  config.words_per_document = 100  # Books are cut into pieces of about this.
  config.valid_documents = 0.01  # Share of the pieces held out.
  config.prefix_length = 96  # Tokens that a few-shot prefix may add.
  return config


def restaurant():
  """Human data: the same loops on restaurant sentences and crowd rankings."""
  config = pipeline.recipe('ppo_ptx_e2e')
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  data = workdir + '/data'
  stages = config.stages
  stages.data = data_stage(seed, workdir)
  # One value under two names: the short one is for the command line.
  config.data = ConfigDict({'root': ''})
  stages.data.root = config.data.get_ref('root')
  # The judge is a second reward model, trained on the other half of workers.
  judge = stages.judge = reward.stage(seed + 1, workdir, 'judge')
  judge.tokenizer = data + '/tokenizer'
  judge.mesh = config.get_ref('mesh')
  pipeline.share_lora(config, judge)
  judge.init = workdir + '/sft/model'
  judge.demonstrations = data + '/demonstrations_train.jsonl'
  judge.comparisons = data + '/judge_comparisons_train.jsonl'
  judge.valid_comparisons = data + '/judge_comparisons_valid.jsonl'
  for each in (stages.reward, stages.crossval):
    each.comparisons = data + '/comparisons_train.jsonl'
    each.valid_comparisons = data + '/comparisons_valid.jsonl'
  for key, split in (('comparisons', 'train'), ('test_comparisons', 'test')):
    stages.evaluate[key] = (
      "reward model's workers=" + data + f'/comparisons_{split}.jsonl'
      + ",judge's workers=" + data + f'/judge_comparisons_{split}.jsonl'
    )  # fmt: skip
  stages.evaluate.world = 'instruct_jax.worlds.restaurant.WORLD'
  stages.evaluate.judge = 'instruct_jax.worlds.restaurant.OtherWorkers'
  stages.evaluate.judge_model = workdir + '/judge/model'
  config.stage_order = (
    *('data', 'pretrain', 'sft', 'rl_init', 'reward', 'judge', 'select'),
    *('crossval', 'ppo', 'ppo_ptx', 'nlp_suite', 'evaluate'),
  )

  # Tokens. Facts have at most 43; 99.5 % of the sentences have 52 or fewer;
  # facts, ranked sentence and end together have 98 or fewer in 99.5 % of the
  # rankings' rows.
  prompt_length, response_length, prefix_length = 44, 52, 96
  context = prefix_length + prompt_length + response_length
  ppos = (stages.ppo, stages.ppo_ptx)
  for each in (stages.select, *ppos, stages.evaluate):
    each.prompt_length = prompt_length
    each.response_length = response_length
  stages.data.prefix_length = prefix_length
  stages.evaluate.prefix_length = prefix_length

  # Learning rates grow as models shrink; none of these is the paper's.
  stages.pretrain.model = common.tiny_model(
    width=192, num_layers=3, context=context, unroll=3
  )  # 2.2M parameters.
  stages.pretrain.update(row_length=context, batch_size=12)
  stages.pretrain.update(num_steps=800, num_warmup=50, learning_rate=2e-3)
  stages.pretrain.update(eval_every=200, checkpoint_every=200)
  for each in (stages.sft, stages.rl_init):
    each.row_length = context
    each.pack = True  # About 3.3 demonstrations per row.
    # Small batches, as so small a model needs many updates to copy a fact.
    each.batch_size = 4
    each.update(learning_rate=1e-3, checkpoint_every=200)
  stages.sft.num_epochs = 6  # The paper: 16; it takes minutes here.
  stages.sft.dropout = 0.1  # The paper: 0.2.
  stages.rl_init.num_epochs = 4  # The paper: 2; too few to copy facts.
  for each in (stages.reward, judge, stages.crossval):
    each.merge_rankings = False  # As in the logged runs.
    each.row_length = context  # Two or three sentences with their facts.
    each.learning_rate = 3e-4  # One epoch, as in the paper.
    each.update(max_candidates=5, batch_size=8, eval_batch_size=32)
    each.checkpoint_every = 50
  stages.crossval.num_fold_seeds = 1  # The paper: 3 (reward.py:6b,folds).
  stages.crossval.max_comparisons = 600
  stages.select.update(num_prompts=100, batch_size=100)
  for each in ppos:
    each.update(ptx_row_length=context, num_episodes=1_536, batch_size=64)
    each.update(learning_rate=2e-4, value_learning_rate=5e-4)
    each.update(num_warmup_iterations=4, pack_spare=1.25)
  stages.ppo_ptx.ptx_coef = 1.0  # gamma does not carry over between scales.
  stages.ppo_ptx.ptx_per_episode = 1
  stages.evaluate.update(row_length=context, num_prompts=100)
  stages.evaluate.update(samples_per_prompt=2, batch_size=100)
  return config
