"""Config keys: enumerated ones are checked, and errors name existing ones."""

import ast
import dataclasses
import importlib
import pathlib
import re

import pytest
from etils import epath

from instruct_jax.infra import pipeline, run, stages
from instruct_jax.models.config import Rotary, TransformerConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {
  'ppo_ptx': ('miniature', 'smoke', 'e2e', 'gpt2', '1p3b', '6b', '175b'),
  'pretrain': ('1p3b',),
  'sft': ('1p3b', '1p3b,init', 'gpt2'),
  'rloo': ('miniature', 'smoke'),
  'dpo': ('miniature', 'smoke'),
  'reward': ('6b', '6b,folds', 'hh', 'gpt2'),
  'evaluate': ('gold', 'reward', 'people', 'http'),
  'best_of_n': ('',),
  'nlp_suite': ('',),
  'sample': ('',),
  'center_reward': ('',),
  'tax': ('miniature',),
  'plan': ('1p3b,v5e-8', 'miniature,v5e-8', 'tldr_1b,v4-8'),
  'recipe': ('smoke', 'cpu', 'gpu', 'v4-8', 'tldr_1b'),
  'sentiment': ('', 'smoke'),
  'speed': ('tiny,iteration', '1p3b,all'),
  'labeling': ('',),
  'study': ('R10', 'R5,seed'),
  'reward_bench': ('',),
  'chat_bench': ('alpaca_eval', 'mt_bench'),
}

# Text keys with few values, which `validate` knows.
ENUMERATED = {
  'activation',
  'advantage',
  'attention',
  'baseline',
  'benchmark',
  'chip',
  'claims',
  'compute_dtype',
  'criteria',
  'divisor',
  'ema_every',
  'experiment',
  'frozen_dtype',
  'growth',
  'judge',
  'kl_estimator',
  'kl_in',
  'loss_on',
  'norm',
  'offload',
  'pairs',
  'programs',
  'prompt_types',
  'prompted',
  'ranking_loss',
  'reference',
  'remat',
  'remats',
  'residual',
  'reward',
  'select_by',
  'stage_order',
  'targets',
  'value_from',
  'work',
  'world',
}
# Those that nothing reads but the planner's own config, or a person.
DESCRIBING = {'name', 'variant', 'size', 'topology'}
# Any text is one: paths, lists of them, addresses, flags of others.
FREE = {
  *('cache', 'comparisons', 'compilation_cache', 'database'),
  *('compiler_options', 'default_workdir', 'demonstrations', 'documents'),
  *('figure33', 'figure34', 'figure35', 'hf_python', 'host', 'info_labels'),
  *('init', 'judge_model', 'key_variable', 'mesh', 'meshes', 'model', 'models'),
  *('crossval', 'other_models', 'prefix_prompts', 'prefixes'),
  *('test_comparisons', 'body', 'gamed', 'judge_layout', 'questions'),
  *('references', 'platforms', 'torch_precisions'),
  *('peers', 'policy', 'probes', 'profile_steps', 'prompts', 'public_url'),
  *(
    'rankings',
    'reward_fn',
    'reward_model',
    'rl',
    'root',
    'sets',
    'sft',
    'source',
    'suite',
  ),
  *('tokenizer', 'toxicity_labels', 'trl_python', 'truth_labels'),
  *('tunix_python', 'url', 'valid', 'valid_comparisons'),
  *('valid_demonstrations', 'valid_documents', 'valid_prompts', 'workdir'),
  *('date', 'labels', 'lengths', 'other_documents', 'preferences'),
  *('prepare', 'score_fn', 'other_judges'),
  *('sft_model', 'template', 'test_preferences', 'valid_labels'),
  *('base_model', 'categories', 'datasets', 'license', 'push_to'),
  'xla_flags',
  *('runs', 'seeds', 'records'),
  'loggers',  # Of the run, not of a stage; test_infra_logger.py.
}


def get_config(name, variant):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config(variant) if variant else module.get_config()


def all_configs():
  for name, variants in CONFIGS.items():
    for variant in variants:
      yield name, variant, get_config(name, variant)


def flat(config):
  return run.flat(run.plain(config.copy_and_resolve_references()))


def enumerated():
  """(name, variant, dotted key) of each enumerated key of each config."""
  for name, variant, config in all_configs():
    if name == 'labeling':
      continue
    for key, value in flat(config).items():
      last = key.split('.')[-1]
      # The planner's config and that of `speed` hold those of other stages, of
      # which nothing is found by its name.
      if last == 'experiment' and name in ('plan', 'speed') and key != last:
        continue
      # The stages refer to those of the whole recipe; here nothing refers.
      shared = ('lora.targets', 'compute_dtype', 'judge')
      if key in shared and 'stages' in config:
        continue
      if last in ENUMERATED and isinstance(value, str | list):
        yield name, variant, key


def test_every_text_key_is_enumerated_or_free():
  files = set(get_config('nlp_suite', '').data)
  for name, variant, config in all_configs():
    for key, value in flat(config).items():
      last = key.split('.')[-1]
      if isinstance(value, str | list) and last not in files:
        known = ENUMERATED | DESCRIBING | FREE
        assert last in known, f'{name}:{variant} {key}: say what it may be'


def once_each():
  """Of each experiment, each enumerated key once; all of plan and benchmark."""
  seen = {}
  for name, variant, key in enumerated():
    values = flat(get_config(name, variant))
    start, _, last = key.rpartition('.')
    which = values.get(f'{start}.experiment', f'{name} {start}')
    seen.setdefault((which, last), (name, variant, key))
  return list(seen.values())


@pytest.mark.parametrize(('name', 'variant', 'key'), once_each())
def test_an_enumerated_key_takes_no_other_value(name, variant, key, tmp_path):
  config = get_config(name, variant).copy_and_resolve_references()
  config.unlock()
  values = {'models': 'sft=a,b=c', 'prompts': 'p', 'tokenizer': 't'}
  values |= {'rankings': 'r', 'reward_model': 'm', 'policy': 'p'}
  values |= {'documents': 'd', 'source': 's', 'demonstrations': 'e'}
  config.update(
    {k: v for k, v in values.items() if k in config and not config[k]}
  )
  for section in (config, *config.get('stages', {}).values()):
    if section.get('compute_dtype') == 'auto':
      section.compute_dtype = ''  # As main.py has resolved it.
    if section.get('remat', '') is None:
      section.remat = 'none'  # As `prepare` chooses it.
  if name == 'evaluate':
    config.endpoint.update(url='http://x', model='m')
  if name == 'nlp_suite':
    config.data.drop = 'f'
  if name == 'reward_bench':
    config.sets = 'hh:x'
  if name == 'chat_bench':
    config.endpoint.update(url='http://x', model='m', key_variable='')
    config.update(questions='q', judge_layout='l', baseline='base=b')
  if name == 'sentiment':
    config.stages.evaluate.models = 'before=a,ppo=b,ppo_learned=c'
  if 'stages' in config:
    for stage in config.stages.values():
      stage.update({k: 'x' for k in ('root', 'source') if k in stage})
      given = {k: v for k, v in values.items() if k in stage and not stage[k]}
      stage.update(given)

  def validate():
    found = stages.of_run(
      config, config, epath.Path(tmp_path), pipeline.find_experiment
    )
    for stage in found:
      stages.validate(stage)

  validate()
  old = flat(config)[key]
  new = 'nonsense' if isinstance(old, str) else ('nonsense',)
  config.update_from_flattened_dict({key: new})
  last = key.split('.')[-1]
  with pytest.raises(ValueError, match=rf'(?s){last}.*nonsense') as error:
    validate()
  if key.startswith('stages.'):
    assert str(error.value).startswith(f'{key.split(".")[1]}: ') or (
      last == 'experiment'
    )


# --- What errors say ----------------------------------------------------------

# Words that a message takes from elsewhere: columns and fields of files that
# other programs write, their options and functions.
_OF_OTHERS = {
  *('array_record', 'eos_token', 'layer_types', 'max_gen_toks', 'model_type'),
  *('not_entailment', 'pad_token', 'prompt_type', 'ref_text', 'rope_type'),
  *('save_to_disk', 'score_shift', 'add_special_tokens', 'flatten_indices'),
  *('chat_template', 'high_freq_factor', 'label_gold', 'num_labels'),
  *('partial_rotary_factor', 'rope_parameters', 'sliding_window'),
  *('strftime_now', 'test_case', 'instruct_jax', 'weight_map'),
  *('num_correct', 'im_start', 'im_end', 'output_1', 'output_2'),
  *('prompt_template', 'regex_pattern', 'regex_patterns', 'system_prompt'),
  *('completed_by', 'full_conversation', 'user_id', 'post_processor'),
  *('eos_token_id', 'stop_tokens'),
}
# Arguments of functions whose callers check before: a stage never gets there.
_ARGUMENTS = {
  'instruct_jax/data/loader.py': {'num_rows'},
  'instruct_jax/data/hygiene.py': {'prefix_words'},
  'instruct_jax/infra/optimizer.py': {'updates_per_iteration'},
}


def _text(node):
  """The fixed words of an expression; what is filled in is a blank."""
  if isinstance(node, ast.Constant):
    return node.value if isinstance(node.value, str) else ' '
  if isinstance(node, ast.JoinedStr):
    return ''.join(map(_text, node.values))
  if isinstance(node, ast.BinOp):
    return _text(node.left) + _text(node.right)
  if isinstance(node, ast.Call):
    return ' '.join(map(_text, node.args))
  return ' '


def messages():
  """(file, line, text) of every error that the repository raises."""
  for top in ('instruct_jax', 'experiments'):
    for path in sorted((ROOT / top).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
          text = ' '.join(map(_text, node.exc.args))
          yield path.relative_to(ROOT).as_posix(), node.lineno, text


def known_keys():
  known = {'accept_new_inputs', 'num_processes', 'process_id'}
  for _, _, config in all_configs():
    for key in flat(config):
      known |= set(key.split('.'))
  for shape in (TransformerConfig, Rotary):
    known |= {field.name for field in dataclasses.fields(shape)}
  # Flags of the programs, as their parsers spell them.
  for path in (ROOT / 'instruct_jax').rglob('*.py'):
    known |= set(re.findall(r"'--([a-z_]+)'", path.read_text()))
    known |= set(re.findall(r"flags\.DEFINE_\w+\(\s*'(\w+)'", path.read_text()))
  return known


def test_errors_name_keys_that_exist():
  known, wrong, seen = known_keys() | _OF_OTHERS, [], 0
  for file, line, text in messages():
    # Snake case that is no path, no file, no function.
    words = re.findall(
      r'(?<![\w./`-])[a-z]+(?:_[a-z0-9]+)+(?![\w/(`]|\.py|\.json)', text
    )
    seen += len(words)
    unknown = set(words) - known - _ARGUMENTS.get(file, set())
    if unknown:
      wrong.append(f'{file}:{line}: {sorted(unknown)}')
  assert seen > 80
  assert not wrong, '\n'.join(wrong)
