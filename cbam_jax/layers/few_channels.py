"""Convolutions of few channels written as convolutions or products of many.

A GPU's matrix units take channels by eights. cuDNN pads the stem's three, and convolves CBAM's two
maps without those units: either takes longer than the pass over memory that it is. A CPU convolves
the two maps in plain loops, and fills few lanes of a vector with a stem's three channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW = 4
# Of so many taps at the most, `space_to_depth` is faster on a CPU too.
FEW_TAPS = 9
# Beyond this width the products of `by_rows` cost more than they save.
WIDEST = 128


def faster(
  x: jax.Array, kernel: jax.Array, strides: int
) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
  """Which of the two below computes the convolution of `x`, by the platforms where it is faster.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C, F).
    strides: Step on every spatial axis.
  """
  *sides, c, features = kernel.shape
  fits = x.ndim == 4 and c <= FEW and all(side % 2 for side in sides)
  # Exported for images of any size, x has sizes that are no numbers.
  if not fits or not all(isinstance(size, int) for size in x.shape[1:]):
    return {}
  if strides == 2:
    few_taps = math.prod(sides) <= FEW_TAPS
    return dict.fromkeys(('cuda', 'cpu') if few_taps else ('cuda',), space_to_depth)
  if strides == features == 1 and x.shape[2] <= WIDEST:
    return {'cuda': by_rows, 'cpu': by_rows}
  return {}


def space_to_depth(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The convolution at stride 2, each 2x2 pixels as one of four times the channels, at stride 1.

  What is not finite reaches a place further than the kernel.

  Args:
    x: (N, H, W, C), C at most `FEW`.
    kernel: (K, L, C, F), odd sides; padded by half of each.

  Returns:
    (N, ceil(H / 2), ceil(W / 2), F).
  """
  n, height, width, c = x.shape
  *sides, _, features = kernel.shape
  blocks = [(size + 1) // 2 for size in (height, width)]
  x = jnp.pad(x, [(0, 0), (0, height % 2), (0, width % 2), (0, FEW - c)])
  # An axis at a time, as meshes of explicit axes want it.
  x = x.reshape(n, blocks[0], 2, 2 * blocks[1], FEW).reshape(n, blocks[0], 2, blocks[1], 2, FEW)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, *blocks, 4 * FEW)
  # A side of 2k + 1, with zeros before it if k is odd and else after it, is k + 1 blocks.
  zeros = [(side // 2 % 2, 1 - side // 2 % 2) for side in sides]
  halves = [(side + 1) // 2 for side in sides]
  kernel = jnp.pad(kernel, [*zeros, (0, FEW - c), (0, 0)])
  kernel = kernel.reshape(halves[0], 2, halves[1], 2, FEW, features)
  kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*halves, 4 * FEW, features)
  before = [(side // 2 + 1) // 2 for side in sides]
  padding = [(count, half - 1 - count) for count, half in zip(before, halves, strict=True)]
  # A GPU pads as it moves the pixels; a CPU's compiler leaves it to the convolution.
  return lax.conv_general_dilated(
    jnp.pad(x, [(0, 0), *padding, (0, 0)]),
    kernel,
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def by_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The convolution at stride 1 to one channel, each row as a product with a banded matrix.

  What is not finite reaches all of its row.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, C, 1), odd sides; padded by half of each.

  Returns:
    (N, H, W, 1).
  """
  n, height, width, c = x.shape
  rows = kernel.shape[0]
  x = jnp.pad(x.reshape(n, height, width * c), [(0, 0), (rows // 2, rows // 2), (0, 0)])
  near = jnp.concatenate([x[:, i : i + height] for i in range(rows)], -1)
  y = jnp.dot(near, _bands(kernel, width), precision=lax.Precision.HIGHEST)
  return y[..., None]


def _bands(kernel: jax.Array, width: int) -> jax.Array:
  """What each column of each near row gives to each column, (K * W * C, W)."""
  rows, columns, c, _ = kernel.shape
  tap = np.arange(width)[:, None] - np.arange(width) + columns // 2
  inside = (tap >= 0) & (tap < columns)
  bands = kernel[..., 0][:, np.clip(tap, 0, columns - 1)]
  bands = jnp.where(inside[None, :, :, None], bands, 0)
  return bands.transpose(0, 1, 3, 2).reshape(rows * width * c, width)
