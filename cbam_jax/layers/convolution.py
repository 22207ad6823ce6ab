"""Convolution with PyTorch's symmetric padding, and with the batch norm after it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.errors import ChannelsError, UserError, check_dtypes, whole
from cbam_jax.layers import few_channels, gradients, grouped, onednn
from cbam_jax.layers.batch_norm import BatchNorm
from cbam_jax.layers.dtypes import Dtype
from cbam_jax.layers.gradients import Forms
from cbam_jax.layers.platforms import by_platform

# PyTorch's kaiming_normal_(mode='fan_out') for a ReLU, the paper authors' choice.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: int = 1,
  dilation: int = 1,
  groups: int = 1,
  axes: tuple[str, str, str] = ('N*C', '*IO', 'N*C'),
) -> jax.Array:
  """XLA's convolution, each side padded by `dilation * (kernel - 1) // 2`.

  The shapes below are those of the default order of axes.

  Args:
    x: (N, *spatial, C).
    kernel: (*sides, C / groups, F), odd sides.
    strides: Step on every spatial axis.
    dilation: Distance between the taps of the kernel.
    groups: Groups of channels convolved apart.
    axes: The order of the axes of `x`, `kernel` and the result, the spatial ones a star.

  Returns:
    (N, *ceil(spatial / strides), F).
  """
  letters = 'DHW'[5 - kernel.ndim :]
  of_x, of_kernel, of_result = (order.replace('*', letters) for order in axes)
  first = axes[1].index('*')
  sides = kernel.shape[first : first + len(letters)]
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(strides,) * len(sides),
    padding=[(dilation * (side - 1) // 2,) * 2 for side in sides],
    rhs_dilation=(dilation,) * len(sides),
    dimension_numbers=(of_x, of_kernel, of_result),
    feature_group_count=groups,
  )


def pointwise(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
  """A 1x1 convolution as a matrix product, in the forms that a CPU computes fastest.

  Args:
    x: (N, *spatial, C).
    kernel: (*ones, C, F).
    strides: Step on every spatial axis.

  Returns:
    (N, *ceil(spatial / strides), F).
  """
  x = x[:, *(slice(None, None, strides) for _ in x.shape[1:-1])]
  # Flat, or XLA copies and transposes an operand of the kernel's gradient.
  flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  c, features = kernel.shape[-2:]
  by_kernel = _product_transposed if c > features else jnp.dot
  product = onednn.preferred_product(Forms(jnp.dot, jnp.dot, by_kernel))
  return product(flat, kernel.reshape(c, features)).reshape(*x.shape[:-1], features)


def _product_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
  # A tall gradient by the kernel takes XLA longer than its transpose. The barrier keeps XLA from
  # transposing the gradient's product back.
  return jnp.dot(x, lax.optimization_barrier(kernel.T).T)


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
    groups: Groups of channels convolved apart; C for a depthwise convolution. On a CPU narrow
      groups are computed together, and what is not finite reaches its neighbours. Without groups,
      of few channels, it may reach all of its row (to one feature at stride 1) or a place further
      than the kernel (at stride 2).
    use_bias: Whether a bias is added.
    kernel_init: Initial value of the kernel.
    dtype: Computation type; None follows the input.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an even kernel, a count under 1, groups that do not divide the features, or an
      integer type.
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

  def __post_init__(self) -> None:
    if not isinstance(self.kernel_size, (tuple, list)):
      raise UserError(
        f"a convolution's kernel_size is {self.kernel_size!r}; it must be one size for each "
        'spatial axis, as (3, 3).'
      )
    self.kernel_size = tuple(whole("a convolution's kernel_size", v) for v in self.kernel_size)
    if any(size % 2 == 0 for size in self.kernel_size):
      raise UserError(
        f"a convolution's kernel_size is {self.kernel_size}; every side must be odd, since each "
        'side of the features is padded alike.'
      )
    for name in ('features', 'strides', 'dilation', 'groups'):
      setattr(self, name, whole(f"a convolution's {name}", getattr(self, name)))
    if self.features % self.groups:
      raise UserError(
        f"a convolution's groups={self.groups} do not divide its features={self.features}; choose "
        'a divisor of both the features and the channels that come in.'
      )
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: jax.Array, norm: Callable[..., jax.Array] | None = None, *, train: bool | None = None
  ) -> jax.Array:
    """Convolves `x`, then normalises if a norm is given.

    At inference on a GPU, a batch norm's factor goes into the kernel, and what is left of it is a
    bias, which cuDNN adds inside the convolution, as it does the ReLU after it.

    Args:
      x: Features (N, *spatial, C).
      norm: A batch norm of the result, or something else that takes `(x, train=...)`.
      train: Whether the norm uses (and records) the batch's statistics.

    Returns:
      Features (N, *spatial / strides, features).

    Raises:
      UserError: If there is a norm and `train` is not told, or `x` has another number of axes, or
        channels that the groups do not divide.
    """
    if x.ndim != len(self.kernel_size) + 2 or x.shape[-1] % self.groups:
      raise UserError(
        f'a convolution with kernel_size={self.kernel_size} and groups={self.groups} got an input '
        f'of shape {x.shape}; it takes (N, *spatial, C) with {len(self.kernel_size)} spatial axes '
        'and channels that the groups divide.'
      )
    shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
    if self.has_variable('params', 'kernel'):
      stored = jnp.shape(nn.meta.unbox(self.get_variable('params', 'kernel')))
      if len(stored) == len(shape) and stored[-2] != shape[-2]:
        raise ChannelsError(
          f'a convolution of {stored[-2] * self.groups} channels got an input of shape {x.shape}; '
          'channels come last, (N, *spatial, C).'
        )
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    bias = None
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), self.param_dtype)
    dtype = self.dtype or x.dtype
    x = x.astype(dtype)
    if norm is None:
      return self._biased(x, kernel, bias)
    if train is None:
      raise UserError('a convolution with a norm must be told train=True or train=False.')
    if train or self.is_initializing() or type(norm) is not BatchNorm:
      return norm(self._biased(x, kernel, bias), train=train)
    features = jax.ShapeDtypeStruct((*x.shape[:-1], self.features), dtype)
    scale, offset = norm.affine(features, train=False)
    if bias is not None:
      offset += lax.expand_dims(bias.astype(scale.dtype), range(x.ndim - 1)) * scale
    inputs = x, kernel, scale, offset
    y = by_platform(*inputs, cuda=self._mapped_inside, default=self._then_mapped)
    return y.astype(norm.dtype or dtype)

  def _biased(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = self._convolved(x, kernel.astype(x.dtype))
    return y if bias is None else y + lax.expand_dims(bias.astype(x.dtype), range(y.ndim - 1))

  def _then_mapped(
    self, x: jax.Array, kernel: jax.Array, scale: jax.Array, offset: jax.Array
  ) -> jax.Array:
    return self._convolved(x, kernel.astype(x.dtype)).astype(scale.dtype) * scale + offset

  def _mapped_inside(
    self, x: jax.Array, kernel: jax.Array, scale: jax.Array, offset: jax.Array
  ) -> jax.Array:
    kernel = (kernel * scale).astype(x.dtype)
    return (self._convolved(x, kernel) + offset.astype(x.dtype)).astype(scale.dtype)

  def _convolved(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    ungrouped = functools.partial(convolve, strides=self.strides, dilation=self.dilation)
    by_xla = functools.partial(ungrouped, groups=self.groups)
    on: dict[str, Callable[..., jax.Array]] = {}
    forms = None
    if self.groups > 1:
      block = gradients.in_order(ungrouped)
      forms = grouped.faster(x, kernel, self.groups, block, self.strides, self.dilation)
    elif all(size == 1 for size in self.kernel_size):
      # XLA's CPU convolution runs a 1x1 several times slower than the same matrix product. On a GPU
      # XLA may fail to compile a product whose operand takes steps, and cuDNN fuses more.
      on['cpu'] = functools.partial(pointwise, strides=self.strides)
    else:
      if self.dilation == 1:
        on |= few_channels.faster(x, kernel, self.strides)
      if on.get('cpu') is not few_channels.by_rows:  # which is a product, fast in any order
        forms = gradients.in_order(ungrouped, on.get('cpu'))
    if forms:
      on['cpu'] = onednn.preferred(forms, self.strides, self.dilation, self.groups)
    return by_platform(x, kernel, default=by_xla, **on)
