"""Convolutions whose gradients are computed in another form than JAX's, for a CPU.

JAX's are convolutions with their axes in another order than (N, *spatial, C) and (*sides, C, F),
which alone XLA computes fast. It transposes what it is given, but not in a loop (`lax.scan`,
`lax.map`), where these gradients take 30 times as long: `in_order` has them transposed already.

Each is given as a convolution, of which JAX derives the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from cbam_jax.layers.platforms import on_explicit_mesh

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


def in_order(convolve: Callable[..., jax.Array], forward: Convolve | None = None) -> Forms:
  """A convolution with gradients that XLA need not transpose.

  Args:
    convolve: The convolution of (N, *spatial, C) and (*sides, C, F), or of `axes` in another order.
    forward: Another form of it for what it gives; None for itself.
  """

  def features_in_order(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return convolve(x, kernel.swapaxes(-1, -2), axes=('N*C', '*OI', 'N*C'))

  def kernel_in_order(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if on_explicit_mesh(x):
      # JAX 0.10 takes the first axis for the examples, and the last of the result for its channels.
      return convolve(x, kernel)
    kernel = jnp.moveaxis(kernel, -2, 0)
    y = convolve(x.swapaxes(0, -1), kernel, axes=('C*N', 'I*O', '*NC'))
    return jnp.moveaxis(y, -2, 0)

  return Forms(forward or convolve, features_in_order, kernel_in_order)
