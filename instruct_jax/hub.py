"""Where the files of a published model or tokenizer lie on this machine."""

import pathlib

from instruct_jax import files

_PATTERNS = ('*.json', '*.jinja', '*.safetensors', '*.txt', '*.model')
# The same weights once more, in their authors' own format.
_IGNORED = ('consolidated*', '*/*')


def locate(name: str, patterns: tuple[str, ...] = _PATTERNS) -> pathlib.Path:
  """The local folder of `hf:NAME`, of gs:// (each copied once) or of a path.

  Args:
    name: `hf:` before a folder or the name of a repository on the Hugging Face
      hub, such as hf:gpt2; or a path.
    patterns: of the files to download. Pickled weights are never among them.

  Raises:
    FileNotFoundError: no such folder in a store.
    ValueError: no such folder or repository, or no network.
  """
  if files.is_remote(name):
    return files.local_folder(name, patterns)
  if not name.startswith('hf:'):
    return pathlib.Path(name)
  name = name.removeprefix('hf:')
  if pathlib.Path(name).is_dir():
    return pathlib.Path(name)
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name,
        allow_patterns=list(patterns),
        ignore_patterns=list(_IGNORED),
      )
    )
  # Bad names, unknown repositories, no network: unrelated exception types.
  except Exception as error:
    raise ValueError(
      f'hf:{name}: no such folder here, and it does not download '
      f'({type(error).__name__}: {" ".join(str(error).split())}); give the '
      'folder of a copy'
    ) from error
