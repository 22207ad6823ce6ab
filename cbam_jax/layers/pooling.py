"""Pools, with the derivative of a maximum taken by its position."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.errors import UserError


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_over_axis(x: jax.Array, axis: int) -> jax.Array:
  """The maximum of `x` along `axis`, which is kept with size 1; ties go to the first.

  The derivative of `jnp.max` asks which elements *equal* the maximum. Under `jit`, XLA may fuse
  the computation of `x` into both the maximum and that comparison and round the two differently,
  so no element is equal and the gradient is silently lost. Here the position of the maximum
  carries the derivative, which no rounding can lose, and which never splits a gradient in a tie.
  """
  return jnp.max(x, axis, keepdims=True)


@max_over_axis.defjvp
def _max_over_axis_jvp(
  axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  position = jnp.argmax(x, axis, keepdims=True)
  here = lax.broadcasted_iota(position.dtype, x.shape, axis % x.ndim) == position
  picked = jnp.sum(jnp.where(here, tangent, jnp.zeros_like(tangent)), axis, keepdims=True)
  return max_over_axis(x, axis), picked


def max_pool(x: jax.Array, window: int, strides: int, padding: int = 0) -> jax.Array:
  """The maximum over square windows of `x` (N, H, W, C); padding counts as minus infinity.

  Its derivative selects one element of each window, so it is by position already.

  Raises:
    UserError: If `x` is smaller than a window, which would leave nothing.
  """
  if min(x.shape[1:3]) + 2 * padding < window:
    raise UserError(
      f'features of {x.shape[1]}x{x.shape[2]} are too small for a pool of {window}x{window}; feed '
      'larger images, such as 32x32 or more for VGG16.'
    )
  return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)
