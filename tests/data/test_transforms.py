"""Transforms, against values worked out by hand or with Pillow alone."""

import numpy as np
import pytest
from PIL import Image

from cbam_jax.data import transforms
from cbam_jax.data.transforms import (
  AUGMENTATIONS,
  centre_crop,
  random_flip,
  random_resized_crop,
  random_shift,
  resize,
  train_transform,
)
from cbam_jax.errors import UserError

RNG = np.random.default_rng


class Draws:
  """A generator of random numbers that are known beforehand."""

  def __init__(self, *values):
    self.values = iter(values)

  def integers(self, high, size=None):
    return np.array([next(self.values) for _ in range(size)]) if size else next(self.values)

  def random(self):
    return next(self.values)


# ---- resizing --------------------------------------------------------------------------------


def test_resize_halves_with_antialiasing():
  # The triangle of the filter is stretched with the step, so that an output pixel weighs the
  # three inputs it reaches by 3/7, 3/7 and 1/7.
  row = np.array([0, 70, 140, 210], np.uint8)
  image = np.broadcast_to(row[None, :, None], (2, 4, 3))
  halved = resize(np.ascontiguousarray(image), 1, 2, (0, 0, 4, 2))
  np.testing.assert_array_equal(halved[0, :, 0], [50, 160])


@pytest.mark.parametrize('channels', [1, 3])
def test_resize_takes_a_box_as_left_top_right_bottom(channels):
  image = RNG(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
  same = resize(image, 2, 5, (3, 4, 8, 6))  # as large as the box
  np.testing.assert_array_equal(same, image[4:6, 3:8])


# ---- shift and flip --------------------------------------------------------------------------


def test_shift_by_hand():
  image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
  # Row 0 and column 2 of the image padded by one: moved down by one and left by one.
  moved = random_shift(image, Draws(0, 2), padding=1)
  np.testing.assert_array_equal(moved[..., 0], [[0, 0, 0], [2, 3, 0], [5, 6, 0]])
  np.testing.assert_array_equal(random_shift(image, Draws(1, 1), padding=1), image)


def test_shift_reaches_every_place_alike():
  image = np.zeros((5, 5, 1), np.uint8)
  image[2, 2] = 1
  rng, counts = RNG(0), np.zeros((5, 5))
  for _ in range(2500):
    counts += random_shift(image, rng, padding=2)[..., 0]
  assert counts.sum() == 2500
  np.testing.assert_allclose(counts, 100, atol=35)


def test_flip_by_hand():
  image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  np.testing.assert_array_equal(random_flip(image, Draws(0.49)), image[:, [1, 0]])
  np.testing.assert_array_equal(random_flip(image, Draws(0.5)), image)


def test_flip_takes_half():
  image, rng = np.array([[[0], [1]]], np.uint8), RNG(0)
  flips = sum(int(random_flip(image, rng)[0, 0, 0]) for _ in range(1000))
  assert 450 < flips < 550


# ---- the central crop ------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  ('height', 'width', 'resized', 'top', 'left'),
  [
    (6, 10, (4, 6), 1, 2),  # 10 * 4 / 6 is 6.67, cut to 6
    (9, 5, (7, 4), 2, 1),  # half of 7 - 2 is 2.5, rounded to the even 2
    (3, 3, (4, 4), 1, 1),  # made larger
    (4, 4, (4, 4), 1, 1),  # left as it is
  ],
)
def test_centre_crop_by_hand(height, width, resized, top, left, channels):
  image = RNG(height).integers(0, 256, (height, width, channels), dtype=np.uint8)
  picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
  expected = np.asarray(picture.resize(resized[::-1], Image.Resampling.BILINEAR))
  expected = expected.reshape(*resized, channels)[top : top + 2, left : left + 2]
  np.testing.assert_array_equal(centre_crop(image, size=2, resized_side=4), expected)


# ---- the random crop -------------------------------------------------------------------------


@pytest.fixture
def boxes(monkeypatch) -> list:
  """The boxes that would be cut out from here on."""
  cut = []

  def record(image, box, least):
    cut.append(box)
    return np.zeros((1, 1, image.shape[-1]), np.uint8)

  monkeypatch.setattr(transforms, 'decode_box', record)
  return cut


def test_random_crop_stays_within_its_bounds(boxes):
  image, rng = np.zeros((300, 200, 1), np.uint8), RNG(0)
  for _ in range(1000):
    random_resized_crop(image, rng, 4)
  left, top, right, bottom = np.array(boxes).T
  assert (left >= 0).all()
  assert (top >= 0).all()
  assert (right <= 200).all()
  assert (bottom <= 300).all()
  width, height = right - left, bottom - top
  share, aspect = width * height / (300 * 200), width / height
  # A side is rounded by up to half a pixel of the 60 at the least.
  assert 0.08 * 0.98 < share.min() < 0.1
  assert share.max() <= 1
  assert 3 / 4 * 0.98 < aspect.min() < 0.77
  assert 1.3 < aspect.max() < 4 / 3 * 1.02
  # Every place is reached.
  assert left.min() == top.min() == 0
  assert right.max() == 200
  assert bottom.max() == 300


def test_random_crop_has_the_distribution_of_inception(boxes):
  # Up to half of the area every aspect fits a square: no draw is thrown away there, so the area
  # is uniform, and so is the logarithm of the aspect.
  image, rng = np.zeros((1000, 1000, 1), np.uint8), RNG(1)
  for _ in range(4000):
    random_resized_crop(image, rng, 1)
  left, top, right, bottom = np.array(boxes).T
  share = (right - left) * (bottom - top) / 1e6
  small = share < 0.5
  deciles = np.linspace(0.1, 0.9, 9)
  np.testing.assert_allclose(
    np.quantile(share[small], deciles), 0.08 + (0.5 - 0.08) * deciles, atol=0.02
  )
  position = (np.log((right - left) / (bottom - top)) / np.log(4 / 3) + 1) / 2
  np.testing.assert_allclose(np.quantile(position[small], deciles), deciles, atol=0.04)


@pytest.mark.parametrize(
  ('height', 'width', 'box'),
  [
    (10, 1000, (493, 0, 506, 10)),  # 10 * 4 / 3 is 13.3
    (1000, 10, (0, 493, 10, 506)),
    (1, 100, (49, 0, 50, 1)),
    (100, 1, (0, 49, 1, 50)),
  ],
)
def test_random_crop_of_a_strip_is_its_centre(boxes, height, width, box):
  image = np.zeros((height, width, 3), np.uint8)
  for seed in range(5):
    random_resized_crop(image, RNG(seed), 4)
  assert set(boxes) == {box}


def test_random_crop_is_cut_out_of_the_image():
  # Left half black, right half white: a crop's columns never get darker.
  image = np.zeros((40, 40, 3), np.uint8)
  image[:, 20:] = 255
  for seed in range(20):
    crop = random_resized_crop(image, RNG(seed), 8).astype(int)
    assert crop.shape == (8, 8, 3)
    assert (np.diff(crop, axis=1) >= 0).all()
    assert np.ptp(crop, axis=0).max() <= 1  # the interpolation's arithmetic is of integers


# ---- what a configuration names --------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_every_augmentation_takes_any_channels_and_single_pixels(name, channels):
  image = RNG(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
  augmented = train_transform(name, 8)(image, RNG(1))
  assert augmented.shape == image.shape
  assert augmented.dtype == np.uint8
  pixel = np.full((1, 1, channels), 77, np.uint8)
  np.testing.assert_array_equal(train_transform(name, 1)(pixel, RNG(1)), pixel)


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_augmentations_depend_on_the_generator_alone(name):
  image = RNG(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
  transform = train_transform(name, 16)
  np.testing.assert_array_equal(transform(image, RNG(5)), transform(image, RNG(5)))
  results = {transform(image, RNG(seed)).tobytes() for seed in range(20)}
  assert (len(results) == 1) == (name == 'none')


def test_shift_moves_by_up_to_an_eighth_of_the_side():
  image = np.zeros((32, 32, 1), np.uint8)
  image[16, 16] = 1
  transform, rng = train_transform('shift', 32), RNG(0)
  places = np.array([np.argwhere(transform(image, rng)[..., 0])[0] - 16 for _ in range(500)])
  assert places.min() == -4
  assert places.max() == 4


def test_an_unknown_augmentation_offers_the_near_one():
  with pytest.raises(UserError, match=r"'crop_flp'; allowed: none, .*Did you mean 'crop_flip'"):
    train_transform('crop_flp', 8)
