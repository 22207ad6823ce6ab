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
    step: Steps taken, int32.
    params: The network's parameters.
    batch_stats: The running statistics of its batch norms; empty without any.
    opt_state: The optimizer's state.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState

  @property
  def variables(self) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
  model: Classifier,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  image_shape: tuple[int, int, int],
) -> TrainState:
  """A new network before its first step; pure, so that it can be jitted and sharded.

  Args:
    model: The network.
    optimizer: Its optimizer.
    key: Random key of the initial values.
    image_shape: (H, W, C) of an image.
  """
  variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(variables['params']),
  )
