"""What the fused CBAM reduces, in the forms that XLA computes in few passes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.layers import by_platform
from cbam_jax.layers.platforms import on_explicit_mesh

# Into which a CPU divides an axis to add them up. What fewer leave is too much to store, and more
# are compiled longer for nothing.
_FEWEST_BLOCKS, _MOST_BLOCKS = 5, 8


def two_sums(
  pair: Callable[..., tuple[jax.Array, jax.Array]], *inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Two sums over positions, of one pass over `inputs`.

  Args:
    pair: From `inputs` to what is summed, two arrays (N, P, C), element by element.
    inputs: Each (N, P, C).

  Returns:
    Both sums, (N, C).
  """
  default, by_blocks = (
    functools.partial(form, pair, axis=1) for form in (_two_sums_apart, two_sums_by_blocks)
  )
  return by_platform(*inputs, default=default, cpu=by_blocks)


def two_sums_by_blocks(
  pair: Callable[..., tuple[jax.Array, jax.Array]], *inputs: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  """The same over `axis`, 1 or 2, for XLA's CPU backend, which makes a pass for each sum.

  Of an input, any axis but this may have an extent of one. The blocks of the axis are added up
  element by element. What that gives of the first sum and of the second stand side by side: a
  choice, which XLA computes in one loop. The blocks of one sum alone it would copy, for YNNPACK to
  add them up.
  """
  size = inputs[0].shape[axis]
  count = next(b for b in range(_MOST_BLOCKS, 0, -1) if size % b == 0)
  if count < _FEWEST_BLOCKS or on_explicit_mesh(
    inputs[0]
  ):  # there, a device may hold some of the blocks
    return _two_sums_apart(pair, *inputs, axis=axis)
  blocked = [
    v.reshape(*v.shape[:axis], count, v.shape[axis] // count, *v.shape[axis + 1 :]) for v in inputs
  ]
  pairs = [
    pair(*(lax.index_in_dim(v, i, axis, keepdims=False) for v in blocked)) for i in range(count)
  ]
  first, second = (
    jnp.expand_dims(functools.reduce(jnp.add, parts), 2) for parts in zip(*pairs, strict=True)
  )
  is_first = lax.broadcasted_iota(jnp.int32, (*first.shape[:2], 2, first.shape[3]), 2) == 0
  both = jnp.where(is_first, first, second)
  if axis == 1:
    both = jnp.sum(both, 1)
    return both[:, 0], both[:, 1]
  both = jnp.sum(both, 3)
  return both[..., 0], both[..., 1]


def _two_sums_apart(
  pair: Callable[..., tuple[jax.Array, jax.Array]], *inputs: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  first, second = pair(*inputs)
  return jnp.sum(first, axis), jnp.sum(second, axis)


def affine_maximum(
  x: jax.Array, scale: jax.Array, offset: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
  """The maximum of `x * scale + offset` along `axis` and its position, the first of equals.

  In two steps: the block that holds it, then its place in that block. On a CPU, XLA finds a
  position element by element, but a maximum in vectors.
  """
  size = x.shape[axis]
  inside = next(b for b in range(math.isqrt(size), 0, -1) if size % b == 0)

  def split(v: jax.Array) -> jax.Array:
    blocks = (size // inside, inside) if v.shape[axis] == size else (1, 1)
    return v.reshape(*v.shape[:axis], *blocks, *v.shape[axis + 1 :])

  x, scale, offset = split(x), split(scale), split(offset)
  peaks = jnp.max(x * scale + offset, axis + 1, keepdims=True)
  block = jnp.argmax(peaks, axis, keepdims=True)

  def chosen(v: jax.Array) -> jax.Array:
    if v.shape[axis] == 1:
      return v
    return jnp.take_along_axis(v, block, axis, mode='promise_in_bounds')

  inner = chosen(x) * chosen(scale) + chosen(offset)
  place = jnp.argmax(inner, axis + 1, keepdims=True)
  both = (axis, axis + 1)
  return jnp.max(inner, both), jnp.squeeze(block * inside + place, both)
