"""Best-of-n and RL on one frontier: the judge's score against KL.

Follows Gao et al. 2022. N answers to each prompt are sampled once; they give
unbiased estimates of the best of n by the proxy reward model, for every n <= N.
RL points are measured on the same prompts. Both curves are fitted. Intervals
bootstrap over prompts.
"""

import functools
import json

import numpy as np
from etils import epath

from instruct_jax import asking, files, judge_fns, model_folder, queries
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import overoptimization, plots, report, win_rate
from instruct_jax.infra import logger, origin, sharding
from instruct_jax.models.config import check_stage

PROCESSES = 'one'


def validate(config):
  """Checks the config and the judge's keys. ValueError names the key."""
  check_stage(config)
  for key in ('policy', 'reward_model', 'prompts', 'tokenizer'):
    if not config[key]:
      raise ValueError(f'{key} is empty')
  judge = judge_fns.find(config.judge)
  if not judge.gives_scores():
    raise ValueError(f'judge {config.judge} gives no scores of single answers')
  judge.validate(config)
  if config.num_samples < 8:
    raise ValueError(
      f'num_samples must be at least 8 for three points of a curve: '
      f'{config.num_samples}'
    )
  if config.num_prompts < 2 or config.batch_size < 1:
    raise ValueError(
      f'num_prompts must be at least 2 and batch_size positive: '
      f'{config.num_prompts}, {config.batch_size}'
    )
  if not config.temperature > 0:
    raise ValueError(f'temperature must be positive: {config.temperature}')
  model_folder.named_folders(config.rl, 'rl')


def models_of(config) -> dict[str, str]:
  """Label -> folder of each model that this stage reads."""
  keys = ('policy', 'reward_model', 'judge_model')
  found = {key: config[key] for key in keys if config[key]}
  for name, folder in model_folder.named_folders(config.rl, 'rl').items():
    if not epath.Path(folder).exists():
      found[f'rl.{name}'] = folder
      continue
    for path in rl_policies(folder):
      part = path.relative_to(folder).as_posix()
      found[f'rl.{name}/{part}'] = str(path)
  return found


def inputs(config):
  """What this stage reads, by config key."""
  return {
    'prompts': config.prompts,
    'tokenizer': config.tokenizer,
    **models_of(config),
    **judge_fns.source_of(config.judge),
  }


def rl_policies(folder: str) -> list[epath.Path]:
  """A PPO stage's snapshots in order, then its final policy.

  Raises:
    ValueError: there is no policy in the folder.
  """
  folder = epath.Path(folder)
  snapshots, policy = folder / 'snapshots', folder / 'policy'
  paths = snapshots.iterdir() if snapshots.exists() else ()
  found = sorted(
    (path for path in paths if path.name.isdigit()),
    key=lambda path: int(path.name),
  )
  found += [policy] * policy.exists()
  if not found:
    raise ValueError(f'{folder} has no snapshots/ and no policy/')
  return found


def sizes_up_to(num_samples: int) -> list[int]:
  """The powers of two up to N, and N itself."""
  powers = {2**k for k in range(num_samples.bit_length())}
  return sorted(powers | {num_samples})


def run(config, workdir: epath.Path):
  """Samples, scores and fits; returns counts of prompts.

  Writes best_of_n.md, best_of_n.json and
  frontier.png.
  """
  validate(config)
  models = models_of(config)
  config = origin.filled(config, origin.LENGTHS, models, config.prompts)
  model_folder.check_contexts(
    models,
    config.prompt_length + config.response_length,
    'prompt_length + response_length',
  )
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  drawn, num_given = asking.draw(config, 'prompts', config.num_prompts)
  by_id = {prompt.id: prompt for prompt in drawn}
  N, sizes = config.num_samples, sizes_up_to(config.num_samples)
  mesh = sharding.make_mesh(config.mesh)
  with sharding.use_mesh(mesh):
    judge = judge_fns.find(config.judge)(config, workdir, mesh)
    proxy_fn, _ = judge_fns.reward_score(config, config.reward_model, mesh)

    def ask(name, folder, num_samples=1):
      """A policy, its answers, and their proxy and gold [prompts, samples]."""
      dtype = config.compute_dtype
      policy = queries.load_policy(folder, tokenizer, mesh, compute_dtype=dtype)
      answers = asking.sample(
        config, name, policy, drawn, tokenizer, mesh, num_samples
      )
      pairs = [(by_id[answer.prompt_id], answer) for answer in answers]
      proxy, gold = (
        np.asarray(score_fn(pairs), float).reshape(-1, num_samples)
        for score_fn in (proxy_fn, judge.score)
      )
      return policy, answers, proxy, gold

    # 1. N answers per prompt, and the best of n among them.
    start, _, proxy, gold = ask('policy', config.policy, N)
    base = {'proxy': proxy.mean(axis=1), 'gold': gold.mean(axis=1)}
    kl = [overoptimization.best_of_n_kl(n) for n in sizes]
    curves = {
      'best of n': {
        'kind': 'best_of_n',
        'labels': [f'n = {n}' for n in sizes],
        'kl': np.tile(kl, (len(proxy), 1)),
        'proxy': overoptimization.best_of_n(proxy, proxy, sizes),
        'gold': overoptimization.best_of_n(proxy, gold, sizes),
      }
    }

    # 2. The policies of each RL run, one answer per prompt.
    for name, folder in model_folder.named_folders(config.rl, 'rl').items():
      paths = rl_policies(folder)
      points = []
      for path in paths:
        policy, answers, proxy, gold = ask(f'{name}/{path.name}', str(path))
        signed, _ = queries.kl_of_answers(
          config, policy, start, drawn, answers, tokenizer, mesh
        )
        points.append((signed, proxy[:, 0], gold[:, 0]))
      kl, proxy, gold = (np.stack(x, axis=1) for x in zip(*points, strict=True))
      labels = [path.name for path in paths]
      curves[name] = {'kind': 'rl', 'labels': labels}
      curves[name] |= {'kl': kl, 'proxy': proxy, 'gold': gold}
  num_prompts = len(base['gold'])
  counts = {
    'num_prompts': num_prompts,
    'num_given': num_given,
    'num_dropped': len(drawn) - num_prompts,
  }
  return write_results(config, workdir, judge.name, curves, base, counts)


def points_of(config, curve, start):
  """One row per point: KL and the gain in both scores, with intervals."""
  interval = functools.partial(
    win_rate.mean_interval,
    cluster_ids=range(len(curve['kl'])),
    num_bootstrap=config.num_bootstrap,
    seed=config.seed,
  )
  return [
    {
      'label': label,
      'kl': interval(curve['kl'][:, i]),
      'proxy': interval(curve['proxy'][:, i] - start['proxy']),
      'gold': interval(curve['gold'][:, i] - start['gold']),
    }
    for i, label in enumerate(curve['labels'])
  ]


def write_results(config, workdir, judge, curves, start, counts):
  """Fits the curves and writes best_of_n.json, best_of_n.md and frontier.png.

  Both reports list each curve that cannot be fitted, with the reason.
  """
  points, fits, reasons = {}, {}, {}
  for name, curve in curves.items():
    points[name] = points_of(config, curve, start)
    try:
      fits[name] = overoptimization.fit(
        curve['kind'],
        curve['kl'],
        curve['gold'] - start['gold'][:, None],
        config.num_bootstrap,
        config.seed,
      )
    except ValueError as error:
      reasons[name] = str(error)
  result = {
    'judge': judge,
    **counts,
    'num_samples': config.num_samples,
    'points': points,
    'fits': fits,
    'not fitted': reasons,
  }
  text = json.dumps(report.plain_json(result), indent=2, allow_nan=False)
  files.write_bytes(workdir / 'best_of_n.json', (text + '\n').encode())
  frontier = plots.frontier(points, fits, judge)
  files.write_bytes(workdir / 'frontier.png', frontier)
  logger.current().plots(0, {'frontier': frontier})
  lines = [
    '# Best-of-n and RL',
    '',
    f'Judge: {report.escape(judge)}. {counts["num_prompts"]} of '
    f'{counts["num_given"]} prompts, {config.num_samples} answers each. Scores '
    'are gains over the initial policy; KL is from it, in nats. Intervals are '
    '95 %, redrawing prompts.',
    '',
    '![Frontier](frontier.png)',
    '',
    'With d = √KL: best of n gains d (α − β d), RL d (α − β log d) (Gao et al. '
    '2022).',
    '',
  ]
  columns = ('alpha', 'beta', 'peak_kl', 'r_squared', 'num_points')
  lines += report.table(
    ['curve', 'α', 'β', 'KL at the peak', 'R²', 'points'],
    [
      [report.escape(name), *(report.cell(getattr(f, x)) for x in columns)]
      for name, f in fits.items()
    ],
  )
  lines += [
    f'- {report.escape(name)} is not fitted: {report.escape(reason)}.'
    for name, reason in reasons.items()
  ]
  for name, rows in points.items():
    lines += ['', f'## {report.escape(name)}', '']
    columns = ('kl', 'proxy', 'gold')
    lines += report.table(
      ['', 'KL', 'reward model', 'judge'],
      [
        [report.escape(row['label']), *(report.cell(row[x]) for x in columns)]
        for row in rows
      ],
    )
  text = '\n'.join(lines).rstrip() + '\n'
  files.write_bytes(workdir / 'best_of_n.md', text.encode())
  return counts
