"""From a stored record to a training or test image, all in uint8."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cbam_jax.data.randaugment import randaugment
from cbam_jax.errors import check_choice, require

Transform: TypeAlias = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def decode(image: np.ndarray | bytes) -> np.ndarray:
  """The pixels of a record's image, uint8 (H, W, C); encoded files become RGB."""
  if isinstance(image, np.ndarray):
    return image
  pillow = require('PIL.Image', 'train')
  with pillow.open(io.BytesIO(image)) as picture:
    if picture.mode == 'P':  # Pillow warns of a palette's transparency unless it is kept at first
      return np.asarray(picture.convert('RGBA').convert('RGB'))
    return np.asarray(picture.convert('RGB'))


def resize(image: np.ndarray, height: int, width: int, box: tuple[int, ...]) -> np.ndarray:
  """The (left, top, right, bottom) `box` of `image`, resized bilinearly with antialiasing."""
  pillow = require('PIL.Image', 'train')
  grey = image.shape[-1] == 1
  picture = pillow.fromarray(image[..., 0] if grey else image)
  resized = np.asarray(picture.resize((width, height), pillow.Resampling.BILINEAR, box=box))
  return resized[..., None] if grey else resized


def random_resized_crop(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  """A random 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to `size` (Inception's).

  After ten draws that do not fit, the largest centred crop within those aspects, as torchvision.
  """
  height, width, _ = image.shape
  for _ in range(10):
    area = height * width * rng.uniform(0.08, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return resize(image, size, size, (left, top, left + w, top + h))
  w = min(width, max(1, round(height * 4 / 3)))
  h = min(height, max(1, round(width * 4 / 3)))
  left, top = (width - w) // 2, (height - h) // 2
  return resize(image, size, size, (left, top, left + w, top + h))


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The image, or with probability one half its mirror image."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def random_shift(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
  """The image moved by up to `padding` pixels along each axis; what comes in is black."""
  height, width, _ = image.shape
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  top, left = rng.integers(2 * padding + 1, size=2)
  return padded[top : top + height, left : left + width]


def centre_crop(image: np.ndarray, size: int, resized_side: int) -> np.ndarray:
  """The shorter side resized to `resized_side`, of at least `size`, then the central square."""
  height, width, _ = image.shape
  scale = resized_side / min(height, width)
  h, w = max(resized_side, int(height * scale)), max(resized_side, int(width * scale))
  image = resize(image, h, w, (0, 0, width, height))
  top, left = round((h - size) / 2), round((w - size) / 2)
  return image[top : top + size, left : left + size]


def _none(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  return image


def _shift(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_shift(image, rng, padding=size // 8)


def _shift_flip(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_flip(_shift(image, rng, size), rng)


def _crop_flip(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_flip(random_resized_crop(image, rng, size), rng)


def _crop_flip_randaugment(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
  return randaugment(_crop_flip(image, rng, size), rng)


AUGMENTATIONS: dict[str, Callable[..., np.ndarray]] = {
  'none': _none,
  'shift': _shift,
  'shift_flip': _shift_flip,
  'crop_flip': _crop_flip,
  'crop_flip_randaugment': _crop_flip_randaugment,
}
"""By name: 'shift' moves by up to an 8th of the side, 'crop_flip' is ImageNet's, the last adds
RandAugment to it."""


def train_transform(augmentation: str, size: int) -> Transform:
  """What is done to a decoded training image.

  Args:
    augmentation: A name of `AUGMENTATIONS`.
    size: Side of the result, pixels.
  """
  check_choice('the augmentation', augmentation, AUGMENTATIONS)
  return functools.partial(AUGMENTATIONS[augmentation], size=size)


def eval_transform(size: int, resized_side: int | None) -> Transform:
  """What is done to a decoded test image: nothing, or a resize and a central crop.

  Args:
    size: Side of the result, pixels.
    resized_side: What the shorter side is resized to first; None leaves the image alone.
  """

  def transform(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    del rng
    return image if resized_side is None else centre_crop(image, size, resized_side)

  return transform
