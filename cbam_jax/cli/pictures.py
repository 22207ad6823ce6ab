"""The pictures that a subcommand is given: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax.data.folder import SUFFIXES
from cbam_jax.data.images import decode
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError, first_line, require


class Picture(NamedTuple):
  """A picture that could be read, or why it could not.

  Attributes:
    path: Its file.
    pixels: The whole of it, uint8 (H, W, 1 or 3); None if it could not be read.
    seen: What a network sees of it, uint8 (h, w, C); None likewise.
    error: Why it could not be read; empty if it could.
  """

  path: Path
  pixels: np.ndarray | None
  seen: np.ndarray | None
  error: str


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


def read_picture(path: Path, preprocessing: Preprocessing) -> Picture:
  """Reads a picture, and says why where that cannot be done."""
  try:
    pixels = decode(path.read_bytes())
    return Picture(path, pixels, preprocessing(pixels), '')
  except UserError:
    raise
  except Exception as error:  # Pillow raises nearly anything on a damaged file
    # Of what it cannot identify, Pillow tells the object in memory.
    unknown = isinstance(error, require('PIL', 'train').UnidentifiedImageError)
    reason = 'it is no picture of a known kind' if unknown else first_line(error)
    return Picture(path, None, None, reason)
