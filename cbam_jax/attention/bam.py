"""BAM, the Bottleneck Attention Module (Park et al., BMVC 2018), CBAM's sister."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.attention.mlp import checked_reduction, hidden_size, torch_linear_init
from cbam_jax.errors import check_choice, check_dtypes, check_feature_map, checked_group_size, whole
from cbam_jax.layers import BatchNorm, Conv, Dtype, at_least_float32

COMBINATIONS = ('product', 'sum')


class _ChannelBranch(nn.Module):
  """`fc2(relu(norm(fc1(mean(x)))))`, (N, 1, ..., 1, C)."""

  hidden: int
  group_size: int | None
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    spatial_axes = range(1, x.ndim - 1)
    dense = functools.partial(
      nn.Dense, kernel_init=torch_linear_init, dtype=x.dtype, param_dtype=self.param_dtype
    )
    norm = BatchNorm(group_size=self.group_size, param_dtype=self.param_dtype, name='norm')
    v = dense(self.hidden, name='fc1')(jnp.mean(x, tuple(spatial_axes)))
    v = dense(x.shape[-1], name='fc2')(nn.relu(norm(v, train=train)))
    return lax.expand_dims(v, spatial_axes)


class _SpatialBranch(nn.Module):
  """1x1 to the hidden size, two dilated 3x3, each with norm and ReLU, then 1x1 to one map."""

  hidden: int
  dilation: int
  group_size: int | None
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    axes = x.ndim - 2
    conv = functools.partial(Conv, use_bias=True, param_dtype=self.param_dtype)
    norm = functools.partial(BatchNorm, group_size=self.group_size, param_dtype=self.param_dtype)

    reduce = conv(self.hidden, (1,) * axes, name='reduce')
    x = nn.relu(reduce(x, norm(name='reduce_norm'), train=train))
    for i in (1, 2):
      dilated = conv(self.hidden, (3,) * axes, dilation=self.dilation, name=f'conv{i}')
      x = nn.relu(dilated(x, norm(name=f'norm{i}'), train=train))
    return conv(1, (1,) * axes, name='out')(x)


class BAM(nn.Module):
  """Refines features by `x * (1 + sigmoid(channel(x) combined with spatial(x)))`.

  It stands between stages of a network, not within its blocks.

  Attributes:
    reduction: Channels over hidden channels of both branches, at least 1.
    dilation: Dilation of the spatial branch's two 3x3 convolutions.
    combine: How the branches meet: 'product', as the authors' code and released weights have it,
      or 'sum', as their paper has it (BAM paper, equation 2).
    group_size: Examples that share batch-norm statistics; None for the whole batch.
    dtype: Type of the output; None follows the input. The gate is float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an unknown combination, or a reduction, a dilation or a group under 1.
  """

  reduction: float = 16
  dilation: int = 4
  combine: str = 'product'
  group_size: int | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    self.reduction = checked_reduction(type(self).__name__, self.reduction)
    check_choice('the combination of BAM', self.combine, COMBINATIONS)
    self.dilation = whole("BAM's dilation", self.dilation)
    self.group_size = checked_group_size(self.group_size)
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  @nn.compact
  def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
    """The map before the sigmoid: (N, *spatial, C), float32 at the least."""
    check_feature_map(type(self).__name__, x)
    values = x.astype(at_least_float32(self.dtype or x.dtype))
    hidden = hidden_size(x.shape[-1], self.reduction)
    shared = (self.group_size, self.param_dtype)
    channel = _ChannelBranch(hidden, *shared, name='channel')(values, train=train)
    spatial = _SpatialBranch(hidden, self.dilation, *shared, name='spatial')(values, train=train)
    return channel + spatial if self.combine == 'sum' else channel * spatial

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Refines `x`.

    Args:
      x: Features (N, *spatial, C), one to three spatial axes.
      train: Whether the batch norms use (and record) the batch's statistics.

    Returns:
      The refined features, of the shape of `x`.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    logits = self.logits(x, train=train)
    return (x.astype(logits.dtype) * (1 + nn.sigmoid(logits))).astype(self.dtype or x.dtype)
