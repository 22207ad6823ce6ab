"""Evaluation of a finished or running training."""

from __future__ import annotations

from typing import Any

from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.workdir import Workdir


def evaluate(workdir: str) -> dict[str, Any]:
  """Evaluates the best checkpoint of `workdir` on every test example.

  Returns:
    'step' of the checkpoint, 'loss', 'top1' and 'top5' (fractions of 1), 'count' of examples.

  Raises:
    UserError: If the folder holds no run, or the run has no checkpoint yet.
  """
  folder = Workdir(workdir)
  experiment = Experiment(folder.config())
  with Checkpoints(folder.checkpoints) as checkpoints:
    step = checkpoints.best_step()
    state = checkpoints.restore(step, experiment.abstract_state)
  return {'step': step, **(experiment.evaluate(state.variables) or {})}
