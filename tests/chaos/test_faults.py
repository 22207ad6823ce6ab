"""What disks, people and numbers do to a run: damage, no space, a second run, infinities."""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest

from tests.chaos.runs import assert_same_run, logged, saved_steps

pytestmark = pytest.mark.chaos


def halve(file) -> None:
  os.truncate(file, file.stat().st_size // 2)


def flip(file) -> None:
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 8
  file.write_bytes(content)


def largest_file(folder):
  return max((file for file in folder.rglob('*') if file.is_file()), key=lambda f: f.stat().st_size)


@pytest.fixture
def halfway(undisturbed, tmp_path):
  """A copy of a run that was killed after step 20."""
  workdir = shutil.copytree(undisturbed, tmp_path / 'run')
  assert saved_steps(workdir) == [20, 22]
  shutil.rmtree(workdir / 'checkpoints' / '22')
  return workdir


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(trainer, undisturbed, tmp_path):
  workdir = shutil.copytree(undisturbed, tmp_path / 'run')
  halve(largest_file(workdir / 'checkpoints' / '22'))
  said = trainer.complete(workdir)
  assert 'checkpoint 22 is damaged (' in said
  assert 'going on from checkpoint 20 instead' in said
  assert (workdir / 'damaged' / '22').is_dir()
  assert_same_run(workdir, undisturbed)
  assert logged(workdir) == logged(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('damage', 'name'),
  [
    (flip, 'state/_METADATA'),
    (os.remove, 'state/manifest.ocdbt'),
    (halve, 'check/metadata'),
    (halve, 'metrics/metrics'),
  ],
)
def test_any_damaged_part_is_survived(trainer, undisturbed, tmp_path, damage, name):
  workdir = shutil.copytree(undisturbed, tmp_path / 'run')
  damage(workdir / 'checkpoints' / '22' / name)
  said = trainer.complete(workdir)
  assert 'checkpoint 22 is damaged (' in said
  assert_same_run(workdir, undisturbed)


# ---- a full disk -----------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, kilobytes: int):
  """Mounts a disk at `folder`; skips the test where that is not allowed."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', str(folder)]
  try:
    made = subprocess.run(mount, capture_output=True, text=True, timeout=20)
  except FileNotFoundError:
    pytest.skip('there is no mount command to make a small disk with')
  if made.returncode:
    pytest.skip(f'a small disk cannot be mounted here: {made.stderr.strip()}')
  try:
    yield
  finally:
    subprocess.run(['umount', '--lazy', str(folder)], check=True, timeout=20)


# Room for one checkpoint; for none; for hardly any file.
@pytest.mark.parametrize(
  ('kilobytes', 'saved'),
  [(700, [2]), (200, []), (12, [])],
)
@pytest.mark.slow
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(
  trainer, undisturbed, tmp_path, kilobytes, saved
):
  disk = tmp_path / 'disk'
  workdir = disk / 'run'
  with small_disk(disk, kilobytes):
    status, said = trainer.run(workdir)
    assert status == 1, said
    assert 'cbam-jax train: ' in said
    assert 'No space left on device' in said
    assert 'Make room or restore access, then run the same command again.' in said
    assert saved_steps(workdir) == saved
    subprocess.run(['mount', '-o', 'remount,size=50m', str(disk)], check=True, timeout=20)
    said = trainer.complete(workdir)
    assert (f'going on from step {saved[-1]}' if saved else 'starting') in said
    assert_same_run(workdir, undisturbed)
    assert logged(workdir) == logged(undisturbed)


# ---- two runs in one folder ------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(trainer, tmp_path):
  workdir = tmp_path / 'run'
  with trainer.start(workdir) as first:
    first.wait_until(lambda: 'starting' in first.output())
    first.signal(signal.SIGSTOP)  # alive, and no further
    before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
    status, said = trainer.run(workdir)
    assert status == 2, said
    assert f'{workdir} is in use by another run (process {first.process.pid} on ' in said
    assert 'choose another --workdir' in said
    assert {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()} == before
    first.signal(signal.SIGKILL)
    first.wait()
    with trainer.start(workdir) as second:
      second.wait_until(lambda: 'starting, 22 steps' in second.output())


# ---- numbers that are not finite -------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_whole(
  trainer, undisturbed, halfway, tmp_path
):
  enormous = '--config.optimizer.learning_rate=1e30'
  status, said = trainer.run(halfway, enormous)
  assert status == 1, said
  assert 'the loss or the gradient is not finite at step 2' in said
  assert 'Traceback' not in said
  assert saved_steps(halfway) == [20]
  trainer.complete(halfway)
  assert_same_run(halfway, undisturbed)


@pytest.mark.slow
def test_as_many_steps_as_allowed_are_passed_over(trainer, tmp_path):
  options = ('--config.optimizer.learning_rate=1e30', '--config.skip_nonfinite=3')
  status, said = trainer.run(tmp_path / 'run', *options)
  assert status == 1, said
  assert said.count('had no finite loss or gradient and was passed over') == 3
  assert 'nor in the 3 steps before it' in said
