"""Writes a model folder in the Hugging Face format.

  python -m instruct_jax.export --checkpoint=MODEL --tokenizer=FOLDER \\
    --output=DIR

DIR gets config.json, safetensors, the tokenizer, generation_config.json, the
chat template that the model was trained with, and a model card. A policy
becomes a causal language model. A reward model becomes a sequence classifier
with one label, whose logit plus `score_shift` of config.json is the score.
--fold_shift adds the shift to the final norm's bias, if the family has one. The
logit itself is then the score, up to rounding, and loading the folder no longer
gives the same weights bit for bit.

--push_to=hf:NAME uploads the folder to the Hugging Face Hub, into a private
repository that must not exist yet; --public makes it visible.
"""

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from etils import epath

from instruct_jax import command, files, hub, lora, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.infra import checkpoint, origin, sharding
from instruct_jax.infra import run as run_lib
from instruct_jax.models import hf


@dataclasses.dataclass(frozen=True)
class Facts:
  """Facts for the model card that the model folder does not contain.

  Attributes:
    base_model: Hub repository of the published model that was trained; '' takes
      the one that the run's config.json names.
    datasets: Hub repositories, separated by commas.
    license: as the Hub spells it, such as apache-2.0.
    name: name of the model; '' takes that of its folder.
  """

  base_model: str = ''
  datasets: str = ''
  license: str = ''
  name: str = ''


def export(
  checkpoint_folder: epath.PathLike,
  tokenizer_folder: epath.PathLike,
  output: epath.PathLike,
  *,
  fold_shift: bool = False,
  adapters: bool = False,
  facts: Facts = Facts(),
) -> None:
  """Writes `output`; see the top of this file.

  Raises:
    checkpoint.CheckpointError: the model is damaged, or was made with another
      tokenizer.
    ValueError: `output` is not empty, no published family has this model,
      there is no shift to fold or no bias to fold it into, `adapters` is given
      for a model without them, or both options are given.
    files.InUseError: another process exports to `output`.
  """
  output = epath.Path(output)
  _check_new(output)
  if adapters and fold_shift:
    raise ValueError(
      'fold_shift changes a norm of the base, which adapters do not have; give '
      'fold_shift or adapters, not both'
    )
  tokenizer = tokenizer_lib.Tokenizer.load(tokenizer_folder)
  described = checkpoint.load_metadata(checkpoint_folder)
  load = model_folder.read if adapters else model_folder.load
  model = load(
    checkpoint_folder,
    described['kind'],
    sharding.make_mesh((1, -1, 1)),
    tokenizer,
  )
  if adapters and model.config.lora is None:
    raise ValueError(
      f'{checkpoint_folder} holds no adapters; leave --adapters out'
    )
  if fold_shift:
    model = dataclasses.replace(model, params=hf.fold_shift(model.params))
  with _whole(files.absolute(output)) as folder:
    tokenizer.save(folder)
    _write_template(folder, model, tokenizer)
    if adapters:
      base = model.source
      if not model_folder.is_published(base):
        export(base, tokenizer_folder, folder / 'base')
        base = files.absolute(output) / 'base'
      name = str(base).removeprefix('hf:')
      hf.save_adapters(folder, model.config, model.params, name)
    else:
      hf.save(folder, model.config, model.params)
      _describe_tokens(folder, model, tokenizer)
    name = facts.name or output.name
    card = _card(name, checkpoint_folder, model, tokenizer, facts)
    (folder / 'README.md').write_text(card, 'utf-8')


def _check_new(output):
  if output.exists() and not (output.is_dir() and not any(output.iterdir())):
    raise ValueError(f'{output} is not an empty folder; give a new one')


@contextlib.contextmanager
def _whole(output: epath.Path) -> Iterator[epath.Path]:
  """Yields a folder that is moved to `output` once it is complete."""
  if files.is_remote(output):  # Object stores can neither rename nor lock.
    output.mkdir(parents=True, exist_ok=True)
    try:
      yield output
    except BaseException:
      output.rmtree()
      raise
    return
  unfinished = output.parent / f'.{output.name}.unfinished'
  with files.naming(output), files.locked(unfinished):
    _check_new(output)  # Another process may have written it meanwhile.
    yield unfinished
    if output.exists():  # An empty folder.
      output.rmdir()
    unfinished.rename(output)


def _skipped_id(model, tokenizer):
  """The token that `transformers` skips when it looks for the last one."""
  skipped_id = model.module.skipped_id if model.kind == 'scalar' else -1
  return tokenizer.pad_id if skipped_id < 0 else skipped_id


def _write_template(output, model, tokenizer):
  """Writes the chat template for servers.

  There is none where prompts are plain text, since the model has not learned
  the template that came with its tokenizer. A reward model's template ends
  where its score is read.
  """
  file, others = (
    output / name for name in ('chat_template.jinja', tokenizer_lib.TEMPLATES)
  )
  template = tokenizer.serving_template()
  reads_at_end = model.kind == 'scalar' and len(model.module.end_ids) < 2
  if tokenizer.template == tokenizer_lib.CHAT and reads_at_end:
    template = tokenizer.scoring_template()
  if template:
    file.write_text(template, 'utf-8')
  else:
    file.unlink(missing_ok=True)
  if tokenizer.template != tokenizer_lib.CHAT and others.exists():
    others.rmtree()


def _describe_tokens(output, model, tokenizer):
  """Adds token ids to config.json and generation_config.json."""
  path = output / 'config.json'
  values = json.loads(path.read_text('utf-8'))
  stop_ids = list(tokenizer.stop_ids)
  ids = {
    'eos_token_id': stop_ids if len(stop_ids) > 1 else tokenizer.eos_id,
    'pad_token_id': _skipped_id(model, tokenizer),
  }
  more = {}
  if model.kind == 'scalar':
    more = {'score_end_ids': list(model.module.end_ids)}
  path.write_text(
    json.dumps({**values, **ids, **more}, indent=2) + '\n', 'utf-8'
  )
  # Sample from the policy's own distribution, as in training and evaluation.
  sampling = {'do_sample': True, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
  (output / 'generation_config.json').write_text(
    json.dumps({**sampling, **ids}, indent=2) + '\n', 'utf-8'
  )


# --- The card -----------------------------------------------------------------


def _card(name, checkpoint_folder, model, tokenizer, facts):
  """The model card, README.md, with front matter that the Hub reads."""
  use = 'Language model: sample with temperature 1 and stop at an EOS token.'
  if model.kind == 'scalar':
    use = (
      'Reward model: the score of a prompt with its answer and EOS is the '
      f'logit plus `score_shift` = {float(model.params["head_bias"])}.'
    )
  skipped_id = _skipped_id(model, tokenizer)
  if skipped_id != tokenizer.pad_id:
    use += (
      f' It is read at the last token that is not {skipped_id}: pad rows with '
      'it.'
    )
  what = f'{model.config.num_params:,} parameters'
  if model.config.lora is not None:
    what = (
      f'{lora.num_params(model.params):,} parameters of adapters, to be loaded '
      f'by `peft` on top of their base,'
    )
  results = _results(checkpoint_folder, model.kind)
  measured = ''.join(
    f'- {each.metric_name}: {each.metric_value:.3f} '
    f'[{each.metric_args["low"]:.3f}, {each.metric_args["high"]:.3f}]\n'
    for each in results
  )
  measured = f'Measured, with 95 % intervals:\n\n{measured}\n' * bool(results)
  # A card may be public, so it leaves out local paths.
  about = {
    key: value
    for key, value in model.metadata.items()
    if not isinstance(value, str) or '/' not in value or _on_hub(value)
  }
  about = json.dumps({**about, 'tokenizer': tokenizer.describe()}, indent=2)
  front = _front_matter(name, checkpoint_folder, model, results, facts)
  return (
    f'---\n{front}\n---\n\n# {name}\n\n{use} {what} in float32, written by '
    f'instruct_jax.\n\n{measured}```json\n{about}\n```\n'
  )


def _front_matter(name, checkpoint_folder, model, results, facts) -> str:
  import huggingface_hub

  is_scalar = model.kind == 'scalar'
  is_adapter = model.config.lora is not None
  tags = ['instruct_jax', 'rlhf', 'reward-model' if is_scalar else '']
  base = facts.base_model or base_of(str(checkpoint_folder))
  return huggingface_hub.ModelCardData(
    base_model=base or None,
    datasets=_listed(facts.datasets) or None,
    license=facts.license or 'unknown',
    library_name='peft' if is_adapter else 'transformers',
    pipeline_tag='text-classification' if is_scalar else 'text-generation',
    tags=[*filter(None, [*tags, model.metadata.get('stage', '')])],
    metrics=['accuracy'] if is_scalar and results else None,
    model_name=name,
    eval_results=results or None,
  ).to_yaml()


def check_facts(facts: Facts) -> None:
  """Asks the Hub whether it accepts the facts, before compute is spent.

  Raises:
    ValueError: see `hub.check_card`.
  """
  import huggingface_hub

  data = huggingface_hub.ModelCardData(
    base_model=facts.base_model or None,
    datasets=_listed(facts.datasets) or None,
    license=facts.license or 'unknown',
  )
  hub.check_card(data.to_yaml())


def _listed(text):
  return [part.strip() for part in text.split(',') if part.strip()]


def _on_hub(folder):
  """Whether it is `hf:` and a repository, not a local folder."""
  name = folder.removeprefix('hf:')
  is_name = re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) is not None
  return name != folder and is_name and not epath.Path(name).is_dir()


def base_of(folder: str) -> str:
  """The Hub repository of the published model that a folder was trained from.

  A run's config.json says what it started from. Returns '' if that is not on
  the Hub, or if the run started from several models.
  """
  if folder.startswith('hf:'):
    return folder.removeprefix('hf:') if _on_hub(folder) else ''
  run, stages = origin.stages_of(folder)
  begins = [stage['init'] for stage in stages.values() if stage.get('init')]
  for begin in begins[:1]:  # What the stage itself started from.
    if epath.Path(begin).exists() and not model_folder.is_published(begin):
      return base_of(begin)
  named = {base_of(begin) for begin in begins if begin.startswith('hf:')}
  return named.pop() if len(named) == 1 else ''


def _results(checkpoint_folder, kind):
  """This model's `huggingface_hub.EvalResult`s, from its run's evaluation."""
  import huggingface_hub

  own = str(files.absolute(checkpoint_folder))
  run, stages = origin.stages_of(own)
  evaluation = next(
    (s for s in stages.values() if s.get('experiment') == 'evaluate'), None
  )
  if evaluation is None or not (run / 'summary.json').exists():
    return []
  summary = run_lib.read_json(run / 'summary.json')
  # The results are on the run's own held-out records, whatever their source.
  result = functools.partial(
    huggingface_hub.EvalResult, dataset_type='preferences'
  )
  if kind == 'scalar':
    reward = summary['intervals'].get('reward_model')
    if not reward or f'{run}{evaluation["reward_model"]}' != own:
      return []
    return [
      result(
        task_type='text-classification',
        dataset_name=f'rankings of the run, {name}',
        metric_type='accuracy',
        metric_name=f'Accuracy on pairs, {name}',
        metric_value=found['accuracy'],
        metric_args={'low': found['low'], 'high': found['high']},
      )
      for name, rankings in reward['rankings'].items()
      if (found := rankings['accuracies'].get(reward['scorer']))
    ]
  folders = ','.join(
    filter(None, (evaluation[k] for k in ('models', 'other_models')))
  )
  names = [
    name
    for name, folder in model_folder.named_folders(folders).items()
    if f'{run}{folder}' == own and name != summary['baseline']
  ]
  rows = [summary['everyone'].get(name, {}) for name in names]
  return [
    result(
      task_type='text-generation',
      dataset_name='held-out prompts of the run',
      metric_type='win_rate',
      metric_name=f'Win rate against {summary["baseline"]}, by '
      f'{summary["judge"]}',
      metric_value=found['rate'],
      metric_args={'low': found['low'], 'high': found['high']},
    )
    for found in [row['win rate'] for row in rows if row.get('win rate')][:1]
  ]


def _check_base(checkpoint_folder):
  base = checkpoint.load_metadata(checkpoint_folder).get('base', {})
  if not base.get('path', '').startswith('hf:'):
    raise ValueError(
      f'push_to: the base of the adapters in {checkpoint_folder} is not on the '
      'Hub, where peft would look for it; leave --adapters out, which merges '
      'them'
    )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the export; returns the exit code."""
  parser = command.Parser(
    prog='python -m instruct_jax.export',
    description='Writes a model folder in the Hugging Face format.',
  )
  required = functools.partial(parser.add_argument, required=True)
  switch = functools.partial(parser.add_argument, action='store_true')
  required('--checkpoint', metavar='MODEL', help='model folder')
  required('--tokenizer', metavar='FOLDER', help='with which it was trained')
  required('--output', metavar='DIR', help='to write')
  switch('--fold_shift', help="make a reward model's logit its score")
  switch('--adapters', help='write adapters apart from their base, for peft')
  parser.add_argument('--push_to', metavar='hf:NAME', help='upload it there')
  switch('--public', help='let everyone see what is uploaded')
  for name, what in (
    ('base_model', 'NAME on the Hub that was trained, if the run does not say'),
    ('datasets', 'NAMES on the Hub it was trained on, separated by commas'),
    ('license', 'as the Hub spells it, such as apache-2.0'),
  ):
    parser.add_argument(f'--{name}', default='', help=what)
  flags = parser.parse_args(arguments)
  if flags.public and not flags.push_to:
    parser.error('--public is about an upload; give --push_to=hf:NAME')
  pushed_name = (flags.push_to or '').removeprefix('hf:').rpartition('/')[2]
  facts = Facts(flags.base_model, flags.datasets, flags.license, pushed_name)
  if flags.push_to:
    if files.is_remote(flags.output):
      parser.error('--push_to needs an --output on a disk')
    if flags.adapters:
      _check_base(flags.checkpoint)
    repository = hub.check_push(flags.push_to, private=not flags.public)
    check_facts(facts)
  export(
    flags.checkpoint,
    flags.tokenizer,
    flags.output,
    fold_shift=flags.fold_shift,
    adapters=flags.adapters,
    facts=facts,
  )
  print(flags.output, flush=True)
  if flags.push_to:
    private = ['--private'] * (not flags.public)
    again = shlex.join(['hf', 'upload', repository, flags.output, *private])
    # Printed first, since a killed process could not print it.
    print(
      f'uploading; if interrupted, continue with `{again}`', file=sys.stderr
    )
    try:
      print(hub.push(flags.output, flags.push_to, private=not flags.public))
    except ValueError as error:
      raise ValueError(
        f'{error}; {flags.output} is complete; continue with `{again}`'
      ) from error
  return 0


if __name__ == '__main__':
  command.end(main)
