"""Checkpoints of a run: the latest few and the best, written by orbax."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from cbam_jax.errors import UserError
from cbam_jax.training.state import TrainState


class Checkpoints:
  """The checkpoints of one run, numbered by step; a context that waits for pending writes.

  Attributes:
    directory: The folder that holds them.
  """

  def __init__(self, directory: Path, keep: int = 2):
    """Opens `directory`, which is made if need be, to keep the `keep` latest and the best."""
    self.directory = directory
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        best_fn=_top1,
        preservation_policy=policies.AnyPreservationPolicy(
          [policies.LatestN(keep), policies.BestN(get_metric_fn=_top1, n=1)]
        ),
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
    self._manager.close()

  def save(self, state: TrainState, step: int, metrics: dict[str, float]) -> None:
    """Starts writing `state`; returns once the devices' memory has been copied."""
    self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics)

  def latest_step(self) -> int | None:
    """The step of the newest checkpoint; None if there is none."""
    return self._manager.latest_step()

  def best_step(self) -> int:
    """The step of the checkpoint with the highest top-1.

    Raises:
      UserError: If there is no checkpoint.
    """
    step = self._manager.best_step()
    if step is None:
      raise UserError(
        f'{self.directory} holds no checkpoint; train first (cbam-jax train), or name the workdir '
        'of a run that has saved one.'
      )
    return step

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state saved at `step`, with the shapes, types and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))


def _top1(metrics: dict[str, float]) -> float:
  return metrics['top1']
