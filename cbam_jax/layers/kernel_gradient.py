"""The gradient of a convolution's kernel as matrix products, for a CPU.

XLA convolves the features, transposed, with the gradient of what comes out, and reaches a fifth of
the rate of a matrix product where the channels are few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# Channels in and out between which products are faster than XLA's own.
FEWEST, MOST = 64, 128
# Rows of the features in one product, few enough for the processor's cache.
ROWS = 2

Convolve = Callable[[jax.Array, jax.Array], jax.Array]


def faster(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether products give the gradient of the kernel of a convolution of `x` at stride 1 sooner.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C, F).
  """
  return (
    x.ndim == 4
    and all(isinstance(size, int) for size in x.shape)
    and x.shape[1] >= 8 * ROWS
    and all(FEWEST <= channels <= MOST for channels in kernel.shape[2:])
    # The blocks' sums would be rounded to a narrower type one by one.
    and x.dtype in (jnp.float32, jnp.float64)
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def with_products(x: jax.Array, kernel: jax.Array, convolve: Convolve) -> jax.Array:
  """The convolution, with a gradient of its kernel by `by_products`.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, C, F), odd sides.
    convolve: The convolution at stride 1, padded by half of each side.

  Returns:
    (N, H, W, F).
  """
  return convolve(x, kernel)


@functools.partial(with_products.defjvp, symbolic_zeros=True)
def _with_products_jvp(
  convolve: Convolve, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_dot, kernel_dot) = primals, tangents
  y = convolve(x, kernel)
  y_dot = jnp.zeros_like(y)
  if not isinstance(x_dot, SymbolicZero):
    y_dot += convolve(x_dot, kernel)
  if not isinstance(kernel_dot, SymbolicZero):
    y_dot += by_products(x, kernel_dot)
  return y, y_dot


def by_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The convolution at stride 1 as products, of which JAX derives the gradient of the kernel.

  The columns near each column stand beside it, so that a product gives what a row of the features
  adds to each of the K rows of the result near it. Transposed, it is a product of K x L times as
  many sums as one tap has, and each operand is read once for them all.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, C, F), odd sides; padded by half of each.

  Returns:
    (N, H, W, F).
  """
  n, height, width, c = x.shape
  rows, columns, _, features = kernel.shape
  blocks = -(-(height + rows - 1) // ROWS)
  below = blocks * ROWS - height - rows // 2
  x = jnp.pad(x, [(0, 0), (rows // 2, below), (columns // 2, columns // 2), (0, 0)])
  kernel = kernel.transpose(1, 2, 0, 3).reshape(columns * c, rows * features)

  def add_block(y: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
    block = lax.dynamic_slice_in_dim(x, first, ROWS, 1)
    near = jnp.concatenate([block[:, :, j : j + width] for j in range(columns)], -1)
    added = jnp.dot(near.reshape(-1, columns * c), kernel).reshape(n, ROWS, width, -1)
    # What row r adds through row i of the kernel is of row r - i of the result.
    parts = [
      jnp.pad(part, [(0, 0), (rows - 1 - i, i), (0, 0), (0, 0)])
      for i, part in enumerate(jnp.split(added, rows, -1))
    ]
    added = functools.reduce(jnp.add, parts)
    # Written so that its transpose is a slice.
    return y + lax.dynamic_update_slice_in_dim(jnp.zeros_like(y), added, first, 1), None

  y = jnp.zeros((n, blocks * ROWS + rows - 1, width, features), x.dtype)
  # Else the columns beside each other would be stored for all blocks.
  add_block = jax.checkpoint(add_block, prevent_cse=False)
  y, _ = lax.scan(add_block, y, ROWS * jnp.arange(blocks))
  return y[:, rows - 1 : rows - 1 + height]
