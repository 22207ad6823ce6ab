"""Channel attention (paper section 3, equation 2): what to attend to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.attention.gating import gate
from cbam_jax.attention.mlp import BottleneckMLP, checked_reduction
from cbam_jax.errors import UserError, check_choice, check_dtypes, check_feature_map
from cbam_jax.layers import Dtype, at_least_float32, max_over_axis


def _average(v: jax.Array) -> jax.Array:
  return jnp.mean(v, 1)


def _maximum(v: jax.Array) -> jax.Array:
  return jnp.squeeze(max_over_axis(v, 1), 1)


def _log_sum_exp(v: jax.Array) -> jax.Array:
  # The shift cancels in value and derivative alike, so it may stay out of the derivative.
  shift = lax.stop_gradient(jnp.max(v, 1, keepdims=True))
  return jnp.squeeze(shift, 1) + jnp.log(jnp.sum(jnp.exp(v - shift), 1))


def _l2_norm(v: jax.Array) -> jax.Array:
  squares = jnp.sum(lax.square(v), 1)
  # A square root has no derivative at 0, which a channel that ReLU has silenced reaches.
  positive = squares > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'avg': _average,
  'max': _maximum,
  'lse': _log_sum_exp,
  'lp': _l2_norm,
}
"""Each takes (N, positions, C) to (N, C); `lp` is the L2 norm, the authors' power-2 pool."""


class ChannelAttention(nn.Module):
  """Scales each channel by a gate computed from its pooled values.

  `x * sigmoid(sum over pools of MLP(pool(x)))`, one MLP shared by all pools: equation 2 with the
  default average and maximum. With `pools=('avg',)` it is the ablation's squeeze-and-excitation.

  Attributes:
    reduction: Channels over hidden units of the MLP, at least 1.
    pools: Which of 'avg', 'max', 'lse' (log-sum-exp) and 'lp' (L2 norm) describe a channel.
    use_bias: Whether the MLP has biases (the authors' has, timm's has not).
    dtype: Type of the output; None follows the input. Pools and gate are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On an unknown pool, none at all, a reduction under 1, or a `use_bias` of another
      type than bool.
  """

  reduction: float = 16
  pools: Sequence[str] = ('avg', 'max')
  use_bias: bool = True
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    self.reduction = checked_reduction(type(self).__name__, self.reduction)
    if not isinstance(self.use_bias, bool):
      raise UserError(f'use_bias is {self.use_bias!r}; it must be True or False.')
    if isinstance(self.pools, str) or not self.pools:
      raise UserError(
        f'pools is {self.pools!r}; give a sequence of one or more of {", ".join(POOLS)}, '
        "for example ('avg', 'max')."
      )
    for pool in self.pools:
      check_choice('one of the pools of channel attention', pool, POOLS)
    # A module with a list cannot be hashed, as `jit` does to what is static.
    self.pools = tuple(self.pools)
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  @nn.compact
  def logits_of(self, *pooled: jax.Array) -> jax.Array:
    """The map before the sigmoid, (N, C), from what each of `pools` gives, (N, C) too."""
    mlp = BottleneckMLP(self.reduction, self.use_bias, self.param_dtype, name='mlp')
    return jnp.sum(mlp(jnp.stack(pooled, 1)), 1)

  def logits(self, x: jax.Array) -> jax.Array:
    """The map before the sigmoid: (N, 1, ..., 1, C), float32 at the least."""
    check_feature_map(type(self).__name__, x)
    values = x.astype(at_least_float32(self.dtype or x.dtype))
    values = values.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    logits = self.logits_of(*(POOLS[pool](values) for pool in self.pools))
    return lax.expand_dims(logits, range(1, x.ndim - 1))

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
