"""Batch normalisation with PyTorch's running variance, over the batch or over groups of it."""

from __future__ import annotations

import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.errors import UserError, check_dtypes, checked_group_size, is_number, plain
from cbam_jax.layers.dtypes import Dtype, at_least_float32


class BatchNorm(nn.Module):
  """Normalises each channel by its mean and variance, then scales and shifts it.

  It differs from `flax.linen.BatchNorm` in two ways that matter to reproduce a PyTorch run: the
  running variance is the unbiased one (divided by n - 1), and the statistics can be taken over
  groups of `group_size` consecutive examples, as when each device of the reference normalised
  its own share. Under a sharded `jit`, `group_size=None` means the global batch.

  The variance is the mean of squares less the square of the mean, in one pass, as in linen: of
  features whose mean is a thousand times their deviation, float32 keeps few digits of it.

  Collections: `params` holds `scale` and `bias`, `batch_stats` holds `mean` and `var`, each (C,).

  Attributes:
    momentum: Share of the running statistics that a training step keeps (linen's sense: one minus
      PyTorch's momentum).
    epsilon: Added to the variance before the square root.
    group_size: Examples that share statistics in training; None for the whole batch. The running
      statistics take the mean over the groups.
    scale_init: Initial value of the scale.
    dtype: Type of the output; None follows the input. Statistics are float32 at the least.
    param_dtype: Type in which parameters are stored.

  Raises:
    UserError: On a momentum outside 0 to 1, a negative epsilon, a group of none, or an integer
      type.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  group_size: int | None = None
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32

  def __post_init__(self) -> None:
    self.momentum = momentum_share("a batch norm's momentum", self.momentum)
    self.group_size = checked_group_size(self.group_size)
    if not (is_number(self.epsilon) and self.epsilon >= 0):
      raise UserError(f'epsilon is {self.epsilon!r}; it must be a number of at least 0.')
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Normalises `x`.

    Args:
      x: Features (N, ..., C).
      train: Whether to use (and record) the batch's own statistics or the running ones.

    Returns:
      An array of the shape of `x`.

    Raises:
      UserError: On an input of integers, or without channels; in training, if `group_size` does not
        divide N, or if a channel has one value only.
    """
    scale, offset = self.affine(x, train=train)
    return (x.astype(scale.dtype) * scale + offset).astype(self.dtype or x.dtype)

  def affine(
    self,
    x: jax.Array | jax.ShapeDtypeStruct,
    *,
    train: bool,
    moments: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """The map that normalises `x`, for those who apply it as they read `x` for something else.

    Args:
      x: Features (N, ..., C), or, where nothing reads them, their shape and type.
      train: Whether to use (and record) the batch's own statistics or the running ones.
      moments: Each example's mean of `x` and of its squares, both (N, C), from those who have read
        `x` already; None to read it here. Only training asks for them.

    Returns:
      Scale and offset of `x * scale + offset`, float32 at the least, (1, 1, ..., C); or with
      groups (N, 1, ..., C).

    Raises:
      UserError: As the call does.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise UserError(
        f'BatchNorm got an input of {x.dtype}, shape {x.shape}; it takes floating point, '
        '(N, ..., C), channels last.'
      )
    scale, bias, *running = self._parameters(x.shape[-1])
    dtype = at_least_float32(self.dtype or x.dtype)

    def per_channel(vector: jax.Array) -> jax.Array:
      return lax.expand_dims(vector.astype(dtype), range(x.ndim - 1))

    if train:
      read = (cast(jax.Array, x),) if moments is None else moments
      mean, var = self._statistics(x.shape, *(v.astype(dtype) for v in read))
    else:
      mean, var = (per_channel(statistic) for statistic in running)
    factor = lax.rsqrt(var + self.epsilon) * per_channel(scale)
    return factor, per_channel(bias) - mean * factor

  def sign(self, channels: int) -> jax.Array:
    """The sign of the scale of `affine`, (C,): whether it keeps the order of a channel's values."""
    return jnp.sign(self._parameters(channels)[0])

  @nn.compact
  def _parameters(self, channels: int) -> tuple[jax.Array, ...]:
    """Scale, bias, running mean and running variance, (C,) each."""
    shape, dtype = (channels,), at_least_float32(self.param_dtype)
    return (
      self.param('scale', self.scale_init, shape, self.param_dtype),
      self.param('bias', nn.initializers.zeros, shape, self.param_dtype),
      self.variable('batch_stats', 'mean', jnp.zeros, shape, dtype).value,
      self.variable('batch_stats', 'var', jnp.ones, shape, dtype).value,
    )

  def _statistics(self, shape: tuple[int, ...], *read: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the batch, (1, 1, ..., C), or with groups (N, 1, ..., C).

    They are read from the features of that shape, or from the moments of each example.
    """
    shape = self._grouped(shape)
    axes = tuple(range(1, len(shape) - 1))
    if len(read) == 1:
      # One pass over the features: both sums fuse, where E[(x - mean)^2] would read them again.
      grouped = read[0].reshape(shape)
      read = grouped, lax.square(grouped)
    else:
      read = tuple(v.reshape(*shape[:2], *(1 for _ in axes[1:]), shape[-1]) for v in read)
    mean, square = (jnp.mean(v, axes, keepdims=True) for v in read)
    var = jnp.maximum(square - lax.square(mean), 0)
    if not self.is_initializing():
      count = math.prod(shape[1:-1])
      self._record('mean', mean)
      self._record('var', var * (count / (count - 1)))

    def per_example(vector: jax.Array) -> jax.Array:
      vector = vector.reshape(vector.shape[0], *vector.shape[2:])
      return vector if len(vector) == 1 else jnp.repeat(vector, shape[1], 0)

    return per_example(mean), per_example(var)

  def _grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The batch's shape as (groups, examples of a group, ..., C)."""
    size = None if self.is_initializing() else self.group_size
    if size is not None and shape[0] % size:
      raise UserError(
        f'group_size={size} does not divide the batch of {shape[0]}; choose a divisor of the '
        'global batch size, or None to normalise over all of it.'
      )
    groups, size = (1, shape[0]) if size is None else (shape[0] // size, size)
    count = math.prod((size, *shape[1:-1]))
    if not self.is_initializing() and isinstance(count, int) and count < 2:
      raise UserError(
        f'batch norm in training got {count} value(s) a channel (input {shape}, '
        f'group_size={self.group_size}); a variance needs two. Use a larger batch or larger images.'
      )
    return groups, size, *shape[1:]

  def _record(self, statistic: str, batch: jax.Array) -> None:
    running: jax.Array = self.get_variable('batch_stats', statistic)
    batch = jnp.mean(batch.reshape(-1, batch.shape[-1]), 0).astype(running.dtype)
    kept = self.momentum * running + (1 - self.momentum) * batch
    self.put_variable('batch_stats', statistic, kept)


def momentum_share(what: str, momentum: Any) -> Any:
  """`momentum`, a number of Python's or JAX's, or `UserError` unless it is a share."""
  if isinstance(momentum, jax.Array):  # of a schedule; it may be traced
    return momentum
  if not (is_number(momentum) and 0 <= momentum <= 1):
    raise UserError(
      f'{what} is {momentum!r}; it must be a number from 0 to 1, the share of the running '
      "statistics that a step keeps (one minus PyTorch's momentum)."
    )
  return plain(momentum)
