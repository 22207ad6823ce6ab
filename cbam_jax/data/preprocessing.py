"""From a picture to what a network takes: resize, central crop, normalisation."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.data.images import decode
from cbam_jax.data.transforms import RESAMPLINGS, centre_crop, resize
from cbam_jax.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What is done to a picture before a network sees it; the defaults are torchvision's ImageNet.

  Attributes:
    image_size: Side of the central square that is cut out, pixels.
    resized_side: What the shorter side is resized to before, at least `image_size`; None resizes
      the whole picture to the square.
    interpolation: How: 'bilinear' or 'bicubic', antialiased.
    mean: Of each channel, on pixels in [0, 1]; one number for grey images, three for colour.
    std: Likewise.

  Raises:
    UserError: On a side that is no whole number of at least 1, a crop larger than what it is cut
      from, an unknown interpolation, or a mean and std that are not one or three numbers each, std
      not zero.
  """

  image_size: int = 224
  resized_side: int | None = 256
  interpolation: str = 'bilinear'
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)

  def __post_init__(self) -> None:
    check_choice('the interpolation', self.interpolation, RESAMPLINGS)
    for name in ('mean', 'std'):  # JSON has lists alone
      object.__setattr__(self, name, tuple(getattr(self, name)))
    sides = (self.image_size, self.image_size if self.resized_side is None else self.resized_side)
    if not all(isinstance(side, int) for side in sides) or not 1 <= sides[0] <= sides[1]:
      raise UserError(
        f'a crop of {self.image_size} pixels from a side of {self.resized_side} is impossible; '
        'both must be whole numbers, and the crop at least 1 and no larger than the side.'
      )
    numbers = (*self.mean, *self.std)
    if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
      raise UserError(
        f'mean is {self.mean} and std {self.std}; give one number each for grey images, or three.'
      )
    if not all(math.isfinite(x) for x in numbers) or not all(self.std):
      raise UserError(f'mean is {self.mean} and std {self.std}; all must be finite, and std not 0.')

  @property
  def channels(self) -> int:
    """Channels of the images that the network takes: 1 or 3."""
    return len(self.mean)

  def __call__(
    self, image: np.ndarray | bytes, rng: np.random.Generator | None = None
  ) -> np.ndarray:
    """The part of a picture that the network sees.

    Args:
      image: An encoded file, or pixels, uint8 (H, W, C) with 1 or 3 channels.
      rng: Has no effect; taken so that this is a `Transform`, as `eval_batches` takes one.

    Returns:
      uint8 (image_size, image_size, channels).

    Raises:
      UserError: On a path.
      Exception: Of nearly any kind, if the picture cannot be read.
    """
    del rng
    if isinstance(image, (str, os.PathLike)):
      raise UserError(
        f'{str(image)!r} is a path; give what is in the file, Path(...).read_bytes(), or pixels.'
      )
    pixels = _with_channels(decode(image), self.channels)
    height, width, _ = pixels.shape
    size = self.image_size
    if self.resized_side is not None:
      return centre_crop(pixels, size, self.resized_side, self.interpolation)
    if (height, width) == (size, size):
      return pixels
    return resize(pixels, size, size, (0, 0, width, height), self.interpolation)

  def normalize(self, images: jax.Array | np.ndarray) -> jax.Array:
    """`(images / 255 - mean) / std` of uint8 images (..., H, W, channels), float32."""
    scaled = jnp.asarray(images).astype(jnp.float32) / 255
    shape = (1,) * (scaled.ndim - 1) + (-1,)
    return (scaled - jnp.asarray(self.mean).reshape(shape)) / jnp.asarray(self.std).reshape(shape)

  def to_dict(self) -> dict[str, Any]:
    """The fields by name, for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: Any) -> Self:
    """The inverse of `to_dict`.

    Raises:
      UserError: On a field that is unknown or of the wrong type.
    """
    try:
      return cls(**fields)
    except TypeError as error:
      raise UserError(
        f'the preprocessing is {fields!r} ({error}); its fields are '
        f'{", ".join(field.name for field in dataclasses.fields(cls))}.'
      ) from error

  def __str__(self) -> str:
    numbers = ', '.join(f'{name} ({", ".join(f"{x:g}" for x in getattr(self, name))})'
                        for name in ('mean', 'std'))  # fmt: skip
    size = self.image_size
    if self.resized_side is None:
      return f'{size}x{size}, {self.interpolation}, {numbers}'
    return (
      f'shorter side to {self.resized_side} ({self.interpolation}), centre {size}x{size}, {numbers}'
    )


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """`pixels` (H, W, 1 or 3) with 1 channel (ITU-R 601's luma) or 3."""
  if pixels.shape[-1] == channels:
    return pixels
  if channels == 3:
    return np.repeat(pixels[..., :1], 3, -1)
  luma = pixels[..., :3].astype(np.float32) @ np.array((0.299, 0.587, 0.114), np.float32)
  return np.round(luma)[..., None].astype(np.uint8)
