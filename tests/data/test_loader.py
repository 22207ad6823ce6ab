"""The loader: what is in a batch, and that it depends on the seed and the step alone."""

import sys

import jax
import numpy as np
import pytest

from cbam_jax.data import eval_batches, train_batches
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.sources import ArraySource
from cbam_jax.data.transforms import train_transform
from cbam_jax.errors import MissingExtraError, UserError

ALONE = Preprocessing(4, None, mean=(0.0,), std=(1.0,))
AUGMENTED = train_transform('crop_flip', 4)


def numbered(size: int) -> ArraySource:
  """Random images, example i with label i."""
  images = np.random.default_rng(0).integers(0, 256, (size, 4, 4, 1), dtype=np.uint8)
  return ArraySource(images, np.arange(size))


def train(size=10, batch_size=4, start=0, stop=6, transform=AUGMENTED, seed=0, workers=0):
  """The batches of steps `start` to `stop`, two to an epoch unless told otherwise."""
  batches = train_batches(
    numbered(size),
    transform,
    batch_size,
    seed=seed,
    start_step=start,
    stop_step=stop,
    workers=workers,
  )
  return list(batches)


def labels(batches) -> list[list[int]]:
  return [batch['label'].tolist() for batch in batches]


def assert_same(batches, others) -> None:
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


# ---- training --------------------------------------------------------------------------------


def test_a_batch_has_the_documented_arrays():
  for batch in train(stop=1) + list(eval_batches(numbered(4), ALONE, 4)):
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
      'image': ((4, 4, 4, 1), np.uint8),
      'label': ((4,), np.int32),
      'mask': ((4,), np.bool_),
    }
    assert batch['mask'].all()


def test_images_come_with_their_labels():
  source = numbered(10)
  for batch in train(transform=ALONE):
    np.testing.assert_array_equal(batch['image'], source.images[batch['label']])


@pytest.mark.parametrize('start', [1, 2, 5])
def test_a_batch_depends_on_the_seed_and_the_step_alone(start):
  assert_same(train(start=start), train()[start:])
  assert_same(train(start=start, stop=6), train(stop=9)[start:6])


def test_nothing_is_left_to_do_after_the_last_step():
  assert train(start=6, stop=6) == []


def test_seeds_differ_in_order_and_in_transforms():
  assert labels(train(seed=1)) != labels(train(seed=2))
  # Without a choice of order, the difference is in the transforms.
  one, other = (train(size=1, batch_size=1, stop=4, seed=seed) for seed in (1, 2))
  assert any((a['image'] != b['image']).any() for a, b in zip(one, other, strict=True))


def test_an_epoch_is_a_permutation_without_the_remainder():
  order = np.concatenate(labels(train())).tolist()
  epochs = [order[:8], order[8:16], order[16:]]
  for epoch in epochs:
    assert len(epoch) == len(set(epoch)) == 8
    assert set(epoch) <= set(range(10))
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  # What is left out differs too, so that in time every example is used.
  assert len({frozenset(epoch) for epoch in epochs}) > 1
  (full,) = labels(train(size=8, batch_size=8, stop=1))
  assert sorted(full) == list(range(8))


def test_an_example_is_transformed_anew_in_every_epoch():
  images = [batch['image'].tobytes() for batch in train(size=1, batch_size=1, stop=10)]
  assert len(set(images)) > 5


def test_worker_processes_change_nothing():
  assert_same(train(start=1, workers=2), train(start=1))


# ---- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'batch_size'), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_evaluation_meets_every_example_once_in_order(size, batch_size):
  source = numbered(size)
  batches = list(eval_batches(source, ALONE, batch_size))
  assert len(batches) == -(size // -batch_size)
  assert all(len(batch['label']) == batch_size for batch in batches)
  mask = np.concatenate([batch['mask'] for batch in batches])
  assert mask.tolist() == [True] * size + [False] * (len(mask) - size)
  seen = {key: np.concatenate([batch[key] for batch in batches])[mask] for key in batches[0]}
  assert seen['label'].tolist() == list(range(size))
  np.testing.assert_array_equal(seen['image'], source.images)


# ---- several processes -----------------------------------------------------------------------


def in_process(monkeypatch, index: int, count: int) -> None:
  monkeypatch.setattr(jax, 'process_index', lambda: index)
  monkeypatch.setattr(jax, 'process_count', lambda: count)


@pytest.mark.parametrize('count', [2, 4])
def test_the_shares_of_processes_make_up_the_batch(monkeypatch, count):
  whole_train = train(start=1)
  whole_eval = list(eval_batches(numbered(10), ALONE, 4))
  train_shares, eval_shares = [], []
  for index in range(count):
    in_process(monkeypatch, index, count)
    train_shares.append(train(start=1))
    eval_shares.append(list(eval_batches(numbered(10), ALONE, 4)))
  for whole, shares in ((whole_train, train_shares), (whole_eval, eval_shares)):
    joined = [
      {key: np.concatenate([share[key] for share in step]) for key in step[0]}
      for step in zip(*shares, strict=True)
    ]
    assert len(shares[0][0]['label']) == 4 // count
    assert_same(joined, whole)


def test_processes_must_divide_the_batch(monkeypatch):
  in_process(monkeypatch, 0, 3)
  with pytest.raises(UserError, match='batch_size=4 cannot be split over 3 processes; choose a'):
    train()
  with pytest.raises(UserError, match='batch_size=4 cannot be split over 3 processes; choose a'):
    eval_batches(numbered(10), ALONE, 4)


# ---- errors ----------------------------------------------------------------------------------


def test_a_batch_larger_than_the_set_is_refused():
  with pytest.raises(UserError, match='batch_size=11 but the training set holds 10 examples'):
    train(batch_size=11)


def test_a_missing_grain_names_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'grain', None)
  with pytest.raises(MissingExtraError, match=r"grain.*pip install 'cbam-jax\[train\]'"):
    train()
