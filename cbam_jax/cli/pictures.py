"""The pictures that a subcommand is given: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from cbam_jax.data.folder import SUFFIXES
from cbam_jax.errors import UserError


def find_pictures(names: Sequence[str]) -> list[Path]:
  """The files that `names` stand for: files, folders (all pictures below them) and patterns.

  Raises:
    UserError: If a name stands for none.
  """
  found: list[Path] = []
  for name in names:
    path = Path(name).expanduser()
    if path.is_dir():
      files = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES)
    elif path.exists():
      files = [path]
    else:
      files = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not files:
      raise UserError(
        f'{name!r} is no file, and no folder or pattern of pictures '
        f'({", ".join(sorted(SUFFIXES))}); name one that exists.'
      )
    found += files
  return list(dict.fromkeys(found))
