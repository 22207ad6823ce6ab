"""The paper's optimizer, SGD with coupled weight decay, and the learning rate over a run."""

from __future__ import annotations

from typing import Any

import jax
import optax

from cbam_jax.errors import check_choice

SCHEDULES = ('step', 'cosine')
DECAYS = ('all', 'kernels')


def learning_rate_schedule(
  kind: str,
  peak: float,
  *,
  steps_per_epoch: int,
  epochs: float,
  step_epochs: float = 30,
  warmup_epochs: float = 0.0,
) -> optax.Schedule:
  """The learning rate at each step.

  Args:
    kind: 'step' (times 0.1 every `step_epochs`, the paper's) or 'cosine' (to 0 at the end).
    peak: The rate after the warm-up.
    steps_per_epoch: Steps of one pass over the training set.
    epochs: Length of the run.
    step_epochs: Epochs between the drops of 'step', counted from the start.
    warmup_epochs: Epochs over which the rate rises linearly from 0.

  Raises:
    UserError: On an unknown kind.
  """
  check_choice('the schedule', kind, SCHEDULES)
  warmup = round(warmup_epochs * steps_per_epoch)
  total = max(round(epochs * steps_per_epoch), warmup + 1)
  if kind == 'cosine':
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total)
  # After 50 drops nothing is left of the rate in float32.
  drops = range(1, int(min(epochs / step_epochs, 50)) + 1)
  steps = optax.piecewise_constant_schedule(
    peak, {round(i * step_epochs * steps_per_epoch): 0.1 for i in drops}
  )
  if not warmup:
    return steps
  return lambda step: steps(step) * optax.linear_schedule(0.0, 1.0, warmup)(step)


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 1e-4,
  decay: str = 'all',
  nesterov: bool = False,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """SGD as PyTorch's: the decay joins the gradient before the momentum.

  Args:
    learning_rate: A number, or a schedule.
    momentum: Decay a step of the gradients' running sum; 0 for none.
    weight_decay: Share of a parameter that joins its gradient.
    decay: 'all' decays every parameter, as the paper does; 'kernels' leaves scales and biases.
    nesterov: Whether the momentum looks ahead.
    clip_norm: Global norm that the gradient is scaled down to, before the decay; None for none.

  Raises:
    UserError: On an unknown `decay`.
  """
  check_choice('the decay', decay, DECAYS)
  return optax.chain(
    optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
    optax.add_decayed_weights(weight_decay, mask=None if decay == 'all' else _are_kernels),
    optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
  )


def _are_kernels(params: Any) -> Any:
  return jax.tree.map(lambda param: param.ndim > 1, params)
