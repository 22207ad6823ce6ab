"""MobileNetV1 (Howard et al., 2017), with attention after every convolution."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax

from cbam_jax.errors import UserError, is_number, plain
from cbam_jax.layers import stored_relu
from cbam_jax.models.base import Classifier, LayerFactory, run_block


class StageSpec(NamedTuple):
  """One stage: the channels of its blocks, how many there are, and the first one's step."""

  features: int
  blocks: int
  strides: int


STAGES = (
  StageSpec(64, 1, 1),
  StageSpec(128, 2, 2),
  StageSpec(256, 2, 2),
  StageSpec(512, 6, 2),
  StageSpec(1024, 2, 2),
)


class Unit(nn.Module):
  """Convolution, norm, ReLU, attention.

  Attributes:
    features: Output channels.
    kernel_size: Side of the convolution.
    strides: Step of the convolution.
    groups: Groups of the convolution; its channels for a depthwise one.
    conv: Makes convolutions.
    norm: Makes batch norms.
    attention: Makes the attention.
  """

  features: int
  kernel_size: int
  strides: int
  groups: int
  conv: LayerFactory
  norm: LayerFactory
  attention: LayerFactory | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    kernel_size = (self.kernel_size, self.kernel_size)
    conv = self.conv(
      self.features, kernel_size, strides=self.strides, groups=self.groups, name='conv'
    )
    x = stored_relu(conv(x, self.norm(name='norm'), train=train))
    if self.attention is not None:
      x = self.attention(name='attention')(x, train=train)
    return x


class SeparableBlock(nn.Module):
  """A depthwise 3x3, then a pointwise 1x1 convolution.

  Attributes:
    features: Output channels.
    strides: Step of the depthwise convolution.
    conv: Makes convolutions.
    norm: Makes batch norms.
    attention: Makes the attention of both units.
  """

  features: int
  strides: int
  conv: LayerFactory
  norm: LayerFactory
  attention: LayerFactory | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    layers = (self.conv, self.norm, self.attention)
    c = x.shape[-1]
    x = Unit(c, 3, self.strides, c, *layers, name='depthwise')(x, train=train)
    return Unit(self.features, 1, 1, 1, *layers, name='pointwise')(x, train=train)


class Stage(nn.Module):
  """Separable blocks at one resolution, then the stage's attention."""

  features: int
  blocks: int
  strides: int
  conv: LayerFactory
  norm: LayerFactory
  attention: LayerFactory | None
  stage_attention: LayerFactory | None
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    for i in range(self.blocks):
      strides = self.strides if i == 0 else 1
      block = SeparableBlock(
        self.features, strides, self.conv, self.norm, self.attention, name=f'block{i + 1}'
      )
      x = run_block(block, x, train=train, remat=self.remat)
    if self.stage_attention is not None:
      x = self.stage_attention(name='stage_attention')(x, train=train)
    return x


class MobileNetV1(Classifier):
  """Thirteen separable blocks in five stages.

  Attention stands after the stem, after every depthwise and after every pointwise convolution (27
  places); stage attention after stages 2 to 4, before the next one's step.

  Attributes:
    width: Factor on every width, `int(channels * width)`; the paper's second one is 0.7.

  Raises:
    UserError: On a width that leaves no channel.
  """

  width: float = 1.0

  def __post_init__(self) -> None:
    if not (is_number(self.width) and 1 <= 32 * self.width < math.inf):
      raise UserError(
        f'width is {self.width!r}; it must be a number of at least 1/32, to leave one of the 32 '
        'channels of the stem. The paper uses 1.0 and 0.7.'
      )
    self.width = plain(self.width)
    super().__post_init__()

  @nn.compact
  def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Every stage's output; see `Classifier.features`."""
    layers = (self.conv, self.norm, self.attention)
    strides = 2 if self.stem == 'imagenet' else 1
    stem = Unit(int(32 * self.width), 3, strides, 1, *layers, name='stem')
    x = stem(self.prepare(images), train=train)
    outputs = {}
    for i, spec in enumerate(STAGES, 1):
      stage = Stage(
        int(spec.features * self.width),
        spec.blocks,
        spec.strides,
        *layers,
        stage_attention=self.stage_attention if i in (2, 3, 4) else None,
        remat=self.remat,
        name=f'stage{i}',
      )
      x = outputs[f'stage{i}'] = stage(x, train=train)
    return outputs
