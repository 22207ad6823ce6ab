"""Squeeze-and-excitation (Hu et al., CVPR 2018), the paper's baseline."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.attention.gating import gate
from cbam_jax.attention.mlp import BottleneckMLP, checked_reduction
from cbam_jax.errors import check_dtypes, check_feature_map
from cbam_jax.layers import Dtype, at_least_float32


class SqueezeExcitation(nn.Module):
  """Scales each channel by a gate computed from its mean: `x * sigmoid(MLP(mean(x)))`.

  Attributes:
    reduction: Channels over hidden units of the MLP, at least 1.
    dtype: Type of the output; None follows the input. Pool and gate are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On a reduction under 1.
  """

  reduction: float = 16
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    self.reduction = checked_reduction(type(self).__name__, self.reduction)
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  @nn.compact
  def logits(self, x: jax.Array) -> jax.Array:
    """The map before the sigmoid: (N, 1, ..., 1, C), float32 at the least."""
    check_feature_map(type(self).__name__, x)
    spatial_axes = range(1, x.ndim - 1)
    squeezed = jnp.mean(x, tuple(spatial_axes), dtype=at_least_float32(self.dtype or x.dtype))
    logits = BottleneckMLP(self.reduction, param_dtype=self.param_dtype, name='mlp')(squeezed)
    return lax.expand_dims(logits, spatial_axes)

  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Refines `x`.

    Args:
      x: Features (N, *spatial, C), one to three spatial axes.
      train: Has no effect; taken so that every attention is called alike.

    Returns:
      The refined features, of the shape of `x`.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    del train
    return gate(x, self.logits(x), self.dtype)
