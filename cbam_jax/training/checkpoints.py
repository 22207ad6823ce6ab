"""Checkpoints of a run: the latest few and the best, written by orbax in the background."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers as policies

from cbam_jax.errors import RunError, UserError
from cbam_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints of one run, numbered by step; a context that waits for pending writes.

  Attributes:
    directory: The folder that holds them. Damaged ones are moved to `damaged/` beside it.
  """

  def __init__(
    self,
    directory: Path,
    keep: int = 2,
    say: Callable[[str], None] = lambda text: None,
    *,
    read_only: bool = False,
  ):
    """Opens `directory`, which is made if need be.

    Args:
      directory: The folder.
      keep: How many of the latest are kept, beside the best.
      say: Told of every damaged checkpoint.
      read_only: Whether to leave everything as it is, for a run may be writing there.

    Raises:
      UserError: If `directory` is to be read only and is not there.
    """
    self.directory = directory.absolute()
    self._say = say
    if not read_only:
      self._leave_out_unreadable()
    elif not self.directory.is_dir():
      raise self._nothing_evaluated()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        best_fn=_top1,
        keep_checkpoints_without_metrics=False,
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False),
          ]
        ),
        read_only=read_only,
        create=not read_only,
        # What a killed process left half written.
        cleanup_tmp_directories=not read_only,
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
      step: Its step.
      metrics: Its test metrics, of which 'top1' tells the best; None if it was not evaluated.
        A checkpoint of this step is replaced.

    Raises:
      RunError: If this or an earlier checkpoint could not be written.
    """
    check = {'fingerprint': int(jax.device_get(fingerprint(state)))}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), check=ocp.args.JsonSave(check))
    try:
      self._manager.check_for_errors()
      # The guard that the loop keeps is against transfers by mistake.
      with jax.transfer_guard('allow'):
        if step in self._manager.all_steps():
          self._manager.delete(step)
        self._manager.save(step, args=items, metrics=metrics)
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
    step = self._manager.best_step()
    if step is None:
      raise self._nothing_evaluated()
    return step

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, with the shapes, types and shardings of `like`.

    Raises:
      RunError: If what is read is not what was written.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract), check=ocp.args.JsonRestore()
    )
    restored = self._manager.restore(step, args=items)
    state: TrainState = restored['state']
    if int(jax.device_get(fingerprint(state))) != restored['check']['fingerprint']:
      raise RunError(
        f'checkpoint {step} in {self.directory} does not hold the arrays that were saved; go on '
        'with the training, which takes an older one, or restore it from a backup.'
      )
    return state

  def restore_newest(self, like: TrainState) -> tuple[TrainState, int] | None:
    """The newest checkpoint that can be read and its step; None if there is none at all.

    Those that cannot are named, and moved to `damaged/` once an older one has been read.

    Raises:
      RunError: If there are checkpoints but none can be read.
    """
    failures: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self.restore(step, like)
      except Exception as error:
        failures[step] = _first_line(error)
        continue
      for damaged, reason in failures.items():
        self._say(
          f'checkpoint {damaged} is damaged ({reason}); going on from checkpoint {step} instead'
        )
        self._set_aside(self.directory / str(damaged))
      if failures:
        self._manager.reload()
      return state, step
    if failures:
      listed = '; '.join(f'{step}: {reason}' for step, reason in failures.items())
      raise RunError(
        f'none of the checkpoints in {self.directory} can be read ({listed}). Restore one from a '
        'backup, or start anew in another --workdir.'
      )
    return None

  def _leave_out_unreadable(self) -> None:
    """Moves checkpoints aside whose metrics orbax would fail on when it opens the folder."""
    for metrics in self.directory.glob('*/metrics/metrics'):
      try:
        json.loads(metrics.read_text())
      except ValueError as error:
        self._say(f'checkpoint {metrics.parent.parent.name} is damaged ({error}); left out')
        self._set_aside(metrics.parent.parent)

  def _set_aside(self, checkpoint: Path) -> None:
    if jax.process_index() == 0:
      aside = self.directory.parent / 'damaged' / checkpoint.name
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      shutil.move(checkpoint, aside)

  def _nothing_evaluated(self) -> UserError:
    return UserError(
      f'{self.directory} holds no evaluated checkpoint; train first (cbam-jax train), or name the '
      'workdir of a run that has saved one.'
    )

  def _cannot_write(self, error: Exception) -> RunError:
    return RunError(
      f'a checkpoint could not be written to {self.directory} ({_first_line(error)}); the earlier '
      'ones are whole. Make room or restore access, then run the same command again.'
    )


@jax.jit
def fingerprint(state: TrainState) -> jax.Array:
  """A 32-bit checksum of every array of `state`, the same however it is sharded."""
  total = jnp.zeros((), jnp.uint32)
  for number, array in enumerate(jax.tree.leaves(state)):
    words = array if array.dtype == jnp.int32 else array.astype(jnp.float32)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(-1)
    # Odd factors, so that a change of any single bit, or a swap of two elements, shows.
    factors = 2 * lax.iota(jnp.uint32, words.size) + np.uint32(2 * number + 1)
    total += jnp.sum(words * factors, dtype=jnp.uint32)
  return total


def _top1(metrics: dict[str, Any]) -> float:
  return metrics['top1']


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
