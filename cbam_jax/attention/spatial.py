"""Spatial attention (paper section 3, equation 3): where to attend."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.attention.gating import gate
from cbam_jax.errors import (
  UserError,
  check_choice,
  check_dtypes,
  check_feature_map,
  checked_group_size,
  is_whole,
  plain,
)
from cbam_jax.layers import BatchNorm, Conv, Dtype, at_least_float32, max_over_axis
from cbam_jax.layers.batch_norm import momentum_share

SPATIAL_POOLS = ('channel', 'conv1x1')


class SpatialAttention(nn.Module):
  """Scales each position by a gate computed from its neighbourhood.

  `x * sigmoid(norm(conv([max over C; mean over C])))`, equation 3 with the batch norm of the
  authors' code (scale starting at 0, so that the gate starts at one half).

  Attributes:
    kernel_size: Side of the convolution, odd; the paper compares 3 and 7.
    pool: How the channels are pooled: 'channel' (maximum and mean, in this order) or 'conv1x1'
      (a learned 1x1 convolution to one map; table 2).
    norm_momentum: The batch norm's momentum (linen's sense): the authors' 0.99, timm's 0.9.
    group_size: Examples that share batch-norm statistics; None for the whole batch.
    dtype: Type of the output; None follows the input. Pools and gate are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an unknown pool, an even kernel size, a momentum outside 0 to 1, a group of none,
      or an integer type.
  """

  kernel_size: int = 7
  pool: str = 'channel'
  norm_momentum: float = 0.99
  group_size: int | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    check_choice('the pool of spatial attention', self.pool, SPATIAL_POOLS)
    if not (is_whole(self.kernel_size) and self.kernel_size % 2):
      raise UserError(
        f"spatial attention's kernel_size (CBAM's spatial_kernel) is {self.kernel_size!r}; it must "
        'be a positive odd integer, or the map would shift against the features. The paper '
        'compares 3 and 7.'
      )
    self.kernel_size = plain(self.kernel_size)
    self.norm_momentum = momentum_share("spatial attention's norm_momentum", self.norm_momentum)
    self.group_size = checked_group_size(self.group_size)
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  @nn.compact
  def logits_of(self, *maps: jax.Array, train: bool) -> jax.Array:
    """The map before the sigmoid, (N, *spatial, 1), from the maps that the convolution reads."""
    pooled = jnp.concatenate(maps, -1)
    axes = pooled.ndim - 2
    if self.pool == 'conv1x1':
      pooled = Conv(1, (1,) * axes, param_dtype=self.param_dtype, name='reduce')(pooled)
    kernel_size = (self.kernel_size,) * axes
    y = Conv(1, kernel_size, param_dtype=self.param_dtype, name='conv')(pooled)
    return BatchNorm(
      momentum=self.norm_momentum,
      scale_init=nn.initializers.zeros,
      group_size=self.group_size,
      param_dtype=self.param_dtype,
      name='norm',
    )(y, train=train)

  def logits(self, x: jax.Array, *, train: bool) -> jax.Array:
    """The map before the sigmoid: (N, *spatial, 1), float32 at the least."""
    check_feature_map(type(self).__name__, x)
    values = x.astype(at_least_float32(self.dtype or x.dtype))
    if self.pool == 'conv1x1':
      return self.logits_of(values, train=train)
    mean = jnp.mean(values, -1, keepdims=True)
    return self.logits_of(max_over_axis(values, -1), mean, train=train)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Refines `x`.

    Args:
      x: Features (N, *spatial, C), one to three spatial axes.
      train: Whether the batch norm uses (and records) the batch's statistics.

    Returns:
      The refined features, of the shape of `x`.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    return gate(x, self.logits(x, train=train), self.dtype)
