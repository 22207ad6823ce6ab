"""Which layer of ours is which of PyTorch's: one table for each network and published layout.

A row names the same layer twice, by its path here and by its name in PyTorch. `{s}` and `{b}`
stand for a number and `{b-1}` for one less; `{name}` is where an attention's own table goes, under
the name it has in that layout. Rows come in PyTorch's order, and a layout that is taken where
none is asked for or recognised comes first.

Published are: the paper authors' ResNets with CBAM and BAM ('official'), torchvision's ResNets and
VGG16, and timm's ResNets with and without CBAM and SE, MobileNetV1 and VGG16. All else follows
them by extension, so that every network converts: SE as in torchvision and timm (theirs agree),
any attention in MobileNet and VGG16 in the form of its authors' code, and the slots named
`{name}_stem`, `{name}_dw`, `{name}_pw`, `stage_{name}` and `reduce`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import flax.linen as nn

from cbam_jax.attention import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation
from cbam_jax.errors import UserError
from cbam_jax.interop.forms import (
  FLATTENED,
  FLATTENED_AS_CONV,
  KERNEL,
  POINTWISE,
  POINTWISE_UNBIASED,
  REVERSED,
  Form,
)
from cbam_jax.models import VGG, MobileNetV1, ResNet
from cbam_jax.models.base import Classifier


class Row(NamedTuple):
  """One layer: its path here, its name in PyTorch, and the layout of its kernel there."""

  ours: str
  torch: str
  form: Form = KERNEL

  def match(self, path: str) -> dict[str, int] | None:
    """The numbers that make `ours` equal `path`, if any do."""
    found = re.fullmatch(re.sub(r'\{(\w)\}', r'(?P<\1>\\d+)', self.ours), path)
    return found and {letter: int(digits) for letter, digits in found.groupdict().items()}

  def torch_name(self, numbers: dict[str, int]) -> str:
    """`torch` with its numbers filled in."""
    return re.sub(r'\{(\w)(-1)?\}', lambda m: str(numbers[m[1]] - (1 if m[2] else 0)), self.torch)

  def matches_torch(self, name: str) -> bool:
    """Whether some numbers make `torch` equal `name`."""
    return bool(re.fullmatch(re.sub(r'\\\{.*?\\\}', r'\\d+', re.escape(self.torch)), name))


Rows: TypeAlias = tuple[Row, ...]

LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}
"""A layer's arrays, in PyTorch's order."""


def _within(ours: str, torch: str, rows: Iterable[Row]) -> Rows:
  return tuple(Row(f'{ours}/{row.ours}', f'{torch}.{row.torch}', row.form) for row in rows)


# ---------------------------------------------------------------------------------- attention

_SE = (
  Row('mlp/fc1', 'fc1', POINTWISE),
  Row('mlp/fc2', 'fc2', POINTWISE),
)

_CHANNEL = (
  Row('mlp/fc1', 'mlp.1'),
  Row('mlp/fc2', 'mlp.3'),
)
_SPATIAL = (
  Row('reduce', 'spatial.reduce'),
  Row('conv', 'spatial.conv'),
  Row('norm', 'spatial.bn'),
)
_CBAM = (
  *_within('channel', 'ChannelGate', _CHANNEL),
  *_within('spatial', 'SpatialGate', _SPATIAL),
)

# timm's MLP has no biases, and its spatial convolution reads (mean, max) where ours, as the
# authors', reads (max, mean).
_TIMM_CHANNEL = (
  Row('mlp/fc1', 'fc1', POINTWISE_UNBIASED),
  Row('mlp/fc2', 'fc2', POINTWISE_UNBIASED),
)
_TIMM_SPATIAL = (
  Row('reduce', 'reduce'),
  Row('conv', 'conv.conv', REVERSED),
  Row('norm', 'conv.bn'),
)
_TIMM_CBAM = (
  *_within('channel', 'channel', _TIMM_CHANNEL),
  *_within('spatial', 'spatial', _TIMM_SPATIAL),
)

_BAM = (
  Row('channel/fc1', 'channel_att.gate_c.gate_c_fc_0'),
  Row('channel/norm', 'channel_att.gate_c.gate_c_bn_1'),
  Row('channel/fc2', 'channel_att.gate_c.gate_c_fc_final'),
  Row('spatial/reduce', 'spatial_att.gate_s.gate_s_conv_reduce0'),
  Row('spatial/reduce_norm', 'spatial_att.gate_s.gate_s_bn_reduce0'),
  Row('spatial/conv1', 'spatial_att.gate_s.gate_s_conv_di_0'),
  Row('spatial/norm1', 'spatial_att.gate_s.gate_s_bn_di_0'),
  Row('spatial/conv2', 'spatial_att.gate_s.gate_s_conv_di_1'),
  Row('spatial/norm2', 'spatial_att.gate_s.gate_s_bn_di_1'),
  Row('spatial/out', 'spatial_att.gate_s.gate_s_conv_final'),
)

# What a network calls each attention, and its rows.
_ATTENTIONS: dict[type[nn.Module], dict[str, tuple[str, Rows]]] = {
  CBAM: {'official': ('cbam', _CBAM), 'timm': ('se', _TIMM_CBAM)},
  ChannelAttention: {'official': ('channel_gate', _CHANNEL), 'timm': ('se', _TIMM_CHANNEL)},
  SpatialAttention: {'official': ('spatial_gate', _SPATIAL), 'timm': ('se', _TIMM_SPATIAL)},
  SqueezeExcitation: {'official': ('se', _SE), 'torchvision': ('se', _SE), 'timm': ('se', _SE)},
  BAM: {'official': ('bam', _BAM)},
}

# ----------------------------------------------------------------------------------- networks

_CONVOLUTIONS = (
  Row('conv1', 'conv1'),
  Row('norm1', 'bn1'),
  Row('conv2', 'conv2'),
  Row('norm2', 'bn2'),
  Row('conv3', 'conv3'),
  Row('norm3', 'bn3'),
)
_SHORTCUT = (
  Row('shortcut/conv', 'downsample.0'),
  Row('shortcut/norm', 'downsample.1'),
)
_ATTENTION = (Row('attention', '{name}'),)


def _resnet(*block: Row) -> Rows:
  return (
    Row('stem/conv', 'conv1'),
    Row('stem/norm', 'bn1'),
    Row('stage{s}/stage_attention', '{name}{s}'),
    *_within('stage{s}/block{b}', 'layer{s}.{b-1}', block),
    Row('head', 'fc'),
  )


_RESNET = _resnet(*_CONVOLUTIONS, *_SHORTCUT, *_ATTENTION)
_TIMM_RESNET = _resnet(*_CONVOLUTIONS, *_ATTENTION, *_SHORTCUT)

_TIMM_MOBILENET = (
  Row('stem/conv', 'conv_stem'),
  Row('stem/norm', 'bn1'),
  Row('stem/attention', '{name}_stem'),
  Row('stage{s}/block{b}/depthwise/conv', 'blocks.{s-1}.{b-1}.conv_dw'),
  Row('stage{s}/block{b}/depthwise/norm', 'blocks.{s-1}.{b-1}.bn1'),
  Row('stage{s}/block{b}/depthwise/attention', 'blocks.{s-1}.{b-1}.{name}_dw'),
  Row('stage{s}/block{b}/pointwise/conv', 'blocks.{s-1}.{b-1}.conv_pw'),
  Row('stage{s}/block{b}/pointwise/norm', 'blocks.{s-1}.{b-1}.bn2'),
  Row('stage{s}/block{b}/pointwise/attention', 'blocks.{s-1}.{b-1}.{name}_pw'),
  Row('stage{s}/stage_attention', '{name}{s}'),
  Row('head', 'classifier'),
)


def _vgg(stage_sizes: tuple[int, ...], *dense: Row) -> Rows:
  """In PyTorch one list counts every convolution, ReLU and pool: 0, 2; 5, 7; 10, 12, 14; ..."""
  rows = []
  position = 0
  for s, size in enumerate(stage_sizes, 1):
    for i in range(1, size + 1):
      rows.append(Row(f'stage{s}/conv{i}', f'features.{position}'))
      position += 2
    position += 1
  attention = (
    Row('stage{s}/attention', '{name}{s}'),
    Row('stage{s}/stage_attention', 'stage_{name}{s}'),
  )
  return (*rows, *dense, *attention)


_VGG_DENSE = (
  Row('fc1', 'classifier.0', FLATTENED),
  Row('fc2', 'classifier.3'),
  Row('head', 'classifier.6'),
)
_TIMM_VGG_DENSE = (
  Row('fc1', 'pre_logits.fc1', FLATTENED_AS_CONV),
  Row('fc2', 'pre_logits.fc2', POINTWISE),
  Row('head', 'head.fc'),
)

# -------------------------------------------------------------------------------------- look-up

READ_INPUT = (
  'stem/conv',
  'stage1/conv1',
  'channel/mlp/fc1',
  'channel/fc1',
  'mlp/fc1',
  'spatial/reduce',
  'reduce',
)
"""The layers, one in each network or module, whose kernels tell how many channels come in."""

READ_AXES = ('conv', 'spatial/conv', 'spatial/conv1')
"""The layers, one in each spatial attention alone, whose kernels tell how many axes it is over."""


def tables(model: nn.Module) -> dict[str, Rows]:
  """The table of each layout of `model`, which is a network or an attention module alone.

  Raises:
    UserError: If `model` is neither.
  """
  if isinstance(model, ResNet):
    official = _fill(_RESNET, model, 'official')
    return {
      'official': official,
      'torchvision': official,
      'timm': _fill(_TIMM_RESNET, model, 'timm'),
    }
  if isinstance(model, MobileNetV1):
    return {'timm': _fill(_TIMM_MOBILENET, model, 'official')}
  if isinstance(model, VGG):
    return {
      'torchvision': _fill(_vgg(model.stage_sizes, *_VGG_DENSE), model, 'official'),
      'timm': _fill(_vgg(model.stage_sizes, *_TIMM_VGG_DENSE), model, 'official'),
    }
  kind = _kind(model)
  if kind is None:
    raise UserError(
      f'{type(model).__name__} has no counterpart in PyTorch; give a network of create_model or '
      f'one of {", ".join(attention.__name__ for attention in _ATTENTIONS)}.'
    )
  return {layout: rows for layout, (_, rows) in _ATTENTIONS[kind].items()}


def _kind(module: nn.Module) -> type[nn.Module] | None:
  return next((kind for kind in _ATTENTIONS if isinstance(module, kind)), None)


def _fill(rows: Rows, model: Classifier, layout: str) -> Rows:
  """`rows` with the table of the network's attention, as in `layout`, in place of each `{name}`.

  An attention that has no table leaves nothing, so that its parameters are found to be unmapped.
  """
  filled: list[Row] = []
  for row in rows:
    if '{name}' not in row.torch:
      filled.append(row)
      continue
    slot = row.ours.rpartition('/')[2]
    factory = getattr(model, slot)
    kind = _kind(factory(name=slot)) if factory is not None else None
    if kind is not None:
      layouts = _ATTENTIONS[kind]
      name, attention = layouts.get(layout, layouts['official'])
      filled += _within(row.ours, row.torch.replace('{name}', name), attention)
  return tuple(filled)
