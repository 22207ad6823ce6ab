"""Convolutions whose gradients are computed in another form than JAX's, for a CPU.

JAX's are convolutions with their axes in another order than (N, *spatial, C) and (*sides, C, F),
which alone XLA computes fast. It transposes what it is given, but not in a loop (`lax.scan`,
`lax.map`), where these gradients take 30 times as long: `in_order` has them transposed already.

Where the channels are few, that by the kernel reaches a fifth of the rate of a matrix product in
any order: `by_products` and `by_taps` take it from a few rows at a time.

All are convolutions, of which JAX derives the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from cbam_jax.layers.dtypes import at_least_float32

# Rows of the result at a time.
ROWS = 2
# Of so few channels, and between so many features, products are faster than XLA's own.
FEW_CHANNELS, FEWEST_FEATURES, MOST_FEATURES = 4, 32, 128
# What each tap reads stands apart in memory.
MOST_TAPS = 64

Convolve = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Forms:
  """A convolution, or product, in the form that gives it and those of which it is derived.

  They are made for their transpose: forward mode, in a loop above all, and gradients that are not
  compiled cost more than with JAX's own.

  Attributes:
    forward: A convolution of features and kernel.
    by_features: The same in the form of which the derivative by the features is taken.
    by_kernel: The same in the form of which the derivative by the kernel is taken.
  """

  forward: Convolve
  by_features: Convolve
  by_kernel: Convolve

  def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `forward` gives."""
    return _in_forms(x, kernel, self)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _in_forms(x: jax.Array, kernel: jax.Array, forms: Forms) -> jax.Array:
  return forms.forward(x, kernel)


@functools.partial(_in_forms.defjvp, symbolic_zeros=True)
def _jvp(
  forms: Forms, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
  (x, kernel), (x_dot, kernel_dot) = primals, tangents
  y = forms(x, kernel)
  parts = []
  if not isinstance(x_dot, SymbolicZero):
    parts.append(forms.by_features(x_dot, kernel))
  if not isinstance(kernel_dot, SymbolicZero):
    parts.append(forms.by_kernel(x, kernel_dot))
  return y, functools.reduce(jnp.add, parts) if parts else jnp.zeros_like(y)


def has_rows(x: jax.Array, strides: int) -> bool:
  """Whether a convolution of features (N, *spatial, C) has rows enough to take them by turns."""
  # Older releases fail to transpose a loop within a choice of platforms.
  loops = jax.__version_info__ >= (0, 10)
  known = all(isinstance(size, int) for size in x.shape)
  return loops and x.ndim == 4 and known and x.size > 0 and x.shape[1] >= 4 * ROWS * strides


def products_are_faster(x: jax.Array, kernel: jax.Array, strides: int) -> bool:
  """Whether `by_products` gives the gradient of a kernel (K, L, C, F) sooner than XLA does."""
  # In a narrower type, the sum over rows would be rounded at each turn.
  wide = x.dtype in (jnp.float32, jnp.float64)
  few = x.shape[-1] <= FEW_CHANNELS and math.prod(kernel.shape[:2]) <= MOST_TAPS
  fitting = FEWEST_FEATURES <= kernel.shape[-1] <= MOST_FEATURES
  return has_rows(x, strides) and wide and few and fitting


def in_order(
  convolve: Callable[..., jax.Array],
  forward: Convolve | None = None,
  by_kernel: Convolve | None = None,
) -> Forms:
  """A convolution with gradients that XLA need not transpose.

  Args:
    convolve: The convolution of (N, *spatial, C) and (*sides, C, F), or of `axes` in another order.
    forward: Another form of it for what it gives; None for itself.
    by_kernel: Another for the gradient by the kernel; None for itself.
  """

  def features_in_order(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel.swapaxes(-1, -2), axes=('N*C', '*OI', 'N*C'))

  def kernel_in_order(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
      # JAX 0.10 takes the first axis for the examples, and the last of the result for its channels.
      return convolve(x, kernel)
    kernel = jnp.moveaxis(kernel, -2, 0)
    y = convolve(x.swapaxes(0, -1), kernel, axes=('C*N', 'I*O', '*NC'))
    return jnp.moveaxis(y, -2, 0)

  return Forms(forward or convolve, features_in_order, by_kernel or kernel_in_order)


def by_products(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
  """The convolution as a product of what the taps read, side by side.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, C, F), odd sides; padded by half of each.
    strides: Step on both spatial axes.

  Returns:
    (N, ceil(H / strides), ceil(W / strides), F).
  """
  rows, columns, _, features = kernel.shape
  kernel = kernel.reshape(-1, features)

  def product(read: list[jax.Array]) -> jax.Array:
    side_by_side = jnp.concatenate(read, -1)
    y = jnp.dot(side_by_side.reshape(-1, side_by_side.shape[-1]), kernel)
    return y.reshape(*read[0].shape[:-1], features)

  return _by_rows(x, (rows, columns), strides, product)


def by_taps(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
  """The convolution of each channel by itself, as a sum over the taps.

  Args:
    x: (N, H, W, C).
    kernel: (K, L, 1, C), odd sides; padded by half of each.
    strides: Step on both spatial axes.

  Returns:
    (N, ceil(H / strides), ceil(W / strides), C).
  """
  rows, columns, _, c = kernel.shape
  # A gradient for each column at first, whose sums over rows run along the memory.
  wide = (rows * columns, 1, 1, -(-x.shape[2] // strides), c)
  taps = jnp.broadcast_to(kernel.astype(at_least_float32(x.dtype)).reshape(-1, 1, 1, 1, c), wide)

  def product(read: list[jax.Array]) -> jax.Array:
    parts = [part * tap for part, tap in zip(read, taps, strict=True)]
    return functools.reduce(jnp.add, parts)

  return _by_rows(x, (rows, columns), strides, product).astype(x.dtype)


def _by_rows(
  x: jax.Array,
  sides: tuple[int, int],
  strides: int,
  product: Callable[[list[jax.Array]], jax.Array],
) -> jax.Array:
  """A convolution by what gives a few rows of it, (N, ROWS, W', F), from what each tap reads."""
  height, width = x.shape[1:3]
  rows, columns = sides
  out_height, out_width = -(-height // strides), -(-width // strides)
  turns = -(-out_height // ROWS)
  down, across = strides * (ROWS - 1) + 1, strides * (out_width - 1) + 1
  below = max(0, strides * ROWS * (turns - 1) + down + rows // 2 - height)
  x = jnp.pad(x, [(0, 0), (rows // 2, below), (columns // 2, columns // 2), (0, 0)])

  # Checkpointed, or what the taps read would be stored for all rows.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def some_rows(first: jax.Array) -> jax.Array:
    near = lax.dynamic_slice_in_dim(x, strides * first, down + rows - 1, 1)
    return product(
      [
        near[:, i : i + down : strides, j : j + across : strides]
        for i, j in itertools.product(range(rows), range(columns))
      ]
    )

  def add_rows(y: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
    # Written so that its transpose is a slice.
    return y + lax.dynamic_update_slice_in_dim(jnp.zeros_like(y), some_rows(first), first, 1), None

  # The first rows are padded, for a sum that lies on the devices where they do.
  y = jnp.pad(some_rows(jnp.zeros((), int)), [(0, 0), (0, ROWS * (turns - 1)), (0, 0), (0, 0)])
  y, _ = lax.scan(add_rows, y, ROWS * jnp.arange(1, turns))
  return y[:, :out_height]
