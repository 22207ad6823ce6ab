"""How well maps find objects: a number where the paper has pictures.

Two measures on a map and the boxes of its class in the same image: the pointing game (Zhang et al.,
ECCV 2016), whether the map's maximum lies on an object, and the energy-based pointing game
(Score-CAM, Wang et al., CVPR workshops 2020), the share of the map that does.

A box is left, top, right and bottom, in pixels of the image that the network saw; pixel (i, j) has
its centre at (j + 1/2, i + 1/2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from cbam_jax.errors import UserError, require

# What Zhang et al. allow for, on images of about 300 to 500 pixels.
TOLERANCE = 15.0

CONFIDENCE = 0.95
RESAMPLINGS = 9999


@dataclasses.dataclass(frozen=True)
class Score:
  """How well one map finds its objects.

  Attributes:
    hit: Whether its maximum lies on one of them; False for a map that is zero everywhere.
    energy: Share of its sum that lies on them, 0 to 1; 0 for a map that is zero everywhere.
  """

  hit: bool
  energy: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its 95 % confidence interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} ({self.low:.3f} to {self.high:.3f})'


@dataclasses.dataclass(frozen=True)
class Scores:
  """How well the maps of one network find objects.

  Attributes:
    count: Maps.
    pointing: Share of hits, with Wilson's interval. Every map counts alike, where Zhang et al.
      take the mean over classes.
    energy: Mean energy, with its bootstrap interval.
  """

  count: int
  pointing: Estimate
  energy: Estimate


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How much better the maps of a second network find the objects that a first one's find.

  Attributes:
    count: Pairs of maps.
    pointing: Difference of the shares of hits, second minus first, with the interval of Agresti
      and Min (Statistics in Medicine, 2005) for matched pairs.
    energy: Mean difference of the energies, second minus first, with its bootstrap interval.
    only_first: Pairs of which the first map alone is a hit.
    only_second: Pairs of which the second map alone is a hit.
    p_value: McNemar's exact two-sided test of whether the shares of hits are equal.
  """

  count: int
  pointing: Estimate
  energy: Estimate
  only_first: int
  only_second: int
  p_value: float


def pointing_game(
  cam: np.ndarray, boxes: np.ndarray, size: tuple[int, int], tolerance: float = TOLERANCE
) -> bool:
  """Whether the largest pixel of a map, upsampled to its image, lies on an object.

  Args:
    cam: A class's map, (h, w), not negative.
    boxes: Those of the objects of this class, (k, 4).
    size: Height and width of the image.
    tolerance: Pixels that the pixel's centre may be away from the nearest box.

  Returns:
    True for a hit; False for a miss, and for a map that is zero everywhere. Of equal pixels the
    first counts.

  Raises:
    UserError: On a map that is no matrix, negative or not finite; without boxes, or with one that
      has no extent; on an image without pixels.
  """
  cam, boxes = _checked(cam, boxes)
  if not cam.any():
    return False
  pixels = upsample(cam, size)
  row, column = np.unravel_index(np.argmax(pixels), pixels.shape)
  x, y = column + 0.5, row + 0.5
  left, top, right, bottom = boxes.T
  away = np.hypot(
    np.maximum(0, np.maximum(left - x, x - right)), np.maximum(0, np.maximum(top - y, y - bottom))
  )
  return bool(away.min() <= tolerance)


def energy_inside(cam: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> float:
  """The share of a map, upsampled to its image, that lies on objects.

  Args:
    cam: A class's map, (h, w), not negative.
    boxes: Those of the objects of this class, (k, 4); what several cover counts once.
    size: Height and width of the image.

  Returns:
    0 to 1; 0 for a map that is zero everywhere.

  Raises:
    UserError: As `pointing_game` does.
  """
  cam, boxes = _checked(cam, boxes)
  if not cam.any():
    return 0.0
  pixels = upsample(cam, size)
  height, width = size
  y, x = np.ogrid[0.5:height, 0.5:width]
  left, top, right, bottom = boxes.T[..., None, None]
  inside = np.any((left <= x) & (x < right) & (top <= y) & (y < bottom), 0)
  return float(pixels[inside].sum() / pixels.sum())


def score(
  cam: np.ndarray, boxes: np.ndarray, size: tuple[int, int], tolerance: float = TOLERANCE
) -> Score:
  """Both measures of one map; arguments and errors are those of `pointing_game`."""
  return Score(pointing_game(cam, boxes, size, tolerance), energy_inside(cam, boxes, size))


def upsample(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A map (h, w) interpolated bilinearly to the height and width `size`, flat beyond the centres.

  Each position stands for a cell of the image and is its value at the cell's centre, as in
  PyTorch's `interpolate(align_corners=False)`.

  Raises:
    UserError: On a size without pixels.
  """
  if min(size) < 1:
    raise UserError(f'the size of the image is {size}; its height and width must be at least 1.')
  rows, columns = (_hats(n, pixels) for n, pixels in zip(cam.shape, size, strict=True))
  return rows @ cam @ columns.T


def summarise(scores: Sequence[Score]) -> Scores:
  """The means of many scores, with their uncertainty over images.

  The same scores give the same bits: the bootstrap draws from a fixed seed.

  Raises:
    UserError: Without any scores.
  """
  if not scores:
    raise UserError('there are no scores to summarise; score at least one map.')
  stats = require('scipy.stats', 'explain')
  count, hits = len(scores), sum(s.hit for s in scores)
  wilson = stats.binomtest(hits, count).proportion_ci(CONFIDENCE, 'wilson')
  return Scores(
    count,
    Estimate(hits / count, float(wilson.low), float(wilson.high)),
    _bootstrapped_mean([s.energy for s in scores], 0, 1),
  )


def compare(first: Sequence[Score], second: Sequence[Score]) -> Comparison:
  """The differences between two networks' scores on the same images, in the same order.

  Pairs are compared, which leaves out what makes one image harder than another for both.

  Raises:
    UserError: Without any scores, or on unequal numbers of them.
  """
  if not first or len(first) != len(second):
    raise UserError(
      f'there are {len(first)} scores of the first network and {len(second)} of the second; score '
      'both on the same images, at least one.'
    )
  stats = require('scipy.stats', 'explain')
  pairs = list(zip(first, second, strict=True))
  only_first = sum(a.hit and not b.hit for a, b in pairs)
  only_second = sum(b.hit and not a.hit for a, b in pairs)
  differing = only_first + only_second
  return Comparison(
    count=len(pairs),
    pointing=_paired_difference(only_first, only_second, len(pairs)),
    energy=_bootstrapped_mean([b.energy - a.energy for a, b in pairs], -1, 1),
    only_first=only_first,
    only_second=only_second,
    p_value=float(stats.binomtest(only_second, differing).pvalue) if differing else 1.0,
  )


def _paired_difference(only_first: int, only_second: int, count: int) -> Estimate:
  """Wald's interval after half a pair is added to each of the four outcomes."""
  normal = float(require('scipy.stats', 'explain').norm.ppf((1 + CONFIDENCE) / 2))
  centre = (only_second - only_first) / (count + 2)
  differing = (only_first + only_second + 1) / (count + 2)
  reach = normal * math.sqrt((differing - centre**2) / (count + 2))
  value = (only_second - only_first) / count
  return Estimate(value, max(-1.0, centre - reach), min(1.0, centre + reach))


def _bootstrapped_mean(values: Sequence[float], least: float, most: float) -> Estimate:
  """The mean with its percentile interval; of one value, all that is possible is the interval."""
  value = float(np.mean(values))
  if len(values) == 1:
    return Estimate(value, least, most)
  interval = (
    require('scipy.stats', 'explain')
    .bootstrap(
      (np.asarray(values),),
      np.mean,
      n_resamples=RESAMPLINGS,
      batch=max(1, 10**6 // len(values)),  # all at once may not fit in memory
      confidence_level=CONFIDENCE,
      method='percentile',
      rng=np.random.default_rng(0),
    )
    .confidence_interval
  )
  return Estimate(value, float(interval.low), float(interval.high))


def _checked(cam: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  cam, boxes = np.asarray(cam, np.float64), np.asarray(boxes, np.float64)
  if cam.ndim != 2 or not cam.size or not np.all(np.isfinite(cam)) or np.any(cam < 0):
    raise UserError(
      f'the map of shape {cam.shape} cannot be scored; give one of (h, w), finite and not '
      'negative, as grad_cam returns them for each image.'
    )
  if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
    raise UserError(f'the boxes have shape {boxes.shape}; give (k, 4), at least one box.')
  extents = boxes[:, 2:] - boxes[:, :2]
  if not np.all(extents > 0):
    empty = boxes[~np.all(extents > 0, 1)][0]
    raise UserError(
      f'the box {empty.tolist()} has no extent; give left, top, right and bottom, in this order.'
    )
  return cam, boxes


def _hats(positions: int, pixels: int) -> np.ndarray:
  """(pixels, positions): the share that each position has in each pixel along one axis."""
  at = (np.arange(pixels) + 0.5) * positions / pixels - 0.5
  distance = np.abs(np.clip(at, 0, positions - 1)[:, None] - np.arange(positions))
  return np.maximum(0, 1 - distance)
