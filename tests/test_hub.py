"""Pushing models: what a local stand-in for the Hub gets, and what it refuses.

The files are small enough for the commit itself. How the Hub takes large files
(LFS, Xet) is the business of huggingface_hub.
"""

import dataclasses
import json
import shlex
import subprocess
import sys

import huggingface_hub
import jax
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import recipe as recipe_config
from instruct_jax import export, hub, model_fns, model_folder
from instruct_jax.data import tokenizer as tokenizer_lib
from instruct_jax.evals import figures
from instruct_jax.evals.preference_accuracy import Accuracy
from instruct_jax.infra import sharding
from instruct_jax.jobs import export_models
from tests import fake_hub, test_export

pytestmark = pytest.mark.usefixtures('quick_compile')

RATE = {'rate': 0.625, 'low': 0.5, 'high': 0.75, 'num_prompts': 40}
RUN = {
  'stages': {
    'sft': {'experiment': 'sft', 'init': 'hf:org/small'},
    'ppo': {'experiment': 'ppo_ptx', 'init': '/sft/model'},
    'reward': {'experiment': 'reward', 'init': '/sft/model'},
    'evaluate': {
      'experiment': 'evaluate',
      'models': 'pretrained=hf:org/small,sft=/sft/model,ppo=/ppo/policy',
      'other_models': '',
      'reward_model': '/reward/model',
    },
  }
}
REWARD = figures.RewardFigures(
  rankings={
    name: figures.Rankings(
      {'judge': Accuracy(0.9, 0.8, 1.0, 50, 0.2), 'reward model': found}
    )
    for name, found in (
      ('training labelers', Accuracy(0.7, 0.6, 0.8, 50, 0.6)),
      ('held-out labelers', Accuracy(0.65, 0.5, 0.8, 20, 0.6)),
    )
  }
)
SUMMARY = {
  'baseline': 'sft',
  'judge': 'a judge',
  'everyone': {'sft': {'win rate': {**RATE, 'rate': 0.5}}, 'ppo': {}},
  'intervals': {'reward_model': dataclasses.asdict(REWARD)},
}
SUMMARY['everyone']['ppo']['win rate'] = RATE


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run with a policy and a reward model, evaluated."""
  folder = tmp_path_factory.mktemp('run')
  tokenizer = tokenizer_lib.train_word_level(['a', 'b', 'c', 'd'])
  tokenizer.save(folder / 'data' / 'tokenizer')
  mesh = sharding.make_mesh((1, -1, 1))
  for kind, name in (('policy', 'ppo/policy'), ('scalar', 'reward/model')):
    model = model_fns.init(kind, test_export.CONFIG, mesh, jax.random.key(0))
    about = {'stage': name.split('/')[0], 'from': '/home/ann/secret'}
    about |= {'centred': 'hf:/home/ann/secret', 'begun': 'hf:org/small'}
    model_folder.save(folder / name, model, tokenizer, about)
  (folder / 'config.json').write_text(json.dumps(RUN))
  (folder / 'summary.json').write_text(json.dumps(SUMMARY))
  (folder / 'model_card.md').write_text('# Of the run\n')
  return folder


@pytest.fixture
def server(monkeypatch):
  with fake_hub.serve() as found:
    monkeypatch.setenv('HF_ENDPOINT', found.url)
    # Cards are checked where the package was told to as it was imported.
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', found.url)
    monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
    yield found


def command(run, output, *more, model='ppo/policy'):
  return export.main(
    [
      f'--checkpoint={run / model}',
      f'--tokenizer={run / "data/tokenizer"}',
      f'--output={output}',
      *more,
    ]
  )


def card_of(server, name):
  content = server.pushed(name)['README.md'].decode()
  # The Hub was asked whether it understands the front matter.
  assert content in server.cards
  return huggingface_hub.ModelCard(content)


# --- What arrives -------------------------------------------------------------


def test_nothing_is_sent_without_the_flag(run, server, tmp_path):
  command(run, tmp_path / 'out')
  assert (tmp_path / 'out' / 'model.safetensors').exists()
  assert not server.requests


def test_the_folder_arrives_whole_private_and_in_one_commit(
  run, server, tmp_path, capsys
):
  out = tmp_path / 'out'
  command(run, out, '--push_to=hf:small', '--license=apache-2.0')
  repo = server.repos['ann/small']
  assert repo['private']
  assert server.pushed('ann/small') == {
    path.relative_to(out).as_posix(): path.read_bytes()
    for path in out.rglob('*')
    if path.is_file()
  }
  commits = [path for _, path in server.requests if '/commit/' in path]
  assert len(commits) == 1
  assert capsys.readouterr().out.split() == [
    str(out),
    f'{server.url}/ann/small',
  ]
  for content in server.pushed('ann/small').values():
    assert str(run).encode() not in content and b'/home/' not in content


def test_an_organisation_and_everyone_who_is_asked_for(run, server, tmp_path):
  command(run, tmp_path / 'out', '--push_to=hf:lab/small', '--public')
  assert list(server.repos) == ['lab/small']
  assert not server.repos['lab/small']['private']


def test_the_card_of_a_policy(run, server, tmp_path):
  command(run, tmp_path / 'out', '--push_to=hf:small', '--datasets=a/b, c/d')
  card = card_of(server, 'ann/small')
  assert card.data.base_model == 'org/small'  # By the run's config.json.
  assert card.data.datasets == ['a/b', 'c/d']
  assert card.data.license == 'unknown'
  assert card.data.library_name == 'transformers'
  assert card.data.pipeline_tag == 'text-generation'
  assert card.data.tags == ['instruct_jax', 'rlhf', 'ppo']
  (result,) = card.data.eval_results
  assert (result.metric_type, result.metric_value) == ('win_rate', 0.625)
  assert result.metric_args == {'low': 0.5, 'high': 0.75}
  # The run's own prompts, whatever taught the model; the name on the Hub.
  assert result.dataset_type == 'preferences'
  assert result.dataset_name == 'held-out prompts of the run'
  assert card.data.model_name == 'small'
  assert '# small' in card.text.splitlines()
  assert '"begun": "hf:org/small"' in card.text
  text = 'Win rate against sft, by a judge: 0.625 [0.500, 0.750]'
  assert text in card.text


def test_the_card_of_a_reward_model(run, server, tmp_path):
  more = ('--base_model=org/other', '--license=mit')
  out = tmp_path / 'out'
  command(run, out, '--push_to=hf:small', *more, model='reward/model')
  card = card_of(server, 'ann/small')
  assert (card.data.base_model, card.data.license) == ('org/other', 'mit')
  assert card.data.pipeline_tag == 'text-classification'
  assert card.data.metrics == ['accuracy']
  first, second = card.data.eval_results
  assert (first.metric_type, first.metric_value) == ('accuracy', 0.7)
  assert second.metric_args == {'low': 0.5, 'high': 0.8}
  assert 'pairs, held-out labelers: 0.650 [0.500, 0.800]' in card.text
  assert 'score_shift' in card.text


def test_a_model_without_a_run_has_a_card_too(run, tmp_path):
  """Nothing was measured, and nothing is claimed."""
  place = tmp_path / 'alone' / 'policy'
  place.parent.mkdir()
  (run / 'ppo' / 'policy').rename(place)
  try:
    export.export(place, run / 'data/tokenizer', tmp_path / 'out')
  finally:
    place.rename(run / 'ppo' / 'policy')
  data = huggingface_hub.ModelCard.load(tmp_path / 'out' / 'README.md').data
  assert data.base_model is None and data.eval_results is None


# --- What is refused ----------------------------------------------------------


def refused(run, tmp_path, target):
  """The one line of an export that is refused before anything is written."""
  with pytest.raises(ValueError) as error:
    command(run, tmp_path / 'out', f'--push_to={target}')
  assert not (tmp_path / 'out').exists()
  assert '\n' not in str(error.value)
  return str(error.value)


def test_no_token(run, server, tmp_path, monkeypatch):
  monkeypatch.delenv('HF_TOKEN')
  monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
  path = str(tmp_path / 'token')
  monkeypatch.setattr(huggingface_hub.constants, 'HF_TOKEN_PATH', path)
  assert refused(run, tmp_path, 'hf:small') == (
    'hf:small: there is no token; log in by `hf auth login`, or set HF_TOKEN'
  )
  assert not server.requests


def test_a_wrong_token(run, server, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_bad')
  message = refused(run, tmp_path, 'hf:small')
  assert message.startswith('hf:small: the token is not accepted; log in')


def test_no_network(run, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
  message = refused(run, tmp_path, 'hf:small')
  assert message.startswith('hf:small: the Hub does not answer (ConnectError')


def test_names_that_are_taken_or_not_ours(run, server, tmp_path):
  server.add('ann/small', **{'config.json': b'{}'})
  assert 'ann/small exists already' in refused(run, tmp_path, 'hf:small')
  message = refused(run, tmp_path, 'hf:bob/small')
  assert 'the token belongs to ann, lab, guests, not to bob' in message
  assert 'hf:ann/small' in message
  assert 'hf:NAME or hf:OWNER' in refused(run, tmp_path, 'small')
  assert 'hf:NAME or hf:OWNER' in refused(run, tmp_path, 'hf:a/b/c')
  assert 'hf:a..b: ' in refused(run, tmp_path, 'hf:a..b')


def scoped(name, permission):
  entity = {'_id': '0', 'type': 'user', 'name': name}
  scope = {'entity': entity, 'permissions': ['repo.content.read', permission]}
  return {'role': 'fineGrained', 'fineGrained': {'scoped': [scope]}}


@pytest.mark.parametrize(
  ('token', 'target'),
  [
    ({'role': 'read'}, 'hf:small'),
    ({'role': 'write'}, 'hf:guests/small'),
    (scoped('ann', 'discussion.write'), 'hf:small'),
    (scoped('lab', 'repo.write'), 'hf:small'),
  ],
)
def test_a_token_that_only_reads(
  run, server, tmp_path, monkeypatch, token, target
):
  server.tokens['hf_other'] = token
  monkeypatch.setenv('HF_TOKEN', 'hf_other')
  message = refused(run, tmp_path, target)
  assert message.endswith('may not write there; take one with write access')


@pytest.mark.parametrize('place', ['ann', 'ann/small'])
def test_a_token_for_writing_there_is_enough(
  server, tmp_path, monkeypatch, place
):
  server.tokens['hf_other'] = scoped(place, 'repo.write')
  monkeypatch.setenv('HF_TOKEN', 'hf_other')
  assert hub.check_push('hf:small') == 'ann/small'


def test_a_licence_that_the_hub_does_not_know(run, server, tmp_path):
  with pytest.raises(ValueError) as error:
    command(run, tmp_path / 'out', '--push_to=hf:small', '--license=Apache-2')
  assert 'the card: ' in str(error.value)
  assert '"license" must be one of' in str(error.value).replace('\\', '')
  assert not (tmp_path / 'out').exists() and not server.repos


def test_an_answer_that_is_no_answer(run, server, tmp_path, monkeypatch):
  """Of a proxy, or of a Hub in trouble; a run that goes on does not mind."""
  server.fail['/api/models/ann/x-ppo'] = 502
  message = refused(run, tmp_path, 'hf:x-ppo')
  assert message.startswith('hf:x-ppo: HfHubHTTPError')
  config = stage(run, push_to='hf:x', workdir=str(tmp_path), name='export')
  with pytest.raises(hub.NoAnswerError):
    export_models.validate(config)
  (tmp_path / 'config.json').write_text('{}')
  export_models.validate(config)
  server.page = b'<html>Log in</html>'
  message = refused(run, tmp_path, 'hf:small')
  assert message.startswith('hf:small: the Hub does not answer (JSONDecodeErr')


def test_an_empty_repository_is_taken_unless_others_see_it(
  run, server, tmp_path
):
  server.add('ann/open', private=False)
  message = refused(run, tmp_path, 'hf:open')
  assert 'ann/open exists and is public' in message
  server.add('ann/secret')
  with pytest.raises(ValueError, match='ann/secret exists and is private'):
    command(run, tmp_path / 'no', '--push_to=hf:secret', '--public')
  server.add('ann/closed')
  command(run, tmp_path / 'out', '--push_to=hf:closed')
  assert 'README.md' in server.pushed('ann/closed')


def test_a_refused_upload_leaves_the_folder(run, server, tmp_path, capsys):
  """And the command that goes on, which keeps it private."""
  out = tmp_path / 'out'
  server.fail['/commit/main'] = 500
  again = f'continue with `hf upload ann/small {out} --private`'
  with pytest.raises(ValueError, match=f'{out} is complete; {again}'):
    command(run, out, '--push_to=hf:small')
  assert again in capsys.readouterr().err
  assert (out / 'README.md').exists()
  assert not server.pushed('ann/small')
  server.fail.clear()
  cli = [sys.executable, '-m', 'huggingface_hub.cli.hf']
  words = [*cli, *shlex.split(again.split('`')[1])[1:]]
  subprocess.run(words, check=True, capture_output=True)
  assert server.repos['ann/small']['private']
  assert 'model.safetensors' in server.pushed('ann/small')


def test_flags_that_need_each_other(run, tmp_path, capsys):
  for more in (['--public'], ['--push_to=hf:x', '--output=gs://b/x']):
    with pytest.raises(SystemExit):
      command(run, tmp_path / 'out', *more)
    assert 'push_to' in capsys.readouterr().err


# --- The stage of the recipe --------------------------------------------------


def stage(run, **changes) -> ConfigDict:
  config = recipe_config.export_stage(0, str(run))
  config.tokenizer = str(run / 'data' / 'tokenizer')
  config.models = f'ppo={run}/ppo/policy,reward={run}/reward/model'
  config.update(changes)
  return config


def test_the_recipe_has_the_keys_at_its_top():
  config = recipe_config.get_config('smoke')
  assert config.push_to == '' and not config.public
  config.push_to, config.license = 'hf:lab/x', 'mit'
  export_stage = config.stages.export
  assert (export_stage.push_to, export_stage.license) == ('hf:lab/x', 'mit')


def test_each_model_of_a_run_goes_to_its_own_repository(run, server, tmp_path):
  config = stage(run, push_to='hf:lab/x', datasets='a/b', license='mit')
  written = export_models.run(config, epath.Path(tmp_path))
  assert written == {
    'ppo': f'{server.url}/lab/x-ppo',
    'reward': f'{server.url}/lab/x-reward',
  }
  assert all(repo['private'] for repo in server.repos.values())
  assert card_of(server, 'lab/x-ppo').data.license == 'mit'
  assert server.pushed('lab/x-reward')['model_card.md'] == b'# Of the run\n'


def test_without_the_key_nothing_is_sent(run, server, tmp_path):
  written = export_models.run(stage(run), epath.Path(tmp_path))
  assert written['ppo'] == str(tmp_path / 'ppo')
  assert not server.requests
  assert not (tmp_path / 'ppo' / 'model_card.md').exists()


def test_a_stage_that_was_cut_pushes_again_to_its_own(run, server, tmp_path):
  """But not to what was there before."""
  config = stage(run, push_to='hf:x', workdir=str(tmp_path), name='export')
  workdir = epath.Path(tmp_path / 'export')
  server.fail['/ann/x-reward/commit/main'] = 500
  with pytest.raises(ValueError, match='hf:x-reward: HfHubHTTPError'):
    export_models.run(config, workdir)
  server.fail.clear()
  first = dict(server.pushed('ann/x-ppo'))
  export_models.validate(config)  # As the same command does first.
  export_models.run(config, workdir)
  assert server.pushed('ann/x-ppo') == first
  assert server.pushed('ann/x-reward')
  (workdir / export_models.PUSHED_FILE).unlink()
  with pytest.raises(ValueError, match='ann/x-ppo exists already'):
    export_models.validate(config)
  # A stage that is done needs no answer.
  (workdir / 'done.json').write_text('{}')
  export_models.validate(config)


def test_where_a_model_began(tmp_path):
  """Through runs of one stage each, to the name on the Hub."""
  for name, init in (('sft', 'hf:org/small'), ('ppo', tmp_path / 'sft/model')):
    (tmp_path / name / 'model').mkdir(parents=True)
    config = {'name': name, 'experiment': name, 'init': str(init)}
    (tmp_path / name / 'config.json').write_text(json.dumps(config))
  assert export.base_of(str(tmp_path / 'ppo' / 'model')) == 'org/small'
  assert export.base_of('hf:org/small') == 'org/small'
  assert export.base_of(f'hf:{tmp_path}') == ''
