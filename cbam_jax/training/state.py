"""What a training step carries on."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from cbam_jax.models.base import Classifier


class TrainState(flax.struct.PyTreeNode):
  """Everything that a step changes.

  Attributes:
    step: Steps taken, int32; those that were skipped count.
    params: The network's parameters.
    batch_stats: The running statistics of its batch norms; empty without any.
    opt_state: The optimizer's state.
    average: Exponential moving average of `params`; None if it is not kept.
    bad_steps: How many steps in a row, up to now, had a loss or gradient that is not finite.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  average: Any
  bad_steps: jax.Array

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes to evaluate: the average of the parameters if it is kept."""
    params = self.params if self.average is None else self.average
    return {'params': params, 'batch_stats': self.batch_stats}


def create_state(
  model: Classifier,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  image_shape: tuple[int, int, int],
  *,
  averaged: bool = False,
) -> TrainState:
  """A new network before its first step; pure, so that it can be jitted and sharded.

  Args:
    model: The network.
    optimizer: Its optimizer.
    key: Random key of the initial values.
    image_shape: (H, W, C) of an image.
    averaged: Whether a moving average of the parameters is kept.
  """
  variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
  params = variables['params']
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(params),
    # A copy, since two names of one buffer cannot both be donated to a step.
    average=jax.tree.map(jnp.copy, params) if averaged else None,
    bad_steps=jnp.zeros((), jnp.int32),
  )
