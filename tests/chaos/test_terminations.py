"""SIGTERM, by which machines are taken away, and Ctrl-C: a checkpoint, exit status 0, in time."""

import os
import signal
import time

import pytest

from tests.chaos.runs import assert_same_run, logged, saved_steps

pytestmark = pytest.mark.chaos

# Machines are taken away 30 s after the signal.
NOTICE_SECONDS = 30


def terminate(trainer, workdir, when, *arguments) -> str:
  """Starts a training and sends SIGTERM; returns what it has printed."""
  with trainer.start(workdir, *arguments) as training:
    training.wait_until(lambda: when(training))
    started = time.monotonic()
    training.signal(signal.SIGTERM)
    assert training.wait() == 0, training.output()
    assert time.monotonic() - started < NOTICE_SECONDS
    assert 'Traceback' not in training.output()
    return training.output()


@pytest.mark.slow
def test_a_preempted_run_saves_and_goes_on(trainer, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  rare = '--config.checkpoints.every_steps=1000'
  said = terminate(trainer, workdir, lambda _: logged(workdir), rare)
  (step,) = saved_steps(workdir)
  assert 3 <= step < 22
  assert f'Interrupted: step {step} is saved. Run the same command again' in said
  assert f'going on from step {step}' in trainer.complete(workdir, rare)
  assert_same_run(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_ctrl_c_saves_and_the_run_goes_on(trainer, undisturbed, tmp_path, workers):
  """A terminal sends it to the whole group of processes, workers included."""
  workdir = tmp_path / 'run'
  options = '--config.checkpoints.every_steps=1000', f'--config.data.workers={workers}'
  # What is started in the background ignores it.
  hearing = ('env', '--default-signal=INT')
  with trainer.start(workdir, *options, prefix=hearing) as training:
    training.wait_until(lambda: logged(workdir))
    os.killpg(training.process.pid, signal.SIGINT)
    assert training.wait() == 128 + signal.SIGINT, training.output()
    said = training.output()
  (step,) = saved_steps(workdir)
  assert 3 <= step < 22
  assert 'Stopping after this step' in said
  assert f'Interrupted: step {step} is saved' in said
  assert 'Traceback' not in said
  assert f'going on from step {step}' in trainer.complete(workdir, *options)
  assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_sigterm_during_compilation(trainer, undisturbed, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'false')
  workdir = tmp_path / 'run'
  terminate(trainer, workdir, lambda training: 'starting, 22 steps' in training.output())
  # It was the first step's, after which the run could stop.
  assert saved_steps(workdir) == [1]
  trainer.complete(workdir)
  assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_sigterm_during_an_evaluation(trainer, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  many = '--config.eval_batch_size=1'

  def evaluating(training) -> bool:
    return any(entry['step'] == 22 for entry in logged(workdir))

  said = terminate(trainer, workdir, evaluating, many)
  assert 'Interrupted: step 22 is saved' in said
  assert logged(workdir, 'test') == []
  trainer.complete(workdir)
  assert_same_run(workdir, undisturbed)
  assert (workdir / 'checkpoints' / '22' / 'metrics' / 'metrics').is_file()


@pytest.mark.slow
def test_a_preempted_run_of_two_processes_saves_and_goes_on(trainer, undisturbed, tmp_path):
  workdir = tmp_path / 'run'
  rare = '--config.checkpoints.every_steps=1000'
  with trainer.start_several(workdir, rare) as trainings:
    trainings[0].wait_until(lambda: logged(workdir))
    started = time.monotonic()
    trainings[1].signal(signal.SIGTERM)
    assert [training.wait() for training in trainings] == [0, 0], trainings[0].output()
    assert time.monotonic() - started < NOTICE_SECONDS
  (step,) = saved_steps(workdir)
  assert 3 <= step < 22
  assert f'going on from step {step}' in trainer.complete_several(workdir, rare)
  assert saved_steps(workdir)[-1] == 22
  assert logged(workdir, 'test')[-1]['count'] == 360
