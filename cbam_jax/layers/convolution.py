"""Convolution with PyTorch's symmetric padding; a 1x1 one runs as a matrix product."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.layers.dtypes import Dtype

# PyTorch's kaiming_normal_(mode='fan_out') for a ReLU, the paper authors' choice.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv(nn.Module):
  """Convolution over one, two or three spatial axes, channels last.

  Each side is padded by `dilation * (kernel - 1) // 2`, as PyTorch's networks write it; linen's
  'SAME' pads even inputs asymmetrically at stride 2 and computes something else.

  Parameters: `kernel` (*kernel_size, C / groups, features), and `bias` (features,) if asked for.

  Attributes:
    features: Output channels.
    kernel_size: One odd size for each spatial axis.
    strides: Step on every spatial axis.
    dilation: Distance between the taps of the kernel.
    groups: Groups of channels convolved apart; C for a depthwise convolution.
    use_bias: Whether a bias is added.
    kernel_init: Initial value of the kernel.
    dtype: Computation type; None follows the input.
    param_dtype: Type in which parameters are stored.
  """

  features: int
  kernel_size: tuple[int, ...]
  strides: int = 1
  dilation: int = 1
  groups: int = 1
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = kaiming_fan_out
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Convolves `x` (N, *spatial, C) to (N, *spatial / strides, features)."""
    shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    dtype = self.dtype or x.dtype
    x, kernel = x.astype(dtype), kernel.astype(dtype)

    if self.groups == 1 and all(size == 1 for size in self.kernel_size):
      y = self._pointwise(x, kernel)
    else:
      y = self._convolve(x, kernel)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype)
      y = y + lax.expand_dims(bias.astype(dtype), range(y.ndim - 1))
    return y

  def _pointwise(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # XLA's CPU convolution runs a 1x1 several times slower than the same matrix product.
    steps = (slice(None), *(slice(None, None, self.strides) for _ in self.kernel_size))
    return jnp.dot(x[steps], kernel.reshape(kernel.shape[-2:]))

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = len(self.kernel_size)
    letters = 'DHW'[3 - axes :]
    return lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(self.strides,) * axes,
      padding=[(self.dilation * (size - 1) // 2,) * 2 for size in self.kernel_size],
      rhs_dilation=(self.dilation,) * axes,
      dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
      feature_group_count=self.groups,
    )
