"""Pools, with the derivative of a maximum taken by its position."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.errors import UserError
from cbam_jax.layers.platforms import by_platform, on_explicit_mesh


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

  Its derivative, too, is taken by position; ties go to the first.

  Raises:
    UserError: If `x` is smaller than a window, which would leave nothing.
  """
  if min(x.shape[1:3]) + 2 * padding < window:
    raise UserError(
      f'features of {x.shape[1]}x{x.shape[2]} are too small for a pool of {window}x{window}; feed '
      'larger images, such as 32x32 or more for VGG16.'
    )
  return _max_pool(x, window, strides, padding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: int, strides: int, padding: int) -> jax.Array:
  def by_xla(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (window, window), (strides, strides), [(padding, padding)] * 2)

  def by_places(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _places(x, window, strides, padding, -jnp.inf))

  # XLA's CPU windows take three times as long, and the derivative shares what is here.
  return by_platform(x, cpu=by_places, default=by_xla)


@_max_pool.defjvp
def _max_pool_jvp(
  window: int, strides: int, padding: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (tangent,) = primals, tangents
  values = _places(x, window, strides, padding, -jnp.inf)
  peak = next(values)
  position = jnp.zeros(peak.shape, jnp.int8 if window**2 <= 128 else jnp.int32)
  for place, value in enumerate(values, 1):
    position = jnp.where(value > peak, jnp.asarray(place, position.dtype), position)
    peak = jnp.maximum(peak, value)

  def by_places(x: jax.Array, position: jax.Array) -> jax.Array:
    # A sum whose transpose spreads a cotangent without the scatter of XLA's derivative.
    picked = jnp.zeros(position.shape, x.dtype)
    for place, value in enumerate(_places(x, window, strides, padding, 0)):
      picked += jnp.where(position == place, value, 0)
    return picked

  on = {}
  if not on_explicit_mesh(x) and all(isinstance(size, int) for size in x.shape):
    on['cpu'] = functools.partial(_by_blocks, window=window, strides=strides, padding=padding)
  y = _max_pool(x, window, strides, padding)
  return y, by_platform(tangent, position, default=by_places, **on)


def _by_blocks(
  x: jax.Array, position: jax.Array, window: int, strides: int, padding: int
) -> jax.Array:
  """What every window of `x` holds at its place `position`, counted along its rows.

  In the transpose each element asks the few windows that it is in whether they picked it, which is
  one expression. A sum over places adds up an array for each, all of which a CPU stores.
  """
  n, *sizes, c = x.shape
  counts = position.shape[1:3]
  # Blocks of `strides` elements; a window begins with a block, and reaches so many more.
  more = (window - 1) // strides
  blocks = [count + more for count in counts]
  ends = [
    (padding, block * strides - padding - size, 0)
    for block, size in zip(blocks, sizes, strict=True)
  ]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
  x = x.reshape(n, blocks[0], strides, blocks[1], strides, c)
  within = (1, 1, strides, 1, strides, 1)
  rows, columns = (lax.broadcasted_iota(jnp.int32, within, axis) for axis in (2, 4))
  total = jnp.zeros(position.shape, x.dtype)
  for i, j in itertools.product(range(more + 1), repeat=2):
    # The elements of the block `i` down and `j` across from the one with which a window begins.
    row, column = strides * i + rows, strides * j + columns
    place = jnp.where((row < window) & (column < window), row * window + column, -1)
    at = [(0, 0), (i, more - i), (j, more - j), (0, 0)]
    picked = jnp.pad(position, at, constant_values=-2)[:, :, None, :, None]
    held = jnp.sum(jnp.where(picked == place.astype(picked.dtype), x, 0), (2, 4))
    total += held[:, i : i + counts[0], j : j + counts[1]]
  return total


def _places(
  x: jax.Array, window: int, strides: int, padding: int, beyond: float
) -> Iterator[jax.Array]:
  """What every window holds at each of its places in turn, `beyond` outside of `x`."""
  around = (padding, padding, 0)
  x = lax.pad(x, jnp.asarray(beyond, x.dtype), [(0, 0, 0), around, around, (0, 0, 0)])
  n, height, width, c = x.shape
  for i, j in itertools.product(range(window), repeat=2):
    ends = (n, height - window + i + 1, width - window + j + 1, c)
    yield lax.slice(x, (0, i, j, 0), ends, (1, strides, strides, 1))
