"""Checkpoints: which are kept, and that what comes back is what was saved."""

import jax
import numpy as np
import pytest

from cbam_jax.errors import UserError
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.experiment import Experiment


@pytest.fixture
def experiment(tiny_config) -> Experiment:
  return Experiment(tiny_config)


def saved_steps(folder) -> list[int]:
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def save_all(folder, state, accuracies, keep) -> None:
  with Checkpoints(folder, keep) as checkpoints:
    for step, top1 in enumerate(accuracies, 1):
      checkpoints.save(state, step, {'loss': 1.0, 'top1': top1, 'top5': 1.0, 'count': 20})


@pytest.mark.parametrize(
  ('accuracies', 'keep', 'kept', 'best'),
  [
    ([0.5, 0.9, 0.7, 0.6, 0.8], 2, [2, 4, 5], 2),
    ([0.5, 0.6, 0.7, 0.8, 0.9], 2, [4, 5], 5),
    ([0.9, 0.6, 0.7, 0.6, 0.8], 1, [1, 5], 1),
    ([0.5], 3, [1], 1),
  ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, experiment, accuracies, keep, kept, best):
  save_all(tmp_path, experiment.new_state(), accuracies, keep)
  assert saved_steps(tmp_path) == kept
  with Checkpoints(tmp_path, keep) as checkpoints:
    assert checkpoints.latest_step() == len(accuracies)
    assert checkpoints.best_step() == best


def test_the_latest_of_equals_is_the_best(tmp_path, experiment):
  save_all(tmp_path, experiment.new_state(), [0.5, 0.9, 0.9, 0.6], keep=4)
  with Checkpoints(tmp_path, 4) as checkpoints:
    assert checkpoints.best_step() == 3


def test_what_is_restored_is_what_was_saved(tmp_path, experiment):
  state = jax.tree.map(lambda x: x + np.asarray(3, x.dtype), experiment.new_state())
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 7, {'top1': 0.5})
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(7, experiment.abstract_state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert (one.dtype, one.sharding) == (other.dtype, other.sharding)
    np.testing.assert_array_equal(one, other)


def test_a_state_may_be_consumed_as_soon_as_it_is_saved(tmp_path, experiment):
  state = experiment.new_state()
  expected = jax.device_get(state.params)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state, 1, {'top1': 0.5})
    for array in jax.tree.leaves(state):
      array.delete()
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(1, experiment.abstract_state)
  jax.tree.map(np.testing.assert_array_equal, restored.params, expected)


def test_a_run_without_checkpoints_says_so(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(UserError, match=r'holds no evaluated checkpoint; train first'):
      checkpoints.best_step()
