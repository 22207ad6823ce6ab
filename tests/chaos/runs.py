"""Real training processes that the tests start, kill and start again, and what they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cbam_jax.training.experiment import Experiment
from cbam_jax.training.state import TrainState
from cbam_jax.training.stored import restore
from cbam_jax.training.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]

# Far above what anything here takes, even on a busy machine.
TIMEOUT = 240


class Training:
  """A process that trains, or one of several.

  Attributes:
    process: The process.
  """

  def __init__(self, process: subprocess.Popen[bytes], output: Path):
    self.process = process
    self._output = output

  def output(self) -> str:
    """What it has printed so far."""
    return self._output.read_text(errors='replace')

  def wait_until(self, seen: Callable[[], Any], seconds: float = TIMEOUT) -> None:
    """Waits until `seen()` while the process lives."""
    deadline = time.monotonic() + seconds
    while not seen():
      assert self.process.poll() is None, f'ended with {self.process.returncode}:\n{self.output()}'
      assert time.monotonic() < deadline, f'nothing seen in {seconds} s:\n{self.output()}'
      time.sleep(0.002)

  def wait(self, seconds: float = TIMEOUT) -> int:
    """Waits for the end; returns the exit status."""
    return self.process.wait(seconds)

  def signal(self, number: signal.Signals) -> None:
    """Sends a signal, unless the process has ended already."""
    self.process.send_signal(number)


@dataclasses.dataclass(frozen=True)
class Trainer:
  """Starts trainings of `small_digits.py`.

  Attributes:
    scratch: A folder for output.
    compiled: A folder for compiled programs.
  """

  scratch: Path
  compiled: Path

  @contextlib.contextmanager
  def start(
    self, workdir: Path, *arguments: str, devices: int = 1, prefix: tuple[str, ...] = ()
  ) -> Iterator[Training]:
    """A context with `python train.py` under way in `workdir`; it does not outlive the context.

    Args:
      workdir: The run's folder.
      *arguments: Further arguments of train.py.
      devices: CPU devices of the process.
      prefix: What stands before the command.
    """
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_backend_optimization_level=0'
      f' --xla_force_host_platform_device_count={devices}',
      'JAX_COMPILATION_CACHE_DIR': str(self.compiled),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'PYTHONUNBUFFERED': '1',
    }
    command = [*prefix, sys.executable, 'train.py', '--config=tests/chaos/small_digits.py']
    output = self.scratch / f'output{len(list(self.scratch.iterdir()))}.txt'
    with output.open('wb') as file:
      process = subprocess.Popen(
        [*command, f'--workdir={workdir}', *arguments],
        cwd=ROOT,
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    try:
      yield Training(process, output)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  @contextlib.contextmanager
  def start_several(
    self, workdir: Path, *arguments: str, processes: int = 2, devices: int = 2
  ) -> Iterator[list[Training]]:
    """A context with a run of several processes under way, each of so many devices."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
      yield [
        stack.enter_context(
          self.start(
            workdir,
            f'--coordinator=127.0.0.1:{port}',
            f'--num-processes={processes}',
            f'--process-id={i}',
            *arguments,
            devices=devices,
          )
        )
        for i in range(processes)
      ]

  def complete_several(self, workdir: Path, *arguments: str, **options: Any) -> str:
    """A run of several processes to its good end; returns what the first has printed."""
    with self.start_several(workdir, *arguments, **options) as trainings:
      for training in trainings:
        assert training.wait() == 0, training.output()
      return trainings[0].output()

  def run(self, workdir: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    """A training to its end: its exit status, and what it has printed."""
    with self.start(workdir, *arguments, **options) as training:
      return training.wait(), training.output()

  def complete(self, workdir: Path, *arguments: str, **options: Any) -> str:
    """A training to its end, which must be a good one; returns what it has printed."""
    status, output = self.run(workdir, *arguments, **options)
    assert status == 0, output
    return output


def saved_steps(workdir: Path) -> list[int]:
  """The steps of the checkpoints in a run's folder."""
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit())


def unfinished(workdir: Path) -> list[Path]:
  """What a save has begun and not committed."""
  return list((workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*'))


def final_state(workdir: Path) -> TrainState:
  """The newest state."""
  folder = Workdir(workdir)
  like = Experiment(folder.config()).abstract_state
  return restore(folder.checkpoints / str(saved_steps(workdir)[-1]), like)


def logged(workdir: Path, split: str | None = None) -> list[dict[str, Any]]:
  """metrics.jsonl, without what depends on the clock; nothing if it is not there yet."""
  file = workdir / 'metrics.jsonl'
  lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  for entry in lines:
    entry.pop('images_per_second', None)
    entry.pop('input_wait', None)
  return [entry for entry in lines if split in (None, entry['split'])]


def assert_same_run(one: Path, other: Path) -> None:
  """The same steps, metrics, parameters, batch statistics and optimizer state, to the last bit."""
  assert saved_steps(one)[-1] == saved_steps(other)[-1]
  assert logged(one, 'test') == logged(other, 'test')
  jax.tree.map(np.testing.assert_array_equal, final_state(one), final_state(other))
