"""The two-layer perceptron that turns a pooled vector into one logit a channel."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.errors import UserError, is_number, plain
from cbam_jax.layers import Dtype

# PyTorch's default for a linear layer: uniform within ±1/sqrt(fan_in).
torch_linear_init = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def hidden_size(channels: int, reduction: float) -> int:
  """The width of the bottleneck: `round(channels / reduction)`, never under 1."""
  return max(1, round(channels / reduction))


def checked_reduction(what: str, reduction: float) -> float:
  """`reduction`, or `UserError` unless the hidden layer is no wider than its input."""
  if not (is_number(reduction) and 1 <= reduction < math.inf):
    raise UserError(
      f'{what}(reduction={reduction!r}): the reduction divides the channels to give the hidden '
      'size, so it must be a number of at least 1; the paper uses 16.'
    )
  return plain(reduction)


class BottleneckMLP(nn.Module):
  """`fc2(relu(fc1(v)))` on the last axis, C to `round(C / reduction)` to C.

  Attributes:
    reduction: Channels over hidden units.
    use_bias: Whether both layers have biases.
    param_dtype: Type in which parameters are stored.
  """

  reduction: float
  use_bias: bool = True
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, v: jax.Array) -> jax.Array:
    """Maps `v` (..., C) to logits of the same shape and type."""

    def dense(features: int, name: str) -> nn.Dense:
      return nn.Dense(
        features,
        use_bias=self.use_bias,
        kernel_init=torch_linear_init,
        dtype=v.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    channels = v.shape[-1]
    hidden = nn.relu(dense(hidden_size(channels, self.reduction), 'fc1')(v))
    return dense(channels, 'fc2')(hidden)
