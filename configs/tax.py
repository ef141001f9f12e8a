"""A sweep of the alignment tax as in E.6: Figures 33, 34 and 35.

  python -m instruct_jax.main --config=configs/tax.py --config.source=RUN \\
    --config.probe_every=10 --config.probes=winogender=FILE

RUN is a finished run of `configs/ppo_ptx.py`; use `:smoke` or `:e2e` for runs
of those variants. RL is repeated from RUN's models, with the settings of its
PPO-ptx stage except for:

  figure33  gamma, the pretraining coefficient
  figure34  beta, the KL coefficient, with gamma at 0
  figure35  twice the episodes, three seeds

Values are multiples of the stage's own. Each is a separate stage, so an
interrupted run resumes. Output: tax/figure33/tax_ptx_coef.png and so on, each
with a tax.json beside it. The plots show pretraining loss, reward-model score
and, for the files given, public tasks (names of `configs/nlp_suite.py`).
"""

from ml_collections import ConfigDict

from configs import common, ppo_ptx

GAMMAS = (0.0, 0.1, 1.0, 10.0)  # E.6: 0 to above 27.8, on a log scale.
BETAS = (0.3, 1.0, 10.0, 100.0)  # E.6: up to 100 times its own 0.02.
NUM_SEEDS = 3  # Figure 35.
_FROM_SOURCE = (
  *('tokenizer', 'init', 'reward_model'),
  *('prompts', 'documents', 'valid_documents'),
)


def ppo_stage(config, template, name, **changes):
  """PPO on the models of `config.source`, with some keys changed."""
  found = template.copy_and_resolve_references()
  source = config.get_ref('source')
  for key in _FROM_SOURCE:
    found[key] = source + template[key]
  found.name = name
  for key in ('workdir', 'mesh', 'probes', 'probe_every', 'probe_items'):
    found[key] = config.get_ref(key)
  # Each key is set once: a second value would change the key it refers to.
  changes = {'num_episodes': config.get_ref('num_episodes'), **changes}
  for key, value in changes.items():
    found[key] = value
  return found


def tax_stage(seed, workdir):
  """The stage that makes the plots."""
  config = common.stage('tax', 'tax', seed, workdir)
  config.source = ''
  config.figures = ConfigDict()  # Folder of plots -> stages that they show.
  return config


def _name(share):
  return f'{share:g}'.replace('.', 'p')  # Config keys cannot contain dots.


def get_config(argument: str = 'miniature'):
  """The sweep on a run of a variant of `configs/ppo_ptx.py`."""
  run = ppo_ptx.get_config(
    common.check(argument, ('miniature', 'smoke', 'e2e'))
  )
  # Its workdir is empty, so its paths are relative to a run.
  template = run.stages.ppo_ptx
  config = common.root(f'tax_{argument}')
  config.source = ''  # Folder of a finished run.
  config.probes = ''  # TASK=FILE,TASK=FILE.
  config.probe_every = 0  # Iterations between probes; 0 is never.
  config.probe_items = template.probe_items
  config.num_episodes = template.num_episodes  # Of a run; fewer for a test.
  config.xla_flags = run.xla_flags
  seed, workdir = config.get_ref('seed'), config.get_ref('workdir')
  groups = {
    'figure33': {
      f'gamma_x{_name(x)}': {'ptx_coef': x * template.ptx_coef, 'seed': seed}
      for x in GAMMAS
    },
    'figure34': {
      f'beta_x{_name(x)}': {
        'kl_coef': x * template.kl_coef,
        'ptx_coef': 0.0,
        'seed': seed,
      }
      for x in BETAS
    },
    'figure35': {
      f'long_{i}': {
        'num_episodes': config.get_ref('num_episodes') * 2,
        'seed': seed + i,
      }
      for i in range(NUM_SEEDS)
    },
  }
  stages = config.stages
  for runs in groups.values():
    for name, changes in runs.items():
      stages[name] = ppo_stage(config, template, name, **changes)
  stages.tax = tax_stage(seed, workdir)
  stages.tax.source = config.get_ref('source')
  for figure, runs in groups.items():
    stages.tax.figures[figure] = tuple(runs)
  config.stage_order = (*(n for runs in groups.values() for n in runs), 'tax')
  config.lock()
  return config
