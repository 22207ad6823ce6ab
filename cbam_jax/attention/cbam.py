"""CBAM, the Convolutional Block Attention Module (Woo et al., ECCV 2018)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from cbam_jax.attention.channel import ChannelAttention
from cbam_jax.attention.fused import refine, refine_and_add
from cbam_jax.attention.gating import gate
from cbam_jax.attention.spatial import SpatialAttention
from cbam_jax.errors import UserError, check_choice, check_feature_map
from cbam_jax.layers import BatchNorm, Dtype

IMPLEMENTATIONS = ('auto', 'plain', 'xla', 'pallas')
ORDERS = ('channel_first', 'spatial_first', 'parallel', 'channel_only', 'spatial_only')


class CBAM(nn.Module):
  """Refines features by channel attention, then by spatial attention (paper, equation 1).

  Example, inside any linen module:

      y = CBAM(reduction=16)(x, train=train)

  With `nn.remat`, which would take `train` for an array:

      y = nn.remat(lambda module, x: module(x, train=train))(CBAM(reduction=16), x)

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
    implementation: How it is computed. 'plain': as the definition reads, which forward-mode
      derivatives need. 'xla': in few passes over memory, at the end of a residual block together
      with the batch norm before it and the sum after it. 'pallas': the same with Pallas kernels for
      what it reduces, on an NVIDIA GPU since Ampere (on a TPU it was compiled, not run), by
      Pallas's Triton backend, which JAX means to remove. 'auto': for the paper's own CBAM 'pallas'
      on such a GPU as long as JAX has it, unless in a shard_map or on a mesh of explicit axes, else
      'xla', but 'plain' where the module is called by itself at inference; for other choices
      'plain'.
    dtype: Type of the output; None follows the input. Pools and gates are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an unknown pool, order or implementation, an even kernel, or a reduction under 1;
      on 'xla' or 'pallas' with choices that only the plain implementation has.
  """

  reduction: float = 16
  pools: Sequence[str] = ('avg', 'max')
  spatial_pool: str = 'channel'
  spatial_kernel: int = 7
  order: str = 'channel_first'
  use_bias: bool = True
  norm_momentum: float = 0.99
  group_size: int | None = None
  implementation: str = 'auto'
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    check_choice('the order of CBAM', self.order, ORDERS)
    check_choice('the implementation of CBAM', self.implementation, IMPLEMENTATIONS)
    # Unattached copies of the parts, so that their fields are checked here and not in a trace.
    channel, spatial = self._channel(parent=None), self._spatial(parent=None)
    self.reduction, self.pools = channel.reduction, channel.pools
    self.spatial_kernel, self.group_size = spatial.kernel_size, spatial.group_size
    self.norm_momentum = spatial.norm_momentum
    if self.implementation in ('xla', 'pallas') and not self.fusible:
      raise UserError(
        f'CBAM(implementation={self.implementation!r}) has order={self.order!r}, '
        f'pools={self.pools!r}, spatial_pool={self.spatial_pool!r} and dtype={self.dtype!r}; only '
        "the defaults of these are fused. Leave implementation='auto'."
      )
    super().__post_init__()

  def setup(self) -> None:
    """Makes the parts that the order asks for."""
    if self.order != 'spatial_only':
      self.channel = self._channel()
    if self.order != 'channel_only':
      self.spatial = self._spatial()

  @property
  def fusible(self) -> bool:
    """Whether `finish_block` computes this CBAM."""
    return (
      self.order == 'channel_first'
      and self.pools == ('avg', 'max')
      and self.spatial_pool == 'channel'
      and self.dtype is None
    )

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
    check_feature_map('CBAM', x)
    # Without gradients XLA makes as few passes of the definition, and quicker ones.
    by_default = self.implementation == 'auto' and self.fusible and train
    if by_default or self.implementation in ('xla', 'pallas'):
      return refine(
        x,
        self.channel.logits_of,
        functools.partial(self.spatial.logits_of, train=train),
        pallas=self._by_kernels(x),
      )
    if self.order == 'channel_first':
      return self.spatial(self.channel(x), train=train)
    if self.order == 'spatial_first':
      return self.channel(self.spatial(x, train=train))
    if self.order == 'channel_only':
      return self.channel(x)
    if self.order == 'spatial_only':
      return self.spatial(x, train=train)
    return gate(x, self.channel.logits(x) + self.spatial.logits(x, train=train), self.dtype)

  def finish_block(
    self, x: jax.Array, norm: BatchNorm, shortcut: jax.Array, *, train: bool
  ) -> jax.Array:
    """`relu(shortcut + CBAM(norm(x)))`, in few passes; needs `fusible`.

    Args:
      x: Features (N, *spatial, C).
      norm: Their batch norm, a submodule of the caller's.
      shortcut: What the block adds, like `x`.
      train: Whether batch norms use (and record) the batch's statistics.

    Returns:
      The block's output, of the shape and type of `shortcut`.

    Raises:
      UserError: If this CBAM is not `fusible`, or as the calls of both modules do.
    """
    if not self.fusible:
      raise UserError(
        f'finish_block of CBAM(order={self.order!r}, pools={self.pools!r}, '
        f'spatial_pool={self.spatial_pool!r}, dtype={self.dtype!r}): only the defaults of these '
        'are fused. Normalise, call the module, and add the shortcut.'
      )
    check_feature_map('CBAM', x)

    def affine(*moments: Any) -> tuple[jax.Array, jax.Array]:
      return norm.affine(x, train=train, moments=moments)

    return refine_and_add(
      x,
      norm.sign(x.shape[-1]),
      affine,
      shortcut,
      self.channel.logits_of,
      functools.partial(self.spatial.logits_of, train=train),
      train=train,
      pallas=self._by_kernels(x),
    )

  @nn.nowrap
  def _by_kernels(self, x: jax.Array) -> bool:
    return self.implementation == 'pallas' or (self.implementation == 'auto' and _kernels_pay(x))


def _kernels_pay(x: jax.Array) -> bool:
  """Whether Pallas kernels can take `x`, and are faster: on a GPU that Triton knows."""
  device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
  device = jax.devices(device)[0] if isinstance(device, str) else device
  # Pallas wants to be told how its results lie on what is not left to the compiler.
  meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
  automatic = all(kind == AxisType.Auto for mesh in meshes for kind in mesh.axis_types)
  return _has_triton(device) and automatic and x.size > 0 and x.shape[-1] % 16 == 0


def _has_triton(device: Any) -> bool:
  """Whether it is a GPU of NVIDIA's, Ampere or later, and JAX still has Pallas's Triton backend."""
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return False
  # Deprecated since JAX 0.11, to be removed in a later release.
  backend = importlib.util.find_spec('jax.experimental.pallas.triton')
  return float(device.compute_capability) >= 8 and backend is not None
