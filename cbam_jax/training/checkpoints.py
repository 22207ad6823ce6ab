"""Checkpoints of a run: the latest few and the best, written by orbax in the background."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl.logging import get_absl_logger
from orbax.checkpoint import checkpoint_managers as policies

from cbam_jax.errors import RunError
from cbam_jax.training.distributed import from_first, wait_for_all
from cbam_jax.training.state import TrainState
from cbam_jax.training.stored import (
  CHECK,
  METRICS,
  STATE,
  CheckpointError,
  best_step,
  fingerprint,
  read_metrics,
  remedy,
  restore,
  root_cause,
)


class Checkpoints:
  """The checkpoints of one run, numbered by step; a context that waits for pending writes.

  All processes of a run must make the same calls.

  Attributes:
    directory: The folder that holds them. Damaged ones are moved to `damaged/` beside it.
  """

  def __init__(
    self, directory: Path, keep: int = 2, say: Callable[[str], None] = lambda text: None
  ):
    """Opens `directory`, which is made if need be.

    Args:
      directory: The folder.
      keep: How many of the latest are kept, beside the best.
      say: Told of every damaged checkpoint.
    """
    self.directory = directory.absolute()
    self._say = say
    get_absl_logger().addFilter(_is_news)
    self._leave_out_unreadable()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
          ]
        ),
        # What a killed process left half written.
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    try:
      self._close(error)
    finally:
      get_absl_logger().removeFilter(_is_news)

  def _close(self, error: BaseException | None) -> None:
    if error is not None:
      # What broke the run is what the user must read, not what else breaks while closing.
      try:
        self._manager.close()
      except Exception as closing:
        self._say(f'the last checkpoint could not be finished: {closing}')
      return
    self.wait()
    self._manager.close()

  def save(self, state: TrainState, step: int, metrics: dict[str, float] | None = None) -> None:
    """Starts writing `state`; returns once the devices' memory has been copied.

    Args:
      state: What to save.
      step: Its step, after all that are saved. A checkpoint of this very step is left as it is,
        and only given the metrics.
      metrics: Its test metrics, of which 'top1' tells the best; None if it was not evaluated.

    Raises:
      RunError: If this or an earlier checkpoint could not be written.
    """
    try:
      self._manager.check_for_errors()
      # The guard that the loop keeps is against transfers by mistake.
      with jax.transfer_guard('allow'):
        if step in self._manager.all_steps():
          self._add_metrics(step, metrics)
          return
        check = {'fingerprint': int(jax.device_get(fingerprint(state)))}
        items: dict[str, Any] = {
          STATE: ocp.args.StandardSave(state),
          CHECK: ocp.args.JsonSave(check),
        }
        if metrics is not None:
          items[METRICS] = ocp.args.JsonSave(metrics)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
    except Exception as error:
      raise self._cannot_write(error) from error

  def wait(self) -> None:
    """Returns once everything is written.

    Raises:
      RunError: If a checkpoint could not be written.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._cannot_write(error) from error

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int:
    """The step of the checkpoint with the highest top-1.

    Raises:
      UserError: If there is no checkpoint with test metrics.
    """
    return best_step(self.directory)

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, with the shapes, types and shardings of `like`.

    Raises:
      CheckpointError: If what is read is not what was written.
    """
    return restore(self.directory / str(step), like)

  def restore_newest(self, like: TrainState) -> tuple[TrainState, int] | None:
    """The newest checkpoint that all processes can read and its step; None if there is none.

    Those that cannot be read are named, and moved to `damaged/` once an older one has been read.

    Raises:
      RunError: If there are checkpoints but none can be read.
    """
    failures: dict[int, str] = {}
    while True:
      # A shared disk may show the processes different folders for a while: the first one's count.
      left = set(self._manager.all_steps()) - failures.keys()
      step = from_first(max(left, default=-1))
      if step < 0:
        break
      try:
        state = self.restore(step, like)
      except CheckpointError as error:
        failures[step] = error.reason
        continue
      for damaged, reason in failures.items():
        self._say(
          f'checkpoint {damaged} is damaged ({reason}); going on from checkpoint {step} instead'
        )
        if jax.process_index() == 0:
          self._set_aside(self.directory / str(damaged))
      if failures:
        wait_for_all('damaged checkpoints are set aside')
        self._manager.reload()
      return state, step
    if failures:
      reasons = list(dict.fromkeys(failures.values()))
      raise RunError(
        f'none of the checkpoints {", ".join(map(str, failures))} in {self.directory} can be read: '
        f'{"; ".join(reasons)}; {remedy(reasons)}'
      )
    return None

  def _add_metrics(self, step: int, metrics: dict[str, float] | None) -> None:
    """Gives metrics to a checkpoint that has none, which stays whole whatever happens."""
    if metrics is not None:
      with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=METRICS)) as writer:
        folder = self.directory / str(step) / METRICS
        writer.save(folder, args=ocp.args.JsonSave(metrics), force=True)
      self._manager.reload()

  def _leave_out_unreadable(self) -> None:
    """Moves checkpoints aside whose metrics orbax would fail on when it opens the folder."""
    if jax.process_index() == 0:
      for metrics in self.directory.glob(f'*/{METRICS}/{METRICS}'):
        checkpoint = metrics.parent.parent
        if checkpoint.name.isdigit() and read_metrics(checkpoint) is None:
          self._say(f'checkpoint {checkpoint.name} is damaged (its metrics cannot be read)')
          self._set_aside(checkpoint)
    wait_for_all('checkpoints with damaged metrics are set aside')

  def _set_aside(self, checkpoint: Path) -> None:
    aside = self.directory.parent / 'damaged' / checkpoint.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    shutil.move(checkpoint, aside)

  def _cannot_write(self, error: Exception) -> RunError:
    return RunError(
      f'a checkpoint could not be written to {self.directory} ({root_cause(error)}); the earlier '
      'ones are whole. Make room or restore access, then run the same command again.'
    )


def _is_news(record: logging.LogRecord) -> bool:
  """False for the tracebacks of errors that orbax both logs and raises."""
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


def _top1(metrics: dict[str, Any]) -> float:
  return metrics['top1']
