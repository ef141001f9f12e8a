"""Best-of-n and RL on one frontier: gold score against KL (Gao et al. 2022).

N answers of each prompt are sampled once; the expected best of n by the proxy
reward model, for all n, comes from them without bias. RL points are measured on
the same prompts. Both curves are fitted, with prompts redrawn for intervals.
"""

import functools
import json

import jax
import numpy as np
from etils import epath

from instruct_jax import files, model_folder, queries, rollout
from instruct_jax.data import loader, records
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import (
  judges,
  overoptimization,
  plots,
  report,
  win_rate,
)
from instruct_jax.evals.samples import Sample, draw_prompts
from instruct_jax.infra import origin, sharding, slices
from instruct_jax.infra import run as run_lib
from instruct_jax.models.config import check_stage

PROCESSES = 'one'


def validate(config):
  check_stage(config)
  run_lib.check_choice(config, 'judge', ('gold', 'reward'))
  for key in ('policy', 'reward_model', 'prompts', 'tokenizer'):
    if not config[key]:
      raise ValueError(f'{key} is empty')
  if config.judge == 'reward' and not config.judge_model:
    raise ValueError("judge_model is empty; the judge 'reward' needs it")
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
  """Label -> folder of each model that is read."""
  found = {key: config[key] for key in ('policy', 'reward_model')}
  if config.judge == 'reward':
    found['judge_model'] = config.judge_model
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
  }


def rl_policies(folder: str) -> list[epath.Path]:
  """A PPO stage's snapshots in order, and its final policy.

  Raises:
    ValueError: there is no policy in the folder.
  """
  folder = epath.Path(folder)
  found = []
  if (folder / 'snapshots').exists():
    found = sorted(
      (
        path for path in (folder / 'snapshots').iterdir() if path.name.isdigit()
      ),
      key=lambda path: int(path.name),
    )
  if (folder / 'policy').exists():
    found.append(folder / 'policy')
  if not found:
    raise ValueError(f'{folder} has no snapshots/ and no policy/')
  return found


def sizes_up_to(num_samples: int) -> list[int]:
  """1, 2, 4, ... and N itself."""
  sizes = [1]
  while 2 * sizes[-1] <= num_samples:
    sizes.append(2 * sizes[-1])
  return sizes if sizes[-1] == num_samples else [*sizes, num_samples]


def run(config, workdir: epath.Path):
  validate(config)
  models = models_of(config)
  keys = [*origin.LENGTHS, *[origin.WORLD] * (config.judge == 'gold')]
  config = origin.filled(config, keys, models, config.prompts)
  model_folder.check_contexts(
    models,
    config.prompt_length + config.response_length,
    'prompt_length + response_length',
  )
  tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer)
  given = records.read_jsonl(config.prompts, records.Prompt)
  prompts = draw_prompts(given, config.num_prompts, config.seed)
  run_lib.say_drawn(config.name, len(prompts), len(given), 'prompts')
  rows, dropped = loader.prompt_rows(prompts, tokenizer, config.prompt_length)
  run_lib.tell_dropped(
    config.name, dropped.describe('prompts', 'prompt_length')
  )
  prompts = [prompts[i] for i in rows.indices]
  N, sizes = config.num_samples, sizes_up_to(config.num_samples)
  mesh = sharding.make_mesh(config.mesh)
  put = functools.partial(sharding.put_batch, mesh=mesh)
  with sharding.use_mesh(mesh):
    load_policy = functools.partial(
      queries.load_policy,
      tokenizer=tokenizer,
      mesh=mesh,
      compute_dtype=config.compute_dtype,
    )
    policy = load_policy(config.policy)
    load_scalar = functools.partial(
      model_folder.load,
      kind='scalar',
      mesh=mesh,
      tokenizer=tokenizer,
      compute_dtype=config.compute_dtype,
    )
    proxy_model = load_scalar(config.reward_model)
    if config.judge == 'gold':
      gold_fn = judges.gold_score(config.world_seed)
      judge = 'the gold utility of the miniature (a program)'
    else:
      judge_model = load_scalar(config.judge_model)
      judge = f'another reward model, {config.judge_model}'
    kl_program = queries.kl_program(policy.module, config.temperature)

    def sample(params, num_samples, name, number):
      """So many answers of each prompt, which is read once for all."""
      generate = queries.generate_program(
        policy.module,
        config.response_length,
        tokenizer.stop_ids,
        config.temperature,
        config.batch_size,
        num_samples,
      )
      key = jax.random.fold_in(jax.random.key(config.seed), number)
      total = num_samples * len(prompts)
      with run_lib.Progress(f'sample {name}', total) as progress:
        return rollout.in_queues(
          lambda batch: generate(params, put(batch), key),
          rows,
          config.batch_size,
          num_samples,
          progress.update,
        )

    def scores_of(several, sampled):
      """(proxy, gold) of answers to these prompts [len(several)]."""
      ids = rollout.response_ids(sampled)
      score = functools.partial(
        queries.score_answers,
        prompts=tokenizer.encode_prompts(several),
        answers=ids,
        pad_id=tokenizer.pad_id,
        batch_size=config.batch_size,
        mesh=mesh,
      )
      proxy = score(proxy_model)
      if config.judge == 'reward':
        return proxy, score(judge_model)
      texts = tokenizer.decode_responses(ids)
      answers = [
        (prompt, Sample('', prompt.id, prompt.text, text, len(a), True))
        for prompt, text, a in zip(several, texts, ids, strict=True)
      ]
      return proxy, np.array(gold_fn(answers))

    # 1. N answers of each prompt, and the best of n among them.
    several = [prompt for prompt in prompts for _ in range(N)]
    proxy, gold = (
      np.asarray(x, float).reshape(len(prompts), N)
      for x in scores_of(several, sample(policy.params, N, 'policy', 0))
    )
    start = {'proxy': proxy.mean(axis=1), 'gold': gold.mean(axis=1)}
    curves = {
      'best of n': {
        'kind': 'best_of_n',
        'labels': [f'n = {n}' for n in sizes],
        'kl': np.tile(
          [overoptimization.best_of_n_kl(n) for n in sizes], (len(prompts), 1)
        ),
        'proxy': overoptimization.best_of_n(proxy, proxy, sizes),
        'gold': overoptimization.best_of_n(proxy, gold, sizes),
      }
    }

    # 2. Policies along RL, one answer a prompt.
    for name, folder in model_folder.named_folders(config.rl, 'rl').items():
      found = {'kl': [], 'proxy': [], 'gold': []}
      paths = rl_policies(folder)
      for number, path in enumerate(paths, 1):
        model = load_policy(str(path))
        sampled = sample(model.params, 1, f'{name}/{path.name}', number)
        signed, _ = slices.in_batches(
          lambda batch, p=model.params: kl_program(
            p, policy.params, put(batch)
          ),
          sampled,
          config.batch_size,
        )
        values = (signed, *scores_of(prompts, sampled))
        for key, value in zip(found, values, strict=True):
          found[key].append(np.asarray(value, float))
      curves[name] = {
        'kind': 'rl',
        'labels': [path.name for path in paths],
        **{key: np.stack(value, axis=1) for key, value in found.items()},
      }
  counts = {
    'num_prompts': len(prompts),
    'num_given': len(given),
    'num_dropped': dropped.total,
  }
  return write_results(config, workdir, judge, curves, start, counts)


def points_of(config, curve, start):
  """One row a point: KL and both scores gained, with intervals."""
  ids = range(len(curve['kl']))
  rows = []
  for i, label in enumerate(curve['labels']):
    columns = {
      'kl': curve['kl'][:, i],
      'proxy': curve['proxy'][:, i] - start['proxy'],
      'gold': curve['gold'][:, i] - start['gold'],
    }
    rows.append(
      {
        'label': label,
        **{
          name: win_rate.mean_interval(
            values, ids, num_bootstrap=config.num_bootstrap, seed=config.seed
          )
          for name, values in columns.items()
        },
      }
    )
  return rows


def write_results(config, workdir, judge, curves, start, counts):
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
  files.write_bytes(
    workdir / 'frontier.png', plots.frontier(points, fits, judge)
  )
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
  lines += report.table(
    ['curve', 'α', 'β', 'KL at the peak', 'R²', 'points'],
    [
      [
        report.escape(name),
        *map(
          report.cell,
          (f.alpha, f.beta, f.peak_kl, f.r_squared, f.num_points),
        ),
      ]
      for name, f in fits.items()
    ],
  )
  lines += [
    f'- {report.escape(name)} is not fitted: {report.escape(reason)}.'
    for name, reason in reasons.items()
  ]
  for name, rows in points.items():
    lines += ['', f'## {report.escape(name)}', '']
    lines += report.table(
      ['', 'KL', 'reward model', 'judge'],
      [
        [
          report.escape(row['label']),
          *(report.cell(row[key]) for key in ('kl', 'proxy', 'gold')),
        ]
        for row in rows
      ],
    )
  files.write_bytes(
    workdir / 'best_of_n.md', ('\n'.join(lines).rstrip() + '\n').encode()
  )
  return counts
