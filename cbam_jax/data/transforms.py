"""From a stored record to a training or test image, all in uint8."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cbam_jax.data.images import MOST_PIXELS, Box, decode, decode_box, image_size, resize_bilinear
from cbam_jax.data.randaugment import randaugment
from cbam_jax.errors import check_choice, require

Transform: TypeAlias = Callable[[np.ndarray | bytes, np.random.Generator], np.ndarray]
"""From a record's image, perhaps encoded, to uint8 (H, W, C)."""


RESAMPLINGS = ('bilinear', 'bicubic')


def resize(
  image: np.ndarray,
  height: int,
  width: int,
  box: tuple[int, ...],
  interpolation: str = 'bilinear',
) -> np.ndarray:
  """The (left, top, right, bottom) `box` of `image`, resized with antialiasing."""
  pillow = require('PIL.Image', 'train')
  grey = image.shape[-1] == 1
  picture = pillow.fromarray(image[..., 0] if grey else image)
  resampling = pillow.Resampling[interpolation.upper()]
  resized = np.asarray(picture.resize((width, height), resampling, box=box))
  return resized[..., None] if grey else resized


def random_resized_crop(
  image: np.ndarray | bytes, rng: np.random.Generator, size: int
) -> np.ndarray:
  """A random 8 to 100 % of the area at an aspect of 3/4 to 4/3, resized to `size` (Inception's).

  Of a JPEG file, what is below the crop is not decoded, and a crop of twice `size` or more is
  decoded at a half, a quarter or an eighth. The rest of the way is bilinear interpolation.
  """
  pixels = decode_box(image, _random_box(*image_size(image), rng), size)
  return resize_bilinear(pixels, size, size)


def _random_box(height: int, width: int, rng: np.random.Generator) -> Box:
  """After ten draws that do not fit, the largest centred box within the aspects, as torchvision."""
  for _ in range(10):
    area = height * width * rng.uniform(0.08, 1.0)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  w = min(width, max(1, round(height * 4 / 3)))
  h = min(height, max(1, round(width * 4 / 3)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The image, or with probability one half its mirror image."""
  if rng.random() >= 0.5:
    return image
  # A view with a negative stride takes NumPy 30 times as long to copy into the batch.
  return require('cv2', 'train').flip(image, 1).reshape(image.shape)


def random_shift(image: np.ndarray, rng: np.random.Generator, padding: int) -> np.ndarray:
  """The image moved by up to `padding` pixels along each axis; what comes in is black."""
  height, width, _ = image.shape
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  top, left = rng.integers(2 * padding + 1, size=2)
  return padded[top : top + height, left : left + width]


def centre_crop(
  image: np.ndarray, size: int, resized_side: int, interpolation: str = 'bilinear'
) -> np.ndarray:
  """The shorter side resized to `resized_side`, of at least `size`, then the central square.

  Raises:
    ValueError: If that makes more pixels than any image may have: of a long strip, a small one can.
  """
  height, width, _ = image.shape
  scale = resized_side / min(height, width)
  h, w = max(resized_side, int(height * scale)), max(resized_side, int(width * scale))
  if h * w > MOST_PIXELS:
    raise ValueError(
      f'{height} x {width} pixels come to {h} x {w}, more than the {MOST_PIXELS} allowed'
    )
  image = resize(image, h, w, (0, 0, width, height), interpolation)
  top, left = round((h - size) / 2), round((w - size) / 2)
  return image[top : top + size, left : left + size]


def _none(image: np.ndarray | bytes, rng: np.random.Generator, size: int) -> np.ndarray:
  return decode(image)


def _shift(image: np.ndarray | bytes, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_shift(decode(image), rng, padding=size // 8)


def _shift_flip(image: np.ndarray | bytes, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_flip(_shift(image, rng, size), rng)


def _crop_flip(image: np.ndarray | bytes, rng: np.random.Generator, size: int) -> np.ndarray:
  return random_flip(random_resized_crop(image, rng, size), rng)


def _crop_flip_randaugment(
  image: np.ndarray | bytes, rng: np.random.Generator, size: int
) -> np.ndarray:
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
  """What is done to the image of a training record.

  Args:
    augmentation: A name of `AUGMENTATIONS`.
    size: Side of the result, pixels.
  """
  check_choice('the augmentation', augmentation, AUGMENTATIONS)
  return functools.partial(AUGMENTATIONS[augmentation], size=size)
