"""SIGKILL and SIGTERM at any moment: a run that is started again ends as if nothing had been."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.runs import assert_same_run, logged, saved_steps, unfinished

pytestmark = pytest.mark.chaos


def kill(trainer, workdir, when, *arguments) -> bool:
  """Starts a training and kills it; whether that left a checkpoint half written."""
  with trainer.start(workdir, *arguments) as training:
    when(training)
    training.signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL, training.output()
  return bool(unfinished(workdir))


def after(seconds: float):
  """A moment so many seconds after the start."""
  return lambda training: time.sleep(seconds)


def in_training(workdir, seconds: float):
  """A moment so many seconds after the first checkpoint that the process has written."""
  before = saved_steps(workdir)

  def wait(training) -> None:
    training.wait_until(lambda: saved_steps(workdir) != before)
    time.sleep(seconds)

  return wait


def in_a_save(workdir):
  """The moment when a checkpoint, not the first of the process, is being written."""
  first = in_training(workdir, 0)

  def wait(training) -> None:
    first(training)
    training.wait_until(lambda: unfinished(workdir))

  return wait


def test_a_run_that_is_killed_ends_as_one_that_is_not(trainer, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  assert kill(trainer, workdir, in_a_save(workdir))
  kill(trainer, workdir, in_training(workdir, random.Random(1).uniform(0, 0.2)))
  trainer.complete(workdir)
  assert_same_run(workdir, undisturbed)
  assert logged(workdir) == logged(undisturbed)


def children(pid: int) -> list[int]:
  """The processes that a process has started; skips the test where the system does not tell."""
  lists = list(Path(f'/proc/{pid}/task').glob('*/children'))  # one for each thread
  if not lists:
    pytest.skip('this system does not list the children of a process')
  return [int(child) for file in lists for child in file.read_text().split()]


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that has ended and is not yet cleared away does not."""
  try:
    return Path(f'/proc/{pid}/stat').read_text().rsplit(')')[1].split()[0] != 'Z'
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.mark.slow
def test_workers_do_not_outlive_a_kill(trainer, tmp_path):
  workdir = tmp_path / 'run'
  with trainer.start(workdir, '--config.data.workers=2') as training:
    training.wait_until(lambda: logged(workdir))
    workers = children(training.process.pid)
    assert len(workers) >= 2
    training.signal(signal.SIGKILL)
    training.wait()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)):
      assert time.monotonic() < deadline, 'workers outlive the training'
      time.sleep(0.05)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(trainer, tmp_path):
  long = ('--config.epochs=20',)
  whole, workdir = tmp_path / 'whole', tmp_path / 'killed'
  trainer.complete(whole, *long)
  chance = random.Random(20)
  kinds = [0] * 4 + [1] * 8 + [2] * 8
  chance.shuffle(kinds)
  half_written = 0
  for kind in kinds:
    if kind == 0:
      moment = after(chance.uniform(0, 5))
    elif kind == 1:
      moment = in_training(workdir, chance.uniform(0, 0.5))
    else:
      moment = in_a_save(workdir)
    half_written += kill(trainer, workdir, moment, *long)
  assert half_written >= 4
  assert 0 < saved_steps(workdir)[-1] < saved_steps(whole)[-1]
  trainer.complete(workdir, *long)
  assert_same_run(workdir, whole)
  assert logged(workdir) == logged(whole)
