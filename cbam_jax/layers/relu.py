"""A ReLU that XLA's CPU backend does not compute again wherever it is read."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.layers.platforms import by_platform


@jax.custom_jvp
def stored_relu(x: jax.Array) -> jax.Array:
  """`max(x, 0)`, of the shape and type of `x`, for what more than one operation reads.

  On a CPU, XLA fuses an operation of one array into every reader, with all that led to it: the
  last block of a stage would add up the sums of all blocks before it, and CBAM after a batch norm
  normalise once for each of its pools. A choice between arrays is computed once and stored. Where
  a convolution alone reads the result, `nn.relu` needs less memory.

  The derivative asks the result: 1 where that is positive, else 0.
  """
  return by_platform(x, cpu=_chosen, default=nn.relu)


@stored_relu.defjvp
def _jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
  y = stored_relu(*primals)
  return y, jnp.where(y > 0, tangents[0], jnp.zeros_like(y))


def _chosen(x: jax.Array) -> jax.Array:
  # Not of `x > 0`: what is not a number stays so.
  return jnp.where(x <= 0, jnp.zeros_like(x), x)
