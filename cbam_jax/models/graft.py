"""Attention put into a trained plain network, which computes what it did before.

A gate whose last layer is 0 is the sigmoid of 0 for every input, so the attention multiplies its
features by one number. The layer before it, or those after it, are divided by that number. From
there the gates learn: their last layers are 0, but the derivatives by them are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from cbam_jax.attention import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation
from cbam_jax.errors import UserError, check_problems
from cbam_jax.layers import once_options
from cbam_jax.models.base import Classifier
from cbam_jax.models.mobilenet import MobileNetV1
from cbam_jax.models.resnet import ResNet
from cbam_jax.models.vgg import VGG


class Gate(NamedTuple):
  """An attention that does the same to every input.

  Attributes:
    value: What it multiplies features by.
    zeroed: Its layers that are 0 for that.
  """

  value: float
  zeroed: tuple[str, ...]


_CHANNEL, _SPATIAL = 'channel/mlp/fc2', 'spatial/norm'

# Two sigmoids of 0, but one of a sum in 'parallel'.
_CBAM = {
  'channel_first': Gate(1 / 4, (_CHANNEL, _SPATIAL)),
  'spatial_first': Gate(1 / 4, (_CHANNEL, _SPATIAL)),
  'parallel': Gate(1 / 2, (_CHANNEL, _SPATIAL)),
  'channel_only': Gate(1 / 2, (_CHANNEL,)),
  'spatial_only': Gate(1 / 2, (_SPATIAL,)),
}

# BAM multiplies by 1 + sigmoid(logits). Where these are channel * spatial, the derivative by the
# one is the other: with both 0 neither would ever learn, with one 0 it does, and then both do.
_BAM = {
  'sum': Gate(3 / 2, ('channel/fc2', 'spatial/out')),
  'product': Gate(3 / 2, ('channel/fc2',)),
}

GATES: dict[type[nn.Module], Callable[[Any], Gate]] = {
  SqueezeExcitation: lambda module: Gate(1 / 2, ('mlp/fc2',)),
  ChannelAttention: lambda module: Gate(1 / 2, ('mlp/fc2',)),
  SpatialAttention: lambda module: Gate(1 / 2, ('norm',)),
  CBAM: lambda module: _CBAM[module.order],
  BAM: lambda module: _BAM[module.combine],
}


class Layers(NamedTuple):
  """The layers of a network around its attention.

  Attributes:
    first: Reads the images.
    before: What those are called, but for a number, of which the last stands right before a
      block's attention, or with only a ReLU between.
    next_stage: Those of a stage that read the stage before.
    after_stages: Reads the last stage, with only averages or maxima between.
  """

  first: str
  before: str
  next_stage: tuple[str, ...]
  after_stages: str


# A ReLU, a maximum and an average let a positive factor through.
LAYERS: dict[type[Classifier], Layers] = {
  ResNet: Layers('stem/conv', 'norm', ('block1/conv1', 'block1/shortcut/conv'), 'head'),
  MobileNetV1: Layers('stem/conv', 'norm', ('block1/depthwise/conv',), 'head'),
  VGG: Layers('stage1/conv1', 'conv', ('conv1',), 'fc1'),
}

Init: TypeAlias = Callable[[jax.Array], dict[str, jax.Array]]

_PLACE = re.compile(r'\w+/(.+?)/(attention|stage_attention)/')


def graft(
  model: Classifier, plain_variables: Mapping[str, Any], *, key: jax.Array | None = None
) -> dict[str, Any]:
  """The variables of `model` that compute what the same network computes without attention.

  The logits are equal, in training mode too, and each attention learns from the first step. So
  are the stages' outputs, but those behind a `stage_attention` are multiplied by its value.

  Args:
    model: A network of `create_model`, with any attention of this package.
    plain_variables: `{'params': ..., 'batch_stats': ...}` of the same network with
      `attention='none'`, such as `from_torch` returns.
    key: Random key of those values of the attention that are not 0; None for
      `jax.random.key(0)`.

  Returns:
    `{'params': ..., 'batch_stats': ...}` as `model.init` makes it, arrays of the same types.

  Raises:
    UserError: If `model` is another module, has no attention or one of another package; if
      `plain_variables` has arrays that are missing, left over or of the wrong shape, naming them.
  """
  layers = _layers(model)
  gates = _gates(model)
  plain = _flat(plain_variables)
  channels = _input_channels(plain.get(f'params/{layers.first}/kernel'))

  def init(key: jax.Array) -> dict[str, jax.Array]:
    images = jnp.zeros((1, 32, 32, channels))
    return flatten_dict(model.init(key, images, train=False), sep='/')

  key = jax.random.key(0) if key is None else key
  shapes = jax.eval_shape(init, key)
  new = [path for path in shapes if gates.keys() & set(path.split('/'))]
  places = sorted({match.groups() for path in new if (match := _PLACE.match(path))})
  zeros = {
    path: jnp.zeros(shapes[path].shape, shapes[path].dtype)
    for block, slot in places
    for layer in gates[slot].zeroed
    for path in _params(f'{block}/{slot}/{layer}', new)
  }
  _check(model, plain, {path: leaf.shape for path, leaf in shapes.items() if path not in new})

  variables = {path: jnp.asarray(value, shapes[path].dtype) for path, value in plain.items()}
  variables |= _drawn(init, key, {path: shapes[path] for path in new if path not in zeros}) | zeros
  for block, slot in places:
    absorb = _before if slot == 'attention' else _after
    for path in absorb(block, layers, shapes):
      variables[path] = variables[path] / gates[slot].value
  return unflatten_dict(variables, sep='/')


def _drawn(init: Init, key: jax.Array, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Initial values of the arrays of `shapes`, which are those of attention.

  To compile a draw takes longer than all else here, and a network has hundreds of arrays. Those
  that attention has alike in several blocks are drawn by one program, with a key for each block.
  """
  alike: dict[Any, list[str]] = {}
  for path, leaf in shapes.items():
    alike.setdefault((_PLACE.sub('', path), leaf.shape), []).append(path)

  def draw(key: jax.Array) -> list[jax.Array]:
    values = init(key)
    return [values[paths[0]] for paths in alike.values()]

  program = jax.jit(draw, compiler_options=once_options())
  drawn: dict[str, jax.Array] = {}
  for i in range(max(map(len, alike.values()))):
    for paths, value in zip(alike.values(), program(jax.random.fold_in(key, i)), strict=True):
      if i < len(paths):
        drawn[paths[i]] = value
  return drawn


def _before(block: str, layers: Layers, paths: Iterable[str]) -> list[str]:
  """All parameters of the layer before the attention of `block`."""
  pattern = re.compile(rf'params/({block}/{layers.before}\d*)/')
  found = {match[1] for path in paths if (match := pattern.match(path))}
  return _params(max(found, key=lambda layer: (len(layer), layer)), paths)


def _after(stage: str, layers: Layers, paths: Iterable[str]) -> list[str]:
  """The kernels that read the output of `stage`; what they add does not depend on it."""
  following = f'stage{int(stage.removeprefix("stage")) + 1}'
  kernels = [f'params/{following}/{layer}/kernel' for layer in layers.next_stage]
  return kernels if kernels[0] in paths else [f'params/{layers.after_stages}/kernel']


def _params(layer: str, paths: Iterable[str]) -> list[str]:
  return [path for path in paths if path.startswith(f'params/{layer}/')]


def _layers(model: Any) -> Layers:
  found = next((layers for kind, layers in LAYERS.items() if isinstance(model, kind)), None)
  if found is None:
    raise UserError(
      f'graft got {type(model).__name__}; it knows what stands around the attention of '
      f'{", ".join(kind.__name__ for kind in LAYERS)} alone. Give a network of create_model.'
    )
  return found


def _gates(model: Classifier) -> dict[str, Gate]:
  """What each slot of `model` that is taken holds."""
  factories = {'attention': model.attention, 'stage_attention': model.stage_attention}
  modules = {slot: make(name=slot) for slot, make in factories.items() if make is not None}
  if not modules:
    raise UserError(
      f'this {type(model).__name__} has no attention to put in; make it with one, as in '
      "create_model('resnet50', attention='cbam'), and give it the plain network's variables."
    )
  for module in modules.values():
    if type(module) not in GATES:
      raise UserError(
        f'the attention is {type(module).__name__}; graft knows how to open the gates of '
        f'{", ".join(kind.__name__ for kind in GATES)} alone. Take the variables of model.init '
        "and put the plain network's values into them."
      )
  return {slot: GATES[type(module)](module) for slot, module in modules.items()}


def _flat(variables: Any) -> dict[str, Any]:
  if not isinstance(variables, Mapping):
    raise UserError(
      f'the plain variables are of type {type(variables).__name__}; give '
      "{'params': ..., 'batch_stats': ...}, as init, from_torch or a training step returns it."
    )
  return {'/'.join(map(str, path)): leaf for path, leaf in flatten_dict(dict(variables)).items()}


def _input_channels(kernel: Any) -> int:
  """How many channels the first layer reads; 3 if it is missing, which will be an error."""
  shape = () if kernel is None else jnp.shape(kernel)
  return shape[-2] if len(shape) == 4 else 3


def _check(
  model: Classifier, given: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises `UserError` unless `given` has arrays of just the shapes `wanted`, naming all others."""
  check_problems(
    f'the plain variables are not those of this {type(model).__name__} without attention',
    {
      'missing': [path for path in wanted if path not in given],
      'left over': [path for path in given if path not in wanted],
      'of the wrong shape': [
        f'{path} {jnp.shape(given[path])} instead of {shape}'
        for path, shape in wanted.items()
        if path in given and jnp.shape(given[path]) != shape
      ],
    },
    "Give those of the same network with attention='none': its name, stem, num_classes and width; "
    'a PyTorch state dict goes through from_torch first.',
  )
