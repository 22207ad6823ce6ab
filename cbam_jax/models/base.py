"""What every network here has in common: its public fields, its calls, and its layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.attention import CBAM
from cbam_jax.errors import check_choice, check_dtypes, check_feature_map, checked_group_size, whole
from cbam_jax.layers import BatchNorm, Conv, Dtype, at_least_float32, stored_relu

STEMS = ('imagenet', 'cifar')

# Called with the name of the submodule, makes the layer or the attention of that name.
LayerFactory: TypeAlias = Callable[..., Any]

# PyTorch's kaiming_normal_() of the classifier's weight, the paper authors' choice.
kaiming_fan_in = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class Classifier(nn.Module):
  """An image classifier made of stages; the networks of this package derive from it.

  Attributes:
    num_classes: Classes, the width of the logits.
    stem: 'imagenet' (the paper's, reducing) or 'cifar' (full resolution, for small images).
    attention: Makes the attention of every block, called as `attention(name=...)`; None for none.
    stage_attention: Makes the attention that stands between stages, where features are a 4th, 8th
      and 16th of the images' side (BAM); None for none.
    group_size: Examples that share batch-norm statistics; None for the whole batch.
    dtype: Computation type of the features. Statistics, gates and logits are float32 at the least.
    param_dtype: Type in which parameters are stored.
    remat: Whether the backward pass computes each block again rather than keep what is within it:
      more time, much less memory.

  Raises:
    UserError: On an unknown stem, fewer than one class, a group of none, or an integer type.
  """

  num_classes: int = 1000
  stem: str = 'imagenet'
  attention: LayerFactory | None = None
  stage_attention: LayerFactory | None = None
  group_size: int | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  remat: bool = False

  def __post_init__(self) -> None:
    check_choice('the stem', self.stem, STEMS)
    self.num_classes = whole('num_classes', self.num_classes)
    self.group_size = checked_group_size(self.group_size)
    check_dtypes(type(self).__name__, self.dtype, self.param_dtype)
    super().__post_init__()

  def setup(self) -> None:
    """Makes the dense layers; what comes before them is made in `features`."""
    # The classifier stays in float32 beside bfloat16 features, so that the logits do.
    self.head = nn.Dense(
      self.num_classes,
      kernel_init=kaiming_fan_in,
      dtype=at_least_float32(self.dtype),
      param_dtype=self.param_dtype,
    )

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Classifies `images`.

    Args:
      images: (N, H, W, C), floating point, normalised.
      train: Whether batch norms use (and record) the batch's statistics.

    Returns:
      Logits (N, num_classes), float32 at the least.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    *_, last = self.features(images, train=train).values()
    return self.head(self.pool(last))

  def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Every stage's output.

    Args:
      images: (N, H, W, C), floating point, normalised.
      train: Whether batch norms use (and record) the batch's statistics.

    Returns:
      'stage1', 'stage2', ... in order, each (N, h, w, c) as the next stage receives it.

    Raises:
      UserError: On a wrong rank, an integer type, or an axis without extent.
    """
    raise NotImplementedError

  def pool(self, x: jax.Array) -> jax.Array:
    """The last stage's features averaged over positions, (N, c), float32 at the least."""
    return jnp.mean(x, (1, 2), dtype=at_least_float32(self.dtype))

  @nn.nowrap
  def prepare(self, images: jax.Array) -> jax.Array:
    """`images` checked and in the computation type."""
    check_feature_map(type(self).__name__, images, spatial_axes=(2,))
    return jnp.asarray(images, self.dtype)

  @property
  def conv(self) -> LayerFactory:
    """Makes convolutions of this network's types."""
    return functools.partial(Conv, dtype=self.dtype, param_dtype=self.param_dtype)

  @property
  def norm(self) -> LayerFactory:
    """Makes batch norms of this network's types and groups."""
    return functools.partial(
      BatchNorm, group_size=self.group_size, dtype=self.dtype, param_dtype=self.param_dtype
    )


def run_block(block: nn.Module, x: jax.Array, *, train: bool, remat: bool) -> jax.Array:
  """`block(x, train=train)`, with only `x` kept for the backward pass if `remat`."""

  def run(block: Any, x: jax.Array) -> jax.Array:
    return block(x, train=train)

  return (nn.remat(run) if remat else run)(block, x)


def finish_block(
  x: jax.Array,
  conv: Any,
  norm: Any,
  attention: LayerFactory | None,
  shortcut: jax.Array,
  *,
  train: bool,
) -> jax.Array:
  """`relu(attention(norm(conv(x))) + shortcut)`: how every residual block ends.

  Args:
    x: Features before the last convolution.
    conv: The last convolution.
    norm: Its batch norm.
    attention: Makes the attention; None for none.
    shortcut: What is added, like the convolution's result.
    train: Whether batch norms use (and record) the batch's statistics.
  """
  refine = None if attention is None else attention(name='attention')
  # A norm of another class may have another map.
  if (
    type(refine) is CBAM
    and type(norm) is BatchNorm
    and refine.fusible
    and refine.implementation != 'plain'
  ):
    return refine.finish_block(conv(x), norm, shortcut, train=train)
  x = conv(x, norm, train=train)
  if refine is not None:
    x = refine(x, train=train)
  return stored_relu(x + shortcut)
