"""Checkpoints: which are kept, that what comes back is what was saved, and what damage does."""

import gc
import os
import shutil

import jax
import numpy as np
import pytest

from cbam_jax.errors import RunError, UserError
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.stored import best_step
from tests.marks import first
from tests.training.conftest import make_tiny_config


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


def test_a_save_is_no_transfer_by_mistake(tmp_path, experiment):
  state = experiment.new_state()
  with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard('disallow'):
    checkpoints.save(state, 1, {'top1': 0.5})
    checkpoints.save(state, 2)
    checkpoints.wait()
  assert saved_steps(tmp_path) == [1, 2]


def test_metrics_that_come_later_leave_the_checkpoint_as_it_is(tmp_path, experiment):
  state = experiment.new_state()
  folder = tmp_path / 'checkpoints'
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(state, 3)
  before = contents(folder / '3')
  # What a kill leaves.
  (folder / '3' / 'metrics.orbax-checkpoint-tmp').mkdir()
  for _ in range(2):
    with Checkpoints(folder, keep=1) as checkpoints:
      checkpoints.save(state, 3, {'top1': 0.5})
      assert checkpoints.best_step() == 3
      checkpoints.save(state, 4, {'top1': 0.4})
      checkpoints.save(state, 5)
    assert before.items() <= contents(folder / '3').items()
    # The best is kept although two come after it.
    assert saved_steps(folder) == [3, 5]
    shutil.rmtree(folder / '5')


# ---- damage ----------------------------------------------------------------------------------

# orbax reads arrays side by side, and leaves the other reads to themselves once one has failed.
fails_to_read = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def contents(folder) -> dict[str, bytes]:
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def empty(file) -> None:
  os.truncate(file, 0)


def halve(file) -> None:
  os.truncate(file, file.stat().st_size // 2)


def flip_bits(file) -> None:
  """One bit in every 97 bytes."""
  content = bytearray(file.read_bytes())
  content[::97] = bytes(byte ^ 4 for byte in content[::97])
  file.write_bytes(content)


@pytest.fixture
def _collected():
  """Lets go of what failed reads have left, within the test that ignores their complaints."""
  yield
  gc.collect()


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """Checkpoints of steps 1 to 3, which hold the numbers 1 to 3."""
  folder = tmp_path_factory.mktemp('three') / 'checkpoints'
  experiment = Experiment(make_tiny_config())
  with Checkpoints(folder, keep=3) as checkpoints:
    for step in (1, 2, 3):
      state = jax.tree.map(
        lambda x, step=step: np.full(x.shape, step, x.dtype), experiment.new_state()
      )
      checkpoints.save(jax.device_put(state), step, {'top1': step / 4})
  return folder


@fails_to_read
@pytest.mark.usefixtures('_collected')
@pytest.mark.parametrize('damage', first(2, [os.remove, flip_bits, empty, halve]))
def test_whatever_file_is_damaged_what_comes_back_is_whole(tmp_path, experiment, three, damage):
  names = sorted(contents(three / '3'))
  assert len(names) > 10
  fallen_back = []
  for i, name in enumerate(names):
    folder = shutil.copytree(three, tmp_path / str(i) / 'checkpoints')
    damage(folder / '3' / name)
    said: list[str] = []
    with Checkpoints(folder, 3, said.append) as checkpoints:
      found = checkpoints.restore_newest(experiment.abstract_state)
    assert found is not None
    state, step = found
    for array in jax.tree.leaves(state):
      np.testing.assert_array_equal(array, step)
    if step == 3:  # the file is no part of what is restored
      assert said == []
      assert saved_steps(folder) == [1, 2, 3]
    else:
      assert step == 2
      assert 'checkpoint 3 is damaged (' in said[0]
      assert saved_steps(folder) == [1, 2]
      assert len(contents(folder.parent / 'damaged' / '3')) >= len(names) - 1
      fallen_back.append(name)
  assert {'check/metadata', 'state/_METADATA', 'state/manifest.ocdbt'} <= set(fallen_back)


@fails_to_read
@pytest.mark.usefixtures('_collected')
def test_two_damaged_ones_are_passed_over(tmp_path, experiment, three):
  folder = shutil.copytree(three, tmp_path / 'checkpoints')
  shutil.rmtree(folder / '3' / 'state')
  halve(folder / '2' / 'state' / 'manifest.ocdbt')
  said: list[str] = []
  with Checkpoints(folder, 3, said.append) as checkpoints:
    _, step = checkpoints.restore_newest(experiment.abstract_state)
    assert checkpoints.latest_step() == step == 1
    # A new one takes the place of the damaged.
    checkpoints.save(experiment.new_state(), 2, {'top1': 0.5})
  assert [line.split(' (')[0] for line in said] == [f'checkpoint {n} is damaged' for n in (3, 2)]
  assert saved_steps(folder) == [1, 2]


def test_when_none_can_be_read_none_is_touched(tmp_path, experiment, three):
  folder = shutil.copytree(three, tmp_path / 'checkpoints')
  for step in (1, 2, 3):
    (folder / str(step) / 'check' / 'metadata').unlink()
  before = contents(folder)
  none = pytest.raises(
    RunError, match=r'none of the checkpoints 3, 2, 1 in .* can be read: .*a backup'
  )
  with Checkpoints(folder) as checkpoints, none:
    checkpoints.restore_newest(experiment.abstract_state)
  assert contents(folder) == before


def test_arrays_that_were_exchanged_are_noticed(tmp_path, experiment, three):
  folder = shutil.copytree(three, tmp_path / 'checkpoints')
  shutil.rmtree(folder / '3' / 'state')
  shutil.copytree(folder / '1' / 'state', folder / '3' / 'state')
  exchanged = pytest.raises(RunError, match='its arrays are not those that were saved')
  with Checkpoints(folder) as checkpoints, exchanged:
    checkpoints.restore(3, experiment.abstract_state)


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    (lambda c: setattr(c, 'average_decay', 0.9), 'average.conv.kernel: none there, float32'),
    (lambda c: c.model.update(attention='se'), 'params.attention'),
    (
      lambda c: c.model.update(num_classes=4),
      r'params.head.bias: float32\[3\] there, float32\[4\]',
    ),
  ],
)
def test_other_arrays_are_told_from_damage(tmp_path, tiny_config, three, change, named):
  folder = shutil.copytree(three, tmp_path / 'checkpoints')
  before = contents(folder)
  change(tiny_config)
  like = Experiment(tiny_config).abstract_state
  with Checkpoints(folder) as checkpoints, pytest.raises(RunError, match=named) as error:
    checkpoints.restore_newest(like)
  assert 'it holds other arrays than this network and optimizer have' in str(error.value)
  assert 'use the version of cbam_jax and the configuration that wrote it' in str(error.value)
  assert 'backup' not in str(error.value)
  assert contents(folder) == before


@pytest.mark.parametrize('text', ['', '{', '[]', '{"top1": "high"}', '{"top1": NaN}', '{"top": 1}'])
def test_a_checkpoint_whose_metrics_are_damaged_is_not_the_best(tmp_path, three, text):
  folder = shutil.copytree(three, tmp_path / 'checkpoints')
  (folder / '3' / 'metrics' / 'metrics').write_text(text)
  assert best_step(folder) == 2
  said: list[str] = []
  with Checkpoints(folder, 3, said.append) as checkpoints:
    assert checkpoints.best_step() == checkpoints.latest_step() == 2
  assert said == ['checkpoint 3 is damaged (its metrics cannot be read)']
