"""Stored images to pixels: no more of a JPEG file is decoded than a crop needs.

simplejpeg and Pillow hold the same decoder, libjpeg-turbo, and give the same pixels. simplejpeg is
twice as fast and reads what nearly every photo is; Pillow reads the rest, and its word counts on
what cannot be read.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np

from cbam_jax.errors import require

Box = tuple[int, int, int, int]
"""Left, top, right and bottom; the last two are outside."""

# A file of a few bytes can claim any size, and memory is taken for what it claims.
MOST_PIXELS = 8192 * 8192

# Markers of a frame header: baseline, extended and progressive, all Huffman-coded.
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), (0xC2,)
# Frames that simplejpeg is not given, and what can only come after the frame header.
OTHERS = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xD9, 0xDA})


def image_size(image: np.ndarray | bytes) -> tuple[int, int]:
  """Height and width of a record's image, from the header of an encoded one.

  Raises:
    Exception: Of nearly any kind, if the image cannot be read.
  """
  if isinstance(image, np.ndarray):
    return _checked(image).shape[:2]
  if frame := _jpeg_frame(image):
    return frame.height, frame.width
  with require('PIL.Image', 'train').open(io.BytesIO(image)) as picture:
    return _allowed(picture.height, picture.width)


def decode(image: np.ndarray | bytes) -> np.ndarray:
  """The pixels of a record's image, uint8 (H, W, C); encoded files become RGB.

  Raises:
    Exception: Of nearly any kind, if the image cannot be read.
  """
  if isinstance(image, np.ndarray):
    return _checked(image)
  if frame := _jpeg_frame(image):
    pixels = _decode_jpeg(image, frame, frame.height, 1)
    if pixels is not None:
      return pixels
  return _decode_any(image)


def decode_box(image: np.ndarray | bytes, box: Box, least: int) -> np.ndarray:
  """The pixels of a box, halved while both of its sides stay at least `least`, up to three times.

  Args:
    image: A record's image.
    box: What is wanted, within `image_size(image)`.
    least: Length that no side is made smaller than; one that is smaller already stays as it is.

  Returns:
    uint8 (h, w, C), C being 3 for an encoded image.

  Raises:
    Exception: Of nearly any kind, if the image cannot be read.
  """
  left, top, right, bottom = box
  side = min(right - left, bottom - top)
  shrink = next(s for s in (8, 4, 2, 1) if s == 1 or side >= s * least)
  if not isinstance(image, np.ndarray) and (frame := _jpeg_frame(image)):
    pixels = _decode_jpeg(image, frame, bottom, shrink)
    if pixels is not None:
      return pixels[top // shrink : -(bottom // -shrink), left // shrink : -(right // -shrink)]
  return _averaged(decode(image)[top:bottom, left:right], shrink)


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """`image`, uint8 (H, W, C), resized by interpolation between the nearest pixels alone.

  In integer arithmetic, which may be a level off, and is the same with and without vectors.
  """
  cv2 = require('cv2', 'train')
  resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  return resized.reshape(height, width, image.shape[-1])


def _averaged(pixels: np.ndarray, shrink: int) -> np.ndarray:
  """Means over squares of `shrink` pixels; what does not fill a square at the end is left out."""
  if shrink == 1:
    return pixels
  h, w = pixels.shape[0] // shrink, pixels.shape[1] // shrink
  squares = pixels[: h * shrink, : w * shrink].reshape(h, shrink, w, shrink, -1)
  count = shrink * shrink
  return ((squares.sum((1, 3), dtype=np.uint32) + count // 2) // count).astype(np.uint8)


def _checked(image: np.ndarray) -> np.ndarray:
  if image.dtype != np.uint8 or image.ndim != 3 or 0 in image.shape:
    raise ValueError(f'it is {image.dtype} {image.shape} rather than uint8 (H, W, C)')
  return image


def _allowed(height: int, width: int) -> tuple[int, int]:
  if height * width > MOST_PIXELS:
    raise ValueError(f'it claims {height} x {width} pixels, more than the {MOST_PIXELS} allowed')
  return height, width


class _Frame(NamedTuple):
  """What the frame header of a JPEG file says; its height stands at `offset`."""

  height: int
  width: int
  offset: int
  sequential: bool


def _jpeg_frame(image: bytes) -> _Frame | None:
  """The frame header of a file that simplejpeg is to decode, or None."""
  # Where a file does not end as it should, Pillow tells whether it is truncated.
  if not image.startswith(b'\xff\xd8') or not image.endswith(b'\xff\xd9'):
    return None
  at = 2
  while at + 10 <= len(image) and image[at] == 0xFF:
    marker, length = struct.unpack_from('>BH', image, at + 1)
    if marker in SEQUENTIAL or marker in PROGRESSIVE:
      precision, height, width, components = struct.unpack_from('>BHHB', image, at + 4)
      if precision != 8 or components not in (1, 3) or not height or not width:
        return None  # CMYK among them, which every decoder turns into RGB in its own way
      _allowed(height, width)
      return _Frame(height, width, at + 5, marker in SEQUENTIAL)
    if marker in OTHERS:
      return None
    at += 2 + length
  return None


def _decode_jpeg(image: bytes, frame: _Frame, bottom: int, shrink: int) -> np.ndarray | None:
  """The rows above `bottom`, and a few more, at 1 / `shrink` of the size; None if it cannot.

  A height of its own in the frame header makes the decoder stop there. With two rows more than
  asked for, those asked for do not depend on it: upsampled colours look one sample down.
  """
  height = min(frame.height, bottom + 2 * shrink)
  simplejpeg = require('simplejpeg', 'train')
  data: bytes | bytearray = image
  if frame.sequential and height < frame.height:
    data = bytearray(image)
    struct.pack_into('>H', data, frame.offset, height)
  try:
    return simplejpeg.decode_jpeg(
      data,
      min_height=-(height // -shrink),
      min_width=-(frame.width // -shrink),
      strict=False,  # it would complain of the rows that are left over; Pillow forgives as much
    )
  except ValueError:
    return None


def _decode_any(image: bytes) -> np.ndarray:
  with require('PIL.Image', 'train').open(io.BytesIO(image)) as picture:
    _allowed(picture.height, picture.width)
    if picture.mode == 'P':  # Pillow warns of a palette's transparency unless it is kept at first
      return np.asarray(picture.convert('RGBA').convert('RGB'))
    return np.asarray(picture.convert('RGB'))
