"""Models on the Hugging Face Hub: locating their local files, and pushing."""

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator

from etils import epath

from instruct_jax import command, files

# Files of a model's description, without its weights.
_DESCRIPTION = ('*.json', '*.jinja', '*.txt', '*.model')
_PATTERNS = (*_DESCRIPTION, '*.safetensors')
# Further copies of the weights in their authors' own format, and subfolders.
_IGNORED = ('consolidated*', '*/*')


def locate(name: str, patterns: tuple[str, ...] = _PATTERNS) -> pathlib.Path:
  """The local folder of a model.

  Models in a store or on the Hub are copied once.

  Args:
    name: a path, which may be in a store (gs://); or `hf:` and a folder or the
      name of a repository on the Hugging Face Hub, such as hf:gpt2.
    patterns: patterns of the files to download; by default without pickled
      weights.

  Raises:
    FileNotFoundError: no such folder in a store.
    ValueError: no such folder or repository, no access to it, or no network.
  """
  if files.is_remote(name):
    return files.local_folder(name, patterns)
  if not name.startswith('hf:'):
    return pathlib.Path(name)
  name = name.removeprefix('hf:')
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name,
        allow_patterns=list(patterns),
        ignore_patterns=list(_IGNORED),
      )
    )
  except errors.GatedRepoError as error:
    raise ValueError(
      f'hf:{name}: its authors ask users to accept conditions first; do so at '
      f'https://huggingface.co/{name}, then log in by `hf auth login` or set '
      'HF_TOKEN'
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise ValueError(
      f'hf:{name}: no such folder here and no such model on the Hub, or a '
      'private one; fix the name, or log in by `hf auth login`'
    ) from error
  # Bad names and network failures raise unrelated exception types.
  except Exception as error:
    raise ValueError(
      f'hf:{name}: no such folder here, and the download failed '
      f'({command.one_line(error)}); give the folder of a copy'
    ) from error


def locate_description(name: str) -> pathlib.Path:
  """`locate`, but does not download the weights of `hf:NAME`."""
  return locate(name, _DESCRIPTION if name.startswith('hf:') else _PATTERNS)


# --- Pushing ------------------------------------------------------------------

# HTTP status of a request that the Hub refuses -> message.
_REFUSED = {
  401: 'the token is not accepted; log in by `hf auth login`, or fix HF_TOKEN',
  403: 'the token may not write there; take one with write access',
  409: 'that name is taken; choose another one',
}


class NoAnswerError(ValueError):
  """The Hub does not answer, or is temporarily unavailable."""


def check_push(target: str, private: bool = True, is_ours: bool = False) -> str:
  """Asks the Hub whether a model could be pushed, before compute is spent.

  Args:
    target: hf:NAME, or hf:OWNER/NAME of an organisation.
    private: whether the repository is private.
    is_ours: whether this run may have pushed to it before.

  Returns:
    The repository, OWNER/NAME; it does not exist, is empty or is ours.

  Raises:
    NoAnswerError: no network, or the Hub is down.
    ValueError: no token, a read-only token, a name that is taken, or an owner
      that the token does not belong to.
  """
  from huggingface_hub import errors

  match = re.fullmatch(r'hf:(?:([\w.-]+)/)?([\w.-]+)', target)
  if match is None:
    raise ValueError(f'push_to must be hf:NAME or hf:OWNER/NAME: {target!r}')
  owner, name = match[1] or '', match[2]
  api = _api()
  with _told(target):
    user = api.whoami(cache=True)  # The Hub limits the rate of this request.
    own = [user['name'], *(each['name'] for each in user.get('orgs', ()))]
    if owner and owner not in own:
      raise ValueError(
        f'the token belongs to {", ".join(own)}, not to {owner}; use '
        f'hf:{own[0]}/{name}'
      )
    owner = owner or own[0]
    repository = f'{owner}/{name}'
    if not _may_write(user, owner, repository):
      raise ValueError(_REFUSED[403])
    try:
      found = api.model_info(repository)
    except errors.RepositoryNotFoundError:
      return repository
    holds = {x.rfilename for x in found.siblings or ()} - {'.gitattributes'}
    if holds and not is_ours:
      raise ValueError(f'{repository} exists already; choose another name')
    if found.private != private:
      seen = 'private' if found.private else 'public'
      raise ValueError(f'{repository} exists and is {seen}; take another name')
  return repository


def check_card(front: str) -> None:
  """Asks the Hub whether it accepts a card's front matter.

  Raises:
    ValueError: it does not, for instance because of an unknown licence; or it
      does not answer.
  """
  import huggingface_hub

  with _told('the card'):
    huggingface_hub.ModelCard(f'---\n{front}\n---\n').validate()


def _may_write(user, owner, repository) -> bool:
  """Whether the token, as the Hub describes it, may write there."""
  token = (user.get('auth') or {}).get('accessToken') or {}
  if token.get('role') == 'fineGrained':
    scopes = (token.get('fineGrained') or {}).get('scoped') or ()
    return any(
      (scope.get('entity') or {}).get('name') in (owner, repository)
      and 'repo.write' in (scope.get('permissions') or ())
      for scope in scopes
    )
  places = {
    each['name']: each.get('roleInOrg') for each in user.get('orgs', ())
  }
  return 'read' not in (token.get('role'), places.get(owner))


def push(
  folder: epath.PathLike,
  target: str,
  private: bool = True,
  is_ours: bool = False,
) -> str:
  """Uploads a folder as one commit, and creates the repository if needed.

  Args:
    folder: of the model; in a store, its subfolders are left out.
    target, private, is_ours: see `check_push`.

  Returns:
    The URL of the repository.

  Raises:
    ValueError: see `check_push`; or the Hub refuses the content.
  """
  import huggingface_hub

  repository = check_push(target, private, is_ours)
  place = pathlib.Path(folder)
  if files.is_remote(folder):
    place = files.local_folder(folder, ('*',))
  with _told(target):
    api = _api()
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.create_commit(
      repository,
      [
        huggingface_hub.CommitOperationAdd(
          path.relative_to(place).as_posix(), path
        )
        for path in sorted(place.rglob('*'))
        if path.is_file()
      ],
      commit_message='Model and card',
    )
  return str(address)


def _api():
  # huggingface_hub itself reads the variable only when it is imported.
  return _api_at(os.environ.get('HF_ENDPOINT'))


@functools.cache
def _api_at(endpoint):
  import huggingface_hub

  return huggingface_hub.HfApi(endpoint=endpoint)


@contextlib.contextmanager
def _told(target: str) -> Iterator[None]:
  """Turns errors of the Hub into one line."""
  from huggingface_hub import errors

  try:
    yield
  except errors.LocalTokenNotFoundError as error:
    raise ValueError(
      f'{target}: there is no token; log in by `hf auth login`, or set HF_TOKEN'
    ) from error
  except errors.HfHubHTTPError as error:
    code = error.response.status_code
    told = _REFUSED.get(code) or command.one_line(error)
    kind = NoAnswerError if code == 429 or code >= 500 else ValueError
    raise kind(f'{target}: {told}') from error
  # No network, a proxy or a broken answer: the exception types are unrelated.
  except Exception as error:
    if isinstance(error, ValueError) and not isinstance(
      error, json.JSONDecodeError
    ):
      text = ' '.join(str(error).split())[:300]
      raise ValueError(f'{target}: {text}') from error
    raise NoAnswerError(
      f'{target}: the Hub does not answer ({command.one_line(error)}); fix '
      'the network, or leave push_to out'
    ) from error
