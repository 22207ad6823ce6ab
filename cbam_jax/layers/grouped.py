"""Convolutions of groups, for a CPU, where XLA computes a group at a time in plain loops.

ResNeXt's and MobileNet's convolutions take 10 to 100 times as long that way, and the gradient of
ResNeXt's kernel takes seconds a layer.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.layers.dtypes import at_least_float32
from cbam_jax.layers.gradients import Convolve, Forms
from cbam_jax.layers.platforms import on_explicit_mesh

# Narrower groups are computed together, up to so many channels: most of the products are then with
# zeros, but Eigen's convolution of so few channels is bound by how it reads them.
BLOCK = 16
# Each tap, and each block, is compiled apart: in the gradient of a kernel some 20 times.
MOST_TAPS = MOST_BLOCKS = 64


def faster(
  x: jax.Array, kernel: jax.Array, groups: int, convolve: Forms, strides: int, dilation: int
) -> Forms | None:
  """Which of those below computes the convolution of `x`; None if none does.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C / groups, F).
    groups: Groups of channels convolved apart.
    convolve: The convolution without groups, of (N, *spatial, C) and (*sides, C, F), in the forms
      that each block has.
    strides: Step on every spatial axis.
    dilation: Distance between the taps of the kernel.
  """
  *sides, c, features = kernel.shape
  if c == 1 and features == groups and math.prod(sides) <= MOST_TAPS:
    by_itself = functools.partial(depthwise, strides=strides, dilation=dilation)
    # Computed again for the gradient, which would else store a copy of the features for each tap.
    by_kernel = jax.checkpoint(by_itself)
    if dilation == 1 and _by_rows_is_faster(x, strides):
      by_kernel = functools.partial(depthwise_by_rows, strides=strides)
    spread = functools.partial(depthwise_spread, strides=strides, dilation=dilation)
    return Forms(by_itself, spread, by_kernel)
  together = max(n for n in range(1, max(1, BLOCK // c) + 1) if groups % n == 0)
  if groups // together > MOST_BLOCKS:
    return None
  blocks = functools.partial(by_blocks, groups=groups, together=together)
  return Forms(
    functools.partial(blocks, convolve=convolve.forward),
    functools.partial(blocks, convolve=convolve.by_features),
    functools.partial(blocks, convolve=convolve.by_kernel),
  )


def depthwise(x: jax.Array, kernel: jax.Array, strides: int, dilation: int) -> jax.Array:
  """The convolution of each channel by itself, as a sum over the taps, which XLA fuses.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, 1, C), odd sides; padded by half of each times the dilation.
    strides: Step on every spatial axis.
    dilation: Distance between the taps of the kernel.

  Returns:
    (N, *ceil(spatial / strides), C).
  """
  *sides, _, _ = kernel.shape
  padding = [(0, 0), *((dilation * (side // 2),) * 2 for side in sides), (0, 0)]
  dtype = at_least_float32(x.dtype)
  padded = jnp.pad(x, padding).astype(dtype)
  kernel = kernel.astype(dtype)
  read = _read(x, strides)
  parts = []
  for tap in itertools.product(*map(range, sides)):
    window = tuple(
      slice(dilation * i, dilation * i + size, strides) for i, size in zip(tap, read, strict=True)
    )
    parts.append(padded[:, *window] * lax.expand_dims(kernel[*tap, 0], range(x.ndim - 1)))
  return functools.reduce(jnp.add, parts).astype(x.dtype)


def _read(x: jax.Array, strides: int) -> list[int]:
  """Sizes up to the last place that a step reaches, if no numbers, to come out as XLA's."""
  return [
    size if isinstance(size, int) else (size - 1) // strides * strides + 1 for size in x.shape[1:-1]
  ]


def depthwise_spread(x: jax.Array, kernel: jax.Array, strides: int, dilation: int) -> jax.Array:
  """`depthwise` as a sum of what each element gives to those around it.

  Its transpose reads one array at each tap, where that of `depthwise` adds up an array for each
  tap, all of which XLA stores if more than one operation reads the sum.
  """
  *sides, _, _ = kernel.shape
  dtype = at_least_float32(x.dtype)
  wide, kernel = x.astype(dtype), kernel.astype(dtype)
  parts = []
  for tap in itertools.product(*map(range, sides)):
    part = wide * lax.expand_dims(kernel[*tap, 0], range(x.ndim - 1))
    around = [(dilation * (side - 1 - i), dilation * i) for i, side in zip(tap, sides, strict=True)]
    parts.append(jnp.pad(part, [(0, 0), *around, (0, 0)]))
  y = functools.reduce(jnp.add, parts)
  inside = (
    slice(dilation * (side // 2), dilation * (side // 2) + size, strides)
    for side, size in zip(sides, _read(x, strides), strict=True)
  )
  return y[:, *inside].astype(x.dtype)


def depthwise_by_rows(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
  """`depthwise` without dilation, a few rows at a time, for the gradient by the kernel.

  That gradient is a sum over all places for each tap. XLA's CPU backend adds up fastest what an
  expression spells out: here pieces of a few rows, which of a small batch stay in the caches from
  tap to tap.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, 1, C), odd sides; padded by half of each.
    strides: Step on both spatial axes.

  Returns:
    (N, ceil(H / strides), ceil(W / strides), C).
  """
  _, height, width, c = x.shape
  rows, columns, _, _ = kernel.shape
  out_height, out_width = -(-height // strides), -(-width // strides)
  pieces, down = _pieces_and_rows(out_width)
  piece, turns = -(-out_width // pieces), -(-out_height // down)
  below = max(0, strides * (down * turns - 1) + rows // 2 + 1 - height)
  right = max(0, strides * (pieces * piece - 1) + columns // 2 + 1 - width)
  x = jnp.pad(x, [(0, 0), (rows // 2, below), (columns // 2, right), (0, 0)])
  # Each an array of its own, and so is its gradient, of every example and column apart until the
  # end. Made of the features, it lies on the device where they do.
  kernel = kernel.astype(at_least_float32(x.dtype)).reshape(-1, 1, 1, 1, c)
  taps = [jnp.zeros_like(x[:, :1, :piece], kernel.dtype) + tap for tap in kernel]

  # Checkpointed, or what the taps read would be stored for all rows.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def some_rows(first: jax.Array) -> jax.Array:
    near = lax.dynamic_slice_in_dim(x, strides * first, strides * (down - 1) + rows, 1)

    def convolved(row: int, place: int) -> jax.Array:
      parts = []
      for (i, j), tap in zip(itertools.product(range(rows), range(columns)), taps, strict=True):
        start, last = place + j, place + j + strides * (piece - 1)
        parts.append(near[:, row + i : row + i + 1, start : last + 1 : strides] * tap)
      return functools.reduce(jnp.add, parts)

    def whole(row: int) -> jax.Array:
      places = range(0, strides * pieces * piece, strides * piece)
      return jnp.concatenate([convolved(row, place) for place in places], 2)[:, :, :out_width]

    return jnp.concatenate([whole(strides * row) for row in range(down)], 1)

  def add_rows(y: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
    # Written so that its transpose is a slice.
    return y + lax.dynamic_update_slice_in_dim(jnp.zeros_like(y), some_rows(first), first, 1), None

  y = jnp.zeros_like(x[:, : down * turns, :out_width], kernel.dtype)
  y += jnp.zeros_like(kernel[0])  # in a shard_map, what varies with the kernel does so too
  y, _ = lax.scan(add_rows, y, down * jnp.arange(turns))
  return y[:, :out_height].astype(x.dtype)


def _pieces_and_rows(width: int) -> tuple[int, int]:
  """Into how many pieces `depthwise_by_rows` cuts a row of its result, and how many rows it takes.

  Together they are at least 16 pieces: what an expression reads 15 times or fewer, XLA does not
  store, but computes again in every place.
  """
  pieces = -(-width // -(-width // 14))
  return pieces, 2 * -(-8 // pieces)


def _by_rows_is_faster(x: jax.Array, strides: int) -> bool:
  """Whether the gradient of (N, *spatial, C) is taken by `depthwise_by_rows`."""
  # Older releases fail to transpose a loop within a choice of platforms.
  loops = jax.__version_info__ >= (0, 10)
  known = all(isinstance(size, int) for size in x.shape)
  if not (loops and known and x.ndim == 4 and x.size > 0):
    return False
  if on_explicit_mesh(x):  # the axis that is cut may lie on several devices
    return False
  out_height, out_width = (-(-size // strides) for size in x.shape[1:3])
  return out_height > 2 * _pieces_and_rows(out_width)[1]


def by_blocks(
  x: jax.Array, kernel: jax.Array, groups: int, together: int, convolve: Convolve
) -> jax.Array:
  """Convolutions without groups, each of one group or of a few narrow ones.

  What is not finite reaches all of its block.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C / groups, F).
    groups: Groups of channels convolved apart.
    together: How many of them are a block.
    convolve: The convolution without groups, of (N, *spatial, C) and (*sides, C, F).

  Returns:
    (N, *ceil(spatial / strides), F).
  """
  *sides, c, features = kernel.shape
  count = groups // together
  kernel = kernel.reshape(*sides, 1, c, count, together, features // groups)
  same_group = jnp.eye(together, dtype=bool)[:, None, None, :, None]
  kernel = jnp.where(same_group, kernel, 0).reshape(*sides, together * c, features)
  blocks = zip(jnp.split(x, count, -1), jnp.split(kernel, count, -1), strict=True)
  return jnp.concatenate([convolve(*block) for block in blocks], -1)
