"""Convolutions of few channels written as convolutions or products of many.

A GPU's matrix units take channels by eights. cuDNN pads the stem's three, and convolves CBAM's two
maps without those units: either takes longer than the pass over memory that it is. A CPU convolves
the two maps in plain loops.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FEW = 4
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
    return {'cuda': space_to_depth}
  if strides == features == 1 and x.shape[2] <= WIDEST:
    return {'cuda': by_rows, 'cpu': by_rows}
  return {}


def space_to_depth(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The convolution at stride 2, each 2x2 pixels as one of four times the channels, at stride 1.

  Args:
    x: (N, H, W, C), C at most `FEW`.
    kernel: (K, L, C, F), odd sides; padded by half of each.

  Returns:
    (N, ceil(H / 2), ceil(W / 2), F).
  """
  n, height, width, c = x.shape
  *sides, _, features = kernel.shape
  # A row and a column of zeros more make the kernel's sides even.
  blocks = [(size + 1) // 2 + side // 2 for size, side in zip((height, width), sides, strict=True)]
  padding = [
    (side // 2, 2 * count - size - side // 2)
    for size, side, count in zip((height, width), sides, blocks, strict=True)
  ]
  x = jnp.pad(x, [(0, 0), *padding, (0, FEW - c)])
  x = x.reshape(n, blocks[0], 2, blocks[1], 2, FEW)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, *blocks, 4 * FEW)
  kernel = jnp.pad(kernel, [(0, 1), (0, 1), (0, FEW - c), (0, 0)])
  halves = [(side + 1) // 2 for side in sides]
  kernel = kernel.reshape(halves[0], 2, halves[1], 2, FEW, features)
  kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*halves, 4 * FEW, features)
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
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
