import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbam_jax import UserError
from cbam_jax.explain import score as score_module
from cbam_jax.explain.score import (
  Estimate,
  Score,
  compare,
  energy_inside,
  pointing_game,
  score,
  summarise,
  upsample,
)

# ---- upsampling --------------------------------------------------------------------------------


def test_upsampling_by_hand():
  # Centres of the two cells stand at 1 and 3 of 4 pixels, whose own stand at 1/2, 3/2, 5/2, 7/2.
  np.testing.assert_allclose(upsample(np.array([[0.0, 4.0]]), (2, 4)), [[0, 1, 3, 4]] * 2)


def test_its_own_size_changes_nothing():
  cam = np.random.default_rng(0).random((5, 7))
  np.testing.assert_allclose(upsample(cam, (5, 7)), cam)


cams = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000)).map(
  lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2])
)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=30)
@given(cam=cams, size=sizes)
def test_upsampling_is_linear_and_stays_within(cam, size):
  pixels = upsample(cam, size)
  assert pixels.shape == size
  assert pixels.min() >= cam.min() - 1e-12
  assert pixels.max() <= cam.max() + 1e-12
  np.testing.assert_allclose(upsample(3 * cam + 1, size), 3 * pixels + 1)
  np.testing.assert_allclose(upsample(cam.T, size[::-1]), pixels.T)
  np.testing.assert_allclose(upsample(np.full_like(cam, 2), size), 2)


# ---- one map -----------------------------------------------------------------------------------

# Of a 2 x 2 map on 40 x 80 pixels, the cells are 20 x 40. One cell alone falls off linearly between
# its centre and those of its neighbours.
TOP_RIGHT = np.array([[0.0, 1.0], [0.0, 0.0]])
SIZE = (40, 80)


def box(*sides):
  return np.array([sides], float)


# Its maximum is the corner beyond the centre, of which the pixel at (60, 0) is the first.
@pytest.mark.parametrize(
  ('sides', 'tolerance', 'hit'),
  [
    ((60, 0, 80, 20), 0, True),
    ((0, 20, 80, 40), 0, False),
    ((0, 20, 80, 40), 19.5, True),  # centre of the pixel at y = 1/2
    ((0, 20, 80, 40), 19.4, False),
    ((0, 0, 50, 40), 10.5, True),  # at x = 60 1/2
    ((0, 0, 50, 40), 10.4, False),
    ((0, 4, 57, 40), 4.94, False),  # hypot(3 1/2, 3 1/2) = 4.9497...
    ((0, 4, 57, 40), 4.95, True),
    ((-9, -9, 90, 90), 0, True),
  ],
)
def test_pointing_by_hand(sides, tolerance, hit):
  assert pointing_game(TOP_RIGHT, box(*sides), SIZE, tolerance) is hit


def test_the_nearest_of_several_boxes_counts():
  boxes = np.array([[0, 20, 10, 40], [55, 0, 80, 30], [0, 0, 5, 5]], float)
  assert pointing_game(TOP_RIGHT, boxes, SIZE, 0)
  assert not pointing_game(TOP_RIGHT, boxes[[0, 2]], SIZE, 0)


def test_the_tolerance_is_fifteen_pixels_unless_given():
  assert pointing_game(TOP_RIGHT, box(0, 0, 45.5, 40), SIZE)
  assert not pointing_game(TOP_RIGHT, box(0, 0, 45.4, 40), SIZE)


def test_energy_by_hand():
  # At its own size each position is a pixel.
  cam = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 5.0]])
  assert energy_inside(cam, box(0, 0, 1, 1), (2, 3)) == pytest.approx(1 / 20)
  assert energy_inside(cam, box(1, 0, 3, 2), (2, 3)) == pytest.approx(15 / 20)
  assert energy_inside(cam, box(0.5, 0, 2.5, 0.6), (2, 3)) == pytest.approx(3 / 20)
  assert energy_inside(cam, box(0.6, 0, 2.6, 0.4), (2, 3)) == 0
  overlapping = np.array([[0, 0, 2, 1], [1, 0, 3, 1], [-5, 1, 1, 9]], float)
  assert energy_inside(cam, overlapping, (2, 3)) == pytest.approx(10 / 20)


def test_a_map_of_zeros_is_a_miss_without_energy():
  whole = box(0, 0, 80, 40)
  assert score(np.zeros((2, 2)), whole, SIZE) == Score(False, 0.0)
  assert score(np.full((2, 2), 1e-300), whole, SIZE) == Score(True, pytest.approx(1))


boxes = st.lists(
  st.tuples(*[st.floats(-5, 40)] * 2, *[st.floats(0.1, 50)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
  ),
  min_size=1,
  max_size=3,
).map(np.array)


@settings(max_examples=50)
@given(cam=cams, boxes=boxes, size=sizes, tolerance=st.floats(0, 20))
def test_scores_of_anything(cam, boxes, size, tolerance):
  found = score(cam, boxes, size, tolerance)
  assert 0 <= found.energy <= 1
  scaled = score(1024 * cam, boxes, size, tolerance)
  assert scaled == Score(found.hit, pytest.approx(found.energy))
  mirrored = boxes[:, [1, 0, 3, 2]]
  assert energy_inside(cam.T, mirrored, size[::-1]) == pytest.approx(found.energy)
  # More boxes, or more tolerance, never lose.
  assert energy_inside(cam, boxes[:1], size) <= found.energy
  assert pointing_game(cam, boxes, size, tolerance + 1) >= found.hit
  assert pointing_game(cam, boxes[:1], size, tolerance) <= found.hit
  everything = np.array([[0, 0, *size[::-1]]], float)
  assert score(cam, everything, size, 0) == Score(True, pytest.approx(1))


@pytest.mark.parametrize(
  ('cam', 'boxes', 'size', 'parts'),
  [
    (np.zeros((1, 2, 2)), box(0, 0, 1, 1), SIZE, ['(1, 2, 2)', '(h, w)', 'grad_cam']),
    (np.zeros((0, 2)), box(0, 0, 1, 1), SIZE, ['(0, 2)']),
    (-TOP_RIGHT, box(0, 0, 1, 1), SIZE, ['not negative']),
    (np.full((2, 2), np.nan), box(0, 0, 1, 1), SIZE, ['finite']),
    (TOP_RIGHT, np.zeros((0, 4)), SIZE, ['(0, 4)', 'at least one']),
    (TOP_RIGHT, np.ones(4), SIZE, ['(4,)', '(k, 4)']),
    (TOP_RIGHT, box(5, 5, 5, 9), SIZE, ['[5.0, 5.0, 5.0, 9.0]', 'left, top, right and bottom']),
    (TOP_RIGHT, box(5, 9, 8, 5), SIZE, ['no extent']),
    (TOP_RIGHT, box(0, 0, 1, np.nan), SIZE, ['no extent']),
    (TOP_RIGHT, box(0, 0, 1, 1), (0, 5), ['(0, 5)', 'at least 1']),
  ],
)
def test_what_cannot_be_scored_is_refused(cam, boxes, size, parts):
  for measure in (pointing_game, energy_inside):
    with pytest.raises(UserError) as error:
      measure(cam, boxes, size)
    for part in parts:
      assert part in str(error.value)


# ---- many maps ---------------------------------------------------------------------------------


def scores(hits, energies):
  return [Score(bool(h), float(e)) for h, e in zip(hits, energies, strict=True)]


def test_summary_by_hand():
  energies = np.random.default_rng(0).random(10)
  found = summarise(scores([1] * 7 + [0] * 3, energies))
  assert found.count == 10
  # Wilson: (0.7 + z^2/20 ± z sqrt(0.21/10 + z^2/400)) / (1 + z^2/10), z = 1.959964.
  assert dataclasses.astuple(found.pointing) == pytest.approx((0.7, 0.396779, 0.892208), abs=1e-5)
  assert found.energy.value == pytest.approx(energies.mean())
  # The bootstrap's own standard error of a mean is the sample's, over n.
  reach = 1.959964 * energies.std() / np.sqrt(10)
  assert found.energy.low == pytest.approx(energies.mean() - reach, abs=0.02)
  assert found.energy.high == pytest.approx(energies.mean() + reach, abs=0.02)
  assert found == summarise(scores([1] * 7 + [0] * 3, energies))


def test_the_intervals_cover_the_truth_as_often_as_they_say(monkeypatch):
  monkeypatch.setattr(score_module, 'RESAMPLINGS', 499)
  rng = np.random.default_rng(0)
  covered = np.zeros(4)
  for _ in range(200):
    ease, better = rng.random((2, 60))  # how easy an image is for both
    first = scores(rng.random(60) < 0.8 * ease, 0.8 * ease)
    second = scores(rng.random(60) < 0.1 + 0.8 * ease, 0.8 * ease + 0.2 * better)
    alone, both = summarise(second), compare(first, second)
    for i, estimate in enumerate((alone.pointing, alone.energy, both.pointing, both.energy)):
      covered[i] += estimate.low <= (0.5, 0.5, 0.1, 0.1)[i] <= estimate.high
  # 95 % but for chance (1.5 %) and the bootstrap's optimism at 60 images.
  np.testing.assert_array_less(0.89, covered / 200)


def test_comparison_by_hand():
  # Of 20 pairs, 8 are won by the second, 2 by the first, 10 tie.
  first = scores([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5, [0.2] * 20)
  second = scores([1] * 8 + [0] * 2 + [1] * 5 + [0] * 5, [0.5] * 20)
  found = compare(first, second)
  assert (found.count, found.only_first, found.only_second) == (20, 2, 8)
  # 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10
  assert found.p_value == pytest.approx(112 / 1024)
  # Agresti and Min: 6/22 ± z sqrt(11/22 - (6/22)^2) / sqrt(22).
  reach = 1.959964 * np.sqrt(0.5 - (6 / 22) ** 2) / np.sqrt(22)
  expected = (0.3, 6 / 22 - reach, 6 / 22 + reach)
  assert dataclasses.astuple(found.pointing) == pytest.approx(expected, abs=1e-6)
  assert dataclasses.astuple(found.energy) == pytest.approx((0.3, 0.3, 0.3))
  back = compare(second, first)
  assert (back.only_first, back.only_second, back.p_value) == (8, 2, found.p_value)
  assert dataclasses.astuple(back.pointing) == pytest.approx(
    [-expected[i] for i in (0, 2, 1)], abs=1e-6
  )


def test_equal_networks_do_not_differ():
  same = scores([1, 0, 1], [0.5, 0.1, 0.9])
  found = compare(same, same)
  assert (found.p_value, found.pointing.value, found.energy) == (1, 0, Estimate(0, 0, 0))
  assert found.pointing.low < 0 < found.pointing.high


def test_of_one_map_anything_is_possible():
  one = scores([1], [0.25])
  assert summarise(one).energy == Estimate(0.25, 0, 1)
  assert compare(one, scores([1], [0.5])).energy == Estimate(0.25, -1, 1)


def test_estimates_read_well():
  assert str(Estimate(0.5, 0.25, 0.75)) == '0.500 (0.250 to 0.750)'


def test_no_scores_or_unequal_numbers_are_refused():
  with pytest.raises(UserError, match='no scores'):
    summarise([])
  for pair in (([], []), (scores([1], [1]), scores([1, 0], [1, 0]))):
    with pytest.raises(UserError, match='same images'):
      compare(*pair)


def test_scipy_is_imported_by_those_who_summarise_alone():
  # jax imports parts of scipy, but not this one.
  probe = (
    'import sys; import cbam_jax.explain, cbam_jax.explain.score; '
    'sys.exit("scipy.stats" in sys.modules or "matplotlib" in sys.modules)'
  )
  assert subprocess.run([sys.executable, '-c', probe], check=False).returncode == 0
