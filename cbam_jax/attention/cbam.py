"""CBAM, the Convolutional Block Attention Module (Woo et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.attention.channel import ChannelAttention
from cbam_jax.attention.gating import gate
from cbam_jax.attention.spatial import SpatialAttention
from cbam_jax.errors import check_choice
from cbam_jax.layers import Dtype

ORDERS = ('channel_first', 'spatial_first', 'parallel', 'channel_only', 'spatial_only')


class CBAM(nn.Module):
  """Refines features by channel attention, then by spatial attention (paper, equation 1).

  Example, inside any linen module:

      y = CBAM(reduction=16)(x, train=train)

  Attributes:
    reduction: Channels over hidden units of the channel MLP, at least 1.
    pools: Which of 'avg', 'max', 'lse' and 'lp' describe a channel (table 1).
    spatial_pool: 'channel' (maximum and mean over channels) or 'conv1x1' (table 2).
    spatial_kernel: Side of the spatial convolution, odd; 3 or 7 in the paper (table 2).
    order: Arrangement of the two (table 3): 'channel_first', 'spatial_first', 'parallel' (both
      maps from the input, added before one sigmoid), 'channel_only' or 'spatial_only'.
    use_bias: Whether the channel MLP has biases (the authors' has, timm's has not).
    norm_momentum: Momentum of the spatial batch norm (linen's sense): the authors' 0.99, timm's
      0.9.
    group_size: Examples that share the spatial batch norm's statistics; None for the whole batch.
    dtype: Type of the output; None follows the input. Pools and gates are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an unknown pool or order, an even kernel, or a reduction under 1.
  """

  reduction: float = 16
  pools: Sequence[str] = ('avg', 'max')
  spatial_pool: str = 'channel'
  spatial_kernel: int = 7
  order: str = 'channel_first'
  use_bias: bool = True
  norm_momentum: float = 0.99
  group_size: int | None = None
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    check_choice('the order of CBAM', self.order, ORDERS)
    # Unattached copies of the parts, so that their fields are checked here and not in a trace.
    self._channel(parent=None)
    self._spatial(parent=None)
    super().__post_init__()

  @nn.nowrap
  def _channel(self, **where: Any) -> ChannelAttention:
    return ChannelAttention(
      reduction=self.reduction,
      pools=self.pools,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      **where,
    )

  @nn.nowrap
  def _spatial(self, **where: Any) -> SpatialAttention:
    return SpatialAttention(
      kernel_size=self.spatial_kernel,
      pool=self.spatial_pool,
      norm_momentum=self.norm_momentum,
      group_size=self.group_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      **where,
    )

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Refines `x`.

    Args:
      x: Features (N, *spatial, C), one to three spatial axes.
      train: Whether the spatial batch norm uses (and records) the batch's statistics.

    Returns:
      The refined features, of the shape of `x`.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    if self.order == 'spatial_only':
      return self._spatial(name='spatial')(x, train=train)
    channel = self._channel(name='channel')
    if self.order == 'channel_only':
      return channel(x)
    spatial = self._spatial(name='spatial')
    if self.order == 'channel_first':
      return spatial(channel(x), train=train)
    if self.order == 'spatial_first':
      return channel(spatial(x, train=train))
    return gate(x, channel.logits(x) + spatial.logits(x, train=train), self.dtype)
