"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from cbam_jax.errors import RunError, UserError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """A name beside `path` to write to, which takes its place at the end unless that is an error.

  Raises:
    RunError: If it cannot be written; what was there before is left as it was.
  """
  path = Path(path)
  with _beside(path) as folder:
    partial = folder / path.name
    yield partial
    with partial.open('rb') as file:
      os.fsync(file.fileno())  # before the new name is on the disk
    os.replace(partial, path)


@contextlib.contextmanager
def whole_folder(
  path: Path, contents: Collection[str], is_ours: Callable[[Path], bool]
) -> Iterator[Path]:
  """A folder beside `path` to write into, which takes its place at the end unless that is an error.

  Args:
    path: Where the folder is to be.
    contents: Names that it may hold already; a folder with others is somebody's, and is left alone.
    is_ours: Whether a folder with such names was written by the caller, for others use them too.

  Raises:
    UserError: If `path` is a file, or a folder with something else in it.
    RunError: If it cannot be written; what was there before is left as it was.
  """
  path = Path(path)
  if path.exists():
    if not path.is_dir():
      raise UserError(f'{path} is a file, where a folder is to be written; choose another name.')
    if others := sorted(entry.name for entry in path.iterdir() if entry.name not in contents):
      raise UserError(
        f'{path} holds {", ".join(others[:5])}, which writing there would lose; choose another '
        'folder, or an empty one.'
      )
    if any(path.iterdir()) and not is_ours(path):
      raise UserError(
        f'{path} holds something else under the names {", ".join(contents)}, which writing there '
        'would lose; choose another folder, or an empty one.'
      )
  with _beside(path) as folder:
    partial = folder / 'new'
    partial.mkdir()
    yield partial
    old = folder / 'old'
    try:
      if path.exists():
        os.replace(path, old)
      os.replace(partial, path)
    except BaseException:
      if os.path.lexists(old):
        os.replace(old, path)  # it would be removed with `folder`
      raise


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
  """A new folder on the disk of `path`, removed at the end with what is left in it."""
  folder = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    yield folder
  except OSError as error:
    raise RunError(
      f'{path} cannot be written ({error}); make room, restore access or choose another place.'
    ) from error
  finally:
    if folder is not None:
      shutil.rmtree(folder, ignore_errors=True)
