"""Convolutions of groups, for a CPU, where XLA computes a group at a time in plain loops.

ResNeXt's and MobileNet's convolutions take 10 to 100 times as long that way, and the gradient of
ResNeXt's kernel takes seconds a layer.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.layers import kernel_gradient
from cbam_jax.layers.dtypes import at_least_float32

# Narrower groups are computed together, up to so many channels: most of the products are then with
# zeros, but Eigen's convolution of so few channels is bound by how it reads them.
BLOCK = 16
# Each tap is compiled apart.
MOST_TAPS = 64

Convolve = Callable[[jax.Array, jax.Array], jax.Array]


def faster(
  x: jax.Array, kernel: jax.Array, strides: int, dilation: int, convolve: Convolve
) -> Convolve:
  """Which of the two below computes the convolution of `x`.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C / groups, F).
    strides: Step on every spatial axis.
    dilation: Distance between the taps of the kernel.
    convolve: The convolution without groups, of (N, *spatial, C) and (*sides, C, F).
  """
  *sides, c, features = kernel.shape
  groups = x.shape[-1] // c
  if c > 1 or features > groups or math.prod(sides) > MOST_TAPS:
    return functools.partial(by_blocks, groups=groups, convolve=convolve)
  by_itself = functools.partial(depthwise, strides=strides, dilation=dilation)
  if dilation == 1 and kernel_gradient.has_rows(x, strides):
    form = functools.partial(kernel_gradient.by_taps, strides=strides)
    return lambda *inputs: kernel_gradient.derived(*inputs, by_itself, form)
  # Computed again for the gradient, which would else store a copy of the features for each tap.
  return jax.checkpoint(by_itself)


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
  spatial = x.shape[1:-1]
  padding = [(0, 0), *((dilation * (side // 2),) * 2 for side in sides), (0, 0)]
  dtype = at_least_float32(x.dtype)
  padded = jnp.pad(x, padding).astype(dtype)
  kernel = kernel.astype(dtype)
  parts = []
  for tap in itertools.product(*map(range, sides)):
    window = tuple(
      slice(dilation * i, dilation * i + (size - 1) // strides * strides + 1, strides)
      for i, size in zip(tap, spatial, strict=True)
    )
    parts.append(padded[:, *window] * lax.expand_dims(kernel[*tap, 0], range(x.ndim - 1)))
  return functools.reduce(jnp.add, parts).astype(x.dtype)


def by_blocks(x: jax.Array, kernel: jax.Array, groups: int, convolve: Convolve) -> jax.Array:
  """Convolutions without groups, each of one group or of a few narrow ones.

  What is not finite reaches all of its block.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C / groups, F).
    groups: Groups of channels convolved apart.
    convolve: The convolution without groups, of (N, *spatial, C) and (*sides, C, F).

  Returns:
    (N, *spatial / strides, F).
  """
  *sides, c, features = kernel.shape
  out = features // groups
  together = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * c <= BLOCK))
  apart = kernel.reshape(*sides, 1, c, groups // together, together, out)
  own = jnp.eye(together, dtype=bool)[:, None, None, :, None]
  blocks = jnp.where(own, apart, 0).reshape(*sides, together * c, features)
  count = groups // together
  parts = zip(jnp.split(x, count, -1), jnp.split(blocks, count, -1), strict=True)
  return jnp.concatenate([convolve(*part) for part in parts], -1)
