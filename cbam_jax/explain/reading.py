"""Picture files as a network sees them, and what to call them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax.data.images import decode
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError, first_line, require


class Picture(NamedTuple):
  """A picture that could be read, or why it could not.

  Attributes:
    path: Its file.
    size: Height and width of what is stored, pixels; zeros if it could not be read.
    seen: What a network sees of it, uint8 (h, w, C); None likewise.
    error: Why it could not be read; empty if it could.
  """

  path: Path
  size: tuple[int, int]
  seen: np.ndarray | None
  error: str


def read_picture(path: Path, preprocessing: Preprocessing) -> Picture:
  """Reads a picture, and says why where that cannot be done."""
  try:
    pixels = decode(path.read_bytes())
  except UserError:
    raise
  except Exception as error:  # Pillow raises nearly anything on a damaged file
    # Of what it cannot identify, Pillow tells the object in memory.
    unknown = isinstance(error, require('PIL', 'train').UnidentifiedImageError)
    reason = 'it is no picture of a known kind' if unknown else first_line(error)
    return Picture(path, (0, 0), None, reason)
  height, width, _ = pixels.shape
  try:
    seen = preprocessing(pixels)
  except UserError:
    raise
  except ValueError as error:  # of a strip so long that resizing it would fill the memory
    return Picture(path, (0, 0), None, first_line(error))
  return Picture(path, (height, width), seen, '')


def shown(path: str | Path) -> str:
  """A path as text that any file can hold: its name may be bytes that are no UTF-8."""
  return os.fsencode(path).decode('utf-8', 'replace')
