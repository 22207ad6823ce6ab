"""One run on one process or several, on few devices or many, from start to end or by turns."""

import signal
import time

import pytest

from cbam_jax.training.distributed import HEARTBEAT_SECONDS
from tests.chaos.runs import TIMEOUT, logged, saved_steps

pytestmark = pytest.mark.chaos

# At the full learning rate rounding alone, as between two optimisation levels of the compiler on
# one device, grows past 1e-5 in ten steps. Another batch shows at any rate.
TEN_STEPS = (
  f'--config.epochs={10 / 22}',
  '--config.optimizer.learning_rate=0.002',
  '--config.log_every_steps=1',
)


def assert_same_losses(one, other, tolerance: float = 1e-5) -> None:
  """The same steps were logged in both folders, the test set was counted once, and all agrees."""
  for split in ('train', 'test'):
    entries, others = logged(one, split), logged(other, split)
    assert [entry['step'] for entry in entries] == [entry['step'] for entry in others]
    losses = [entry['loss'] for entry in entries]
    assert losses == pytest.approx([entry['loss'] for entry in others], rel=0, abs=tolerance)
  assert {entry['count'] for entry in logged(one, 'test') + logged(other, 'test')} == {360}


@pytest.mark.slow
@pytest.mark.parametrize('devices', [4, 1])
def test_two_processes_train_as_one(trainer, tmp_path, devices):
  """Two of two devices each."""
  two, one = tmp_path / 'two', tmp_path / 'one'
  said = trainer.complete_several(two, *TEN_STEPS)
  assert '10 steps of 64 images on 4 x cpu' in said
  trainer.complete(one, *TEN_STEPS, devices=devices)
  assert [entry['step'] for entry in logged(two, 'train')] == list(range(1, 11))
  assert_same_losses(two, one)


@pytest.mark.slow
@pytest.mark.parametrize('fsdp', [1, 2])
def test_a_run_goes_on_with_other_devices_and_processes(trainer, tmp_path, fsdp):
  """Four devices, then two processes of two, then two devices, then one."""
  whole, turns = tmp_path / 'whole', tmp_path / 'turns'
  often = (*TEN_STEPS, '--config.checkpoints.every_steps=1')
  split = (*often, f'--config.mesh.fsdp={fsdp}')
  trainer.complete(whole, *split, devices=4)

  def kill_after(trainings, step: int, where: str) -> None:
    trainings[0].wait_until(lambda: max(saved_steps(turns), default=0) >= step)
    for training in trainings:
      training.signal(signal.SIGKILL)
      training.wait()
    assert f'on {where} x cpu' in trainings[0].output()

  with trainer.start(turns, *split, devices=4) as training:
    kill_after([training], 2, '4')
  with trainer.start_several(turns, *split) as trainings:
    kill_after(trainings, 4, '4')
  with trainer.start(turns, *split, devices=2) as training:
    kill_after([training], 6, '2')
  assert 'on 1 x cpu' in trainer.complete(turns, *often)
  assert_same_losses(turns, whole)


# The first process holds what keeps them together, so that its death is known at once.
@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_when_a_process_dies_the_others_end_and_the_run_can_go_on(trainer, tmp_path, victim):
  workdir = tmp_path / 'run'
  with trainer.start_several(workdir) as trainings:
    trainings[0].wait_until(lambda: saved_steps(workdir))
    trainings[victim].signal(signal.SIGKILL)
    started = time.monotonic()
    other = trainings[1 - victim]
    assert other.wait(TIMEOUT) != 0
    assert time.monotonic() - started < 2 * HEARTBEAT_SECONDS
    assert 'another task died' in other.output()
  step = saved_steps(workdir)[-1]
  assert step < 22
  assert f'going on from step {step}' in trainer.complete_several(workdir)
  assert saved_steps(workdir)[-1] == 22


@pytest.mark.slow
def test_a_second_run_of_several_processes_is_refused_as_a_whole(trainer, tmp_path):
  workdir = tmp_path / 'run'
  with trainer.start(workdir) as first:
    first.wait_until(lambda: 'starting' in first.output())
    first.signal(signal.SIGSTOP)
    with trainer.start_several(workdir) as trainings:
      assert trainings[0].wait() == 2
      assert trainings[1].wait() != 0
      assert 'is in use by another run' in trainings[0].output()
