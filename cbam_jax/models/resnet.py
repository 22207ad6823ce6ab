"""ResNet, WideResNet and ResNeXt, with attention in every block."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from cbam_jax.errors import UserError, is_number, plain, whole
from cbam_jax.layers import max_pool, stored_relu
from cbam_jax.models.base import Classifier, LayerFactory, finish_block, run_block


class BasicBlock(nn.Module):
  """Two 3x3 convolutions around a shortcut (He et al., CVPR 2016, figure 5 left).

  Attributes:
    features: Output channels.
    strides: Step of the first convolution and of the shortcut.
    conv: Makes convolutions.
    norm: Makes batch norms.
    attention: Makes the attention, which stands after the last norm, before the shortcut is added.
  """

  features: int
  strides: int
  conv: LayerFactory
  norm: LayerFactory
  attention: LayerFactory | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    y = self.conv(self.features, (3, 3), strides=self.strides, name='conv1')(
      x, self.norm(name='norm1'), train=train
    )
    y = nn.relu(y)
    last = self.conv(self.features, (3, 3), name='conv2'), self.norm(name='norm2')
    if self.strides != 1 or x.shape[-1] != self.features:
      x = Shortcut(self.features, self.strides, self.conv, self.norm, name='shortcut')(
        x, train=train
      )
    return finish_block(y, *last, self.attention, x, train=train)


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions around a shortcut (He et al., CVPR 2016, figure 5 right).

  Attributes:
    features: Output channels.
    inner_features: Channels of the 3x3 convolution.
    groups: Groups of the 3x3 convolution (ResNeXt).
    strides: Step of the block.
    stride_in_1x1: Whether the first 1x1 takes the step, or the 3x3.
    conv: Makes convolutions.
    norm: Makes batch norms.
    attention: Makes the attention, which stands after the last norm, before the shortcut is added.
  """

  features: int
  inner_features: int
  groups: int
  strides: int
  stride_in_1x1: bool
  conv: LayerFactory
  norm: LayerFactory
  attention: LayerFactory | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
    inner = self.inner_features
    y = self.conv(inner, (1, 1), strides=first, name='conv1')(
      x, self.norm(name='norm1'), train=train
    )
    y = self.conv(inner, (3, 3), strides=second, groups=self.groups, name='conv2')(
      nn.relu(y), self.norm(name='norm2'), train=train
    )
    y = nn.relu(y)
    last = self.conv(self.features, (1, 1), name='conv3'), self.norm(name='norm3')
    if self.strides != 1 or x.shape[-1] != self.features:
      x = Shortcut(self.features, self.strides, self.conv, self.norm, name='shortcut')(
        x, train=train
      )
    return finish_block(y, *last, self.attention, x, train=train)


class Shortcut(nn.Module):
  """The projection of a block's input to its output's shape: a 1x1 convolution and a norm."""

  features: int
  strides: int
  conv: LayerFactory
  norm: LayerFactory

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H / strides, W / strides, features)."""
    conv = self.conv(self.features, (1, 1), strides=self.strides, name='conv')
    return conv(x, self.norm(name='norm'), train=train)


class Stem(nn.Module):
  """The first convolution: 7x7 at stride 2 and a max pool ('imagenet'), or one 3x3 ('cifar')."""

  kind: str
  conv: LayerFactory
  norm: LayerFactory

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Maps `images` (N, H, W, C) to 64 channels, at a 4th of the side or at the whole."""
    if self.kind == 'cifar':
      conv = self.conv(64, (3, 3), name='conv')
      return stored_relu(conv(images, self.norm(name='norm'), train=train))
    conv = self.conv(64, (7, 7), strides=2, name='conv')
    x = conv(images, self.norm(name='norm'), train=train)
    # A maximum and a ReLU can be taken in either order; this way the ReLU has a 4th of the work.
    return stored_relu(max_pool(x, 3, strides=2, padding=1))


class Stage(nn.Module):
  """Blocks at one resolution, the first of which takes the step, then the stage's attention."""

  blocks: Sequence[LayerFactory]
  attention: LayerFactory | None
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to the stage's output."""
    for i, block in enumerate(self.blocks, 1):
      x = run_block(block(name=f'block{i}'), x, train=train, remat=self.remat)
    if self.attention is not None:
      x = self.attention(name='stage_attention')(x, train=train)
    return x


class ResNet(Classifier):
  """A residual network of four stages (He et al., CVPR 2016).

  Attributes:
    stage_sizes: Blocks of each stage.
    bottleneck: Whether the blocks are bottlenecks (1x1, 3x3, 1x1) or basic (3x3, 3x3).
    width: Factor on the channels of every block; the stem stays at 64 (WideResNet-18).
    groups: Groups of a bottleneck's 3x3 convolution (ResNeXt).
    group_width: Channels of one group in the first stage.
    stride_in_1x1: Whether a bottleneck steps in its first 1x1, as in the network whose GFLOPs the
      paper prints, or in its 3x3, as in the code that everyone trains. Basic blocks have no 1x1.

  Raises:
    UserError: On a width that leaves no channel, or a count under 1.
  """

  stage_sizes: Sequence[int] = (2, 2, 2, 2)
  bottleneck: bool = False
  width: float = 1.0
  groups: int = 1
  group_width: int = 64
  stride_in_1x1: bool = False

  def __post_init__(self) -> None:
    if not (is_number(self.width) and 1 <= 64 * self.width < math.inf):
      raise UserError(
        f'width is {self.width!r}; it must be a number of at least 1/64, to leave one of the 64 '
        'channels of the first stage. The paper uses 1.0, 1.5 and 2.0.'
      )
    self.width = plain(self.width)
    if not isinstance(self.stage_sizes, (tuple, list)) or not self.stage_sizes:
      raise UserError(
        f'stage_sizes is {self.stage_sizes!r}; it must be the number of blocks of each stage, as '
        '(2, 2, 2, 2).'
      )
    self.stage_sizes = tuple(whole('a number in stage_sizes', v) for v in self.stage_sizes)
    for name in ('groups', 'group_width'):
      setattr(self, name, whole(name, getattr(self, name)))
    inner = int(64 * self.width) * self.group_width // 64
    if self.bottleneck and not inner:
      raise UserError(
        f'width={self.width} and group_width={self.group_width} leave no channel in a group; '
        'choose larger ones.'
      )
    super().__post_init__()

  @nn.compact
  def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Every stage's output; see `Classifier.features`."""
    x = Stem(self.stem, self.conv, self.norm, name='stem')(self.prepare(images), train=train)
    outputs = {}
    for i, size in enumerate(self.stage_sizes, 1):
      attention = self.stage_attention if i < len(self.stage_sizes) else None
      blocks = [self._block(i, strides=2 if i > 1 and b == 0 else 1) for b in range(size)]
      x = outputs[f'stage{i}'] = Stage(blocks, attention, self.remat, name=f'stage{i}')(
        x, train=train
      )
    return outputs

  @nn.nowrap
  def _block(self, stage: int, strides: int) -> LayerFactory:
    features = int(64 * 2 ** (stage - 1) * self.width)
    layers: dict[str, Any] = {'conv': self.conv, 'norm': self.norm, 'attention': self.attention}
    if not self.bottleneck:
      return functools.partial(BasicBlock, features, strides, **layers)
    return functools.partial(
      BottleneckBlock,
      features=4 * features,
      inner_features=features * self.group_width // 64 * self.groups,
      groups=self.groups,
      strides=strides,
      stride_in_1x1=self.stride_in_1x1,
      **layers,
    )
