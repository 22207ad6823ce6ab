"""RandAugment (Cubuk et al., 2020): a few random operations on each training image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cbam_jax.errors import require

# Pictures are moved and turned over the mean of ImageNet's, or over its grey.
FILLS = {'RGB': (124, 116, 104), 'L': 117}


def randaugment(
  image: np.ndarray, rng: np.random.Generator, operations: int = 2, magnitude: float = 9.0
) -> np.ndarray:
  """Applies `operations` drawn at random, each at `magnitude` of 10 (sign at random).

  Args:
    image: uint8 (H, W, 3), or (H, W, 1) if grey.
    rng: Source of the draws.
    operations: How many are applied, one after the other.
    magnitude: Strength, 0 to 10.

  Returns:
    The image, of the same shape and type.
  """
  pillow = require('PIL.Image', 'train')
  grey = image.shape[-1] == 1
  picture = pillow.fromarray(image[..., 0] if grey else image)
  for choice in rng.integers(len(OPERATIONS), size=operations):
    strength = magnitude / 10
    sign = 1 if rng.random() < 0.5 else -1
    picture = OPERATIONS[choice](picture, strength, sign)
  result = np.asarray(picture)
  return result[..., None] if grey else result


def _enhance(name: str) -> Callable[[Any, float, int], Any]:
  def apply(picture: Any, strength: float, sign: int) -> Any:
    enhancer = getattr(require('PIL.ImageEnhance', 'train'), name)
    return enhancer(picture).enhance(1 + 0.9 * strength * sign)

  return apply


def _affine(*rows: float) -> Callable[[Any, float, int], Any]:
  """An affine map whose coefficients (a, b, c, d, e, f) are these times the strength, plus one."""

  def apply(picture: Any, strength: float, sign: int) -> Any:
    pillow = require('PIL.Image', 'train')
    width, height = picture.size
    scale = (1, 1, width, 1, 1, height)
    moved = [row * size * strength * sign for row, size in zip(rows, scale, strict=True)]
    identity = (1, 0, 0, 0, 1, 0)
    matrix = [one + move for one, move in zip(identity, moved, strict=True)]
    return picture.transform(
      picture.size,
      pillow.Transform.AFFINE,
      matrix,
      pillow.Resampling.BILINEAR,
      fillcolor=FILLS[picture.mode],
    )

  return apply


def _rotate(picture: Any, strength: float, sign: int) -> Any:
  pillow = require('PIL.Image', 'train')
  return picture.rotate(
    30 * strength * sign, pillow.Resampling.BILINEAR, fillcolor=FILLS[picture.mode]
  )


def _ops(name: str, *fixed: Any) -> Callable[[Any, float, int], Any]:
  def apply(picture: Any, strength: float, sign: int) -> Any:
    return getattr(require('PIL.ImageOps', 'train'), name)(picture, *fixed)

  return apply


def _posterize(picture: Any, strength: float, sign: int) -> Any:
  return require('PIL.ImageOps', 'train').posterize(picture, 8 - round(4 * strength))


def _solarize(picture: Any, strength: float, sign: int) -> Any:
  return require('PIL.ImageOps', 'train').solarize(picture, 256 - round(256 * strength))


def _identity(picture: Any, strength: float, sign: int) -> Any:
  return picture


OPERATIONS: tuple[Callable[[Any, float, int], Any], ...] = (
  _identity,
  _ops('autocontrast'),
  _ops('equalize'),
  _rotate,
  _solarize,
  _posterize,
  _enhance('Color'),
  _enhance('Contrast'),
  _enhance('Brightness'),
  _enhance('Sharpness'),
  _affine(0, 0.3, 0, 0, 0, 0),  # shear x
  _affine(0, 0, 0, 0.3, 0, 0),  # shear y
  _affine(0, 0, 0.45, 0, 0, 0),  # translate x
  _affine(0, 0, 0, 0, 0, 0.45),  # translate y
)
"""The paper's fourteen; each takes a picture, a strength from 0 to 1 and a sign."""
