"""Evaluation of a finished or running training."""

from __future__ import annotations

from typing import Any

import jax
import ml_collections

from cbam_jax.training.experiment import Experiment
from cbam_jax.training.stored import CheckpointError, best_step, restore
from cbam_jax.training.workdir import Workdir


def evaluate(workdir: str) -> dict[str, Any]:
  """Evaluates the best checkpoint of `workdir` on every test example.

  Returns:
    'step' of the checkpoint, 'loss', 'top1' and 'top5' (fractions of 1), 'count' of examples.

  A run may be writing there; it is left alone.

  Raises:
    UserError: If the folder holds no run, or the run has no checkpoint yet.
    CheckpointError: If the checkpoint is damaged, or of another network.
  """
  folder = Workdir(workdir)
  experiment = Experiment(_for_evaluation(folder.config()))
  step = best_step(folder.checkpoints)
  while True:
    try:
      state = restore(folder.checkpoints / str(step), experiment.abstract_state)
      break
    except CheckpointError:
      # The run may have found a better one meanwhile, and dropped this.
      if (now := best_step(folder.checkpoints)) == step:
        raise
      step = now
  return {'step': step, **(experiment.evaluate(state.variables) or {})}


def _for_evaluation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`config` without what only training asks of the devices, which may be others here."""
  devices = jax.device_count()
  batch_size = -(config.eval_batch_size // -devices) * devices
  config.update(batch_size=batch_size, eval_batch_size=batch_size, accumulate=1)
  config.mesh.fsdp = 1
  config.model.group_size = None
  return config
