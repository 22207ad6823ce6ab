"""The networks by name, and the attention that goes into them by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from cbam_jax.attention import BAM, CBAM, SqueezeExcitation
from cbam_jax.errors import UserError, check_choice, near
from cbam_jax.models.base import Classifier, LayerFactory
from cbam_jax.models.mobilenet import MobileNetV1
from cbam_jax.models.resnet import ResNet
from cbam_jax.models.vgg import VGG

_resnet = functools.partial(ResNet, bottleneck=False)
_bottleneck_resnet = functools.partial(ResNet, bottleneck=True)

MODELS: dict[str, Callable[..., Classifier]] = {
  'resnet18': functools.partial(_resnet, stage_sizes=(2, 2, 2, 2)),
  'resnet34': functools.partial(_resnet, stage_sizes=(3, 4, 6, 3)),
  'resnet50': functools.partial(_bottleneck_resnet, stage_sizes=(3, 4, 6, 3)),
  'resnet101': functools.partial(_bottleneck_resnet, stage_sizes=(3, 4, 23, 3)),
  'resnet152': functools.partial(_bottleneck_resnet, stage_sizes=(3, 8, 36, 3)),
  'wide_resnet18_1.5': functools.partial(_resnet, stage_sizes=(2, 2, 2, 2), width=1.5),
  'wide_resnet18_2.0': functools.partial(_resnet, stage_sizes=(2, 2, 2, 2), width=2.0),
  'wide_resnet50_2': functools.partial(
    _bottleneck_resnet, stage_sizes=(3, 4, 6, 3), group_width=128
  ),
  'resnext50_32x4d': functools.partial(
    _bottleneck_resnet, stage_sizes=(3, 4, 6, 3), groups=32, group_width=4
  ),
  'resnext101_32x4d': functools.partial(
    _bottleneck_resnet, stage_sizes=(3, 4, 23, 3), groups=32, group_width=4
  ),
  'mobilenet_v1': MobileNetV1,
  'vgg16': VGG,
}

ATTENTIONS: dict[str, LayerFactory | None] = {
  'none': None,
  'se': SqueezeExcitation,
  'bam': BAM,
  'cbam': CBAM,
}


def list_models() -> list[str]:
  """The names that `create_model` takes."""
  return list(MODELS)


def create_model(name: str, *, attention: str | LayerFactory = 'none', **fields: Any) -> Classifier:
  """Makes a network by name.

  Args:
    name: One of `list_models()`.
    attention: 'none', 'se', 'cbam' (in every block), 'bam' (between stages), or a callable that
      makes a linen module whose `__call__` takes `(x, *, train)`: a module class or a
      `functools.partial` of one. It is called as `attention(name='attention')`, or with nothing
      where it takes no name. A partial of `BAM` stands between stages as well. Where a class or
      partial has fields `param_dtype` and `group_size` and leaves them alone, they are the
      network's; a function, which writes the call itself, chooses them.
    **fields: Fields of the network: `num_classes=1000`, `stem='imagenet' | 'cifar'`,
      `dtype`, `param_dtype`, `group_size`; `width`; for ResNets `stride_in_1x1`; and the others
      of `ResNet`, `MobileNetV1` and `VGG`.

  Returns:
    A linen module; its variables come from `model.init(key, images, train=False)`.

  Raises:
    UserError: On an unknown name, attention or field, offering the near ones.
  """
  check_choice('the model', name, MODELS)
  make = MODELS[name]
  allowed = _field_names(make)
  for field in fields:
    if field not in allowed:
      raise UserError(
        f'{name} has no option {field!r}; it takes {", ".join(sorted(allowed))}.'
        f'{near(field, allowed)}'
      )
  factory = named_attention(attention) if isinstance(attention, str) else attention
  if attention == 'none':
    return make(**fields)
  factory = _complete(factory, fields)
  slot = 'stage_attention' if isinstance(factory(name='attention'), BAM) else 'attention'
  if slot in fields:
    raise UserError(f'both attention={attention!r} and {slot}=... were given; give one of them.')
  return make(**fields, **{slot: factory})


def named_attention(name: str, **fields: Any) -> LayerFactory | None:
  """What makes the attention of a name: None for 'none'.

  Args:
    name: 'none', 'se', 'bam' or 'cbam'.
    **fields: Fields of the attention that differ from its defaults, such as `order='parallel'`.

  Raises:
    UserError: On an unknown name or field, offering the near ones.
  """
  check_choice('the attention', name, ATTENTIONS)
  factory = ATTENTIONS[name]
  allowed = _field_names(factory)
  for field in fields:
    if field not in allowed:
      raise UserError(
        f'the attention {name!r} has no field {field!r}; it takes '
        f'{", ".join(sorted(allowed)) or "none"}.{near(field, allowed)}'
      )
  return functools.partial(factory, **fields) if factory and fields else factory


def _complete(attention: Any, fields: dict[str, Any]) -> LayerFactory:
  """`attention` with the network's types and groups, checked to make what a block can call."""
  if not callable(attention) or isinstance(attention, nn.Module):
    raise UserError(
      f'the attention is {attention!r}; give one of {", ".join(ATTENTIONS)}, or a callable that '
      'makes a linen module, such as functools.partial(CBAM, reduction=8).'
    )
  if not _takes(attention, 'name'):
    attention = _nameable(attention)
  own = getattr(attention, 'keywords', {})
  shared = {
    field: fields[field]
    for field in ('param_dtype', 'group_size')
    if field in fields and field in _field_names(attention) and field not in own
  }
  if shared:
    attention = functools.partial(attention, **shared)
  try:
    module = attention(name='attention')
  except UserError:
    raise
  except (TypeError, ValueError) as error:
    raise UserError(
      f'the attention {attention!r} cannot be made ({error}); give the class of a linen module '
      'called with (x, *, train), a partial of one that sets all the fields it needs, or a '
      'callable without arguments.'
    ) from error
  _check_module(module)
  return attention


def _nameable(attention: Callable[[], Any]) -> LayerFactory:
  """What makes modules like those of `attention`, under the name that a block gives them."""
  try:
    module = attention()
  except TypeError as error:
    raise UserError(
      f'the attention {attention!r} can be called neither with name=... nor with nothing '
      f'({error}); give a module class, a partial of one, or a callable without arguments.'
    ) from error
  _check_module(module)
  fields = {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.init and field.name not in ('name', 'parent')
  }
  make: Any = type(module)
  return functools.partial(make, **fields)


def _check_module(module: Any) -> None:
  if not isinstance(module, nn.Module) or not _takes(module, 'train'):
    raise UserError(
      f'the attention made {type(module).__name__}; it must make a linen module whose __call__ '
      'takes (x, *, train).'
    )


def _unwrapped(factory: Any) -> Any:
  while isinstance(factory, functools.partial):
    factory = factory.func
  return factory


def _field_names(factory: Any) -> set[str]:
  module = _unwrapped(factory)
  if not (inspect.isclass(module) and dataclasses.is_dataclass(module)):
    return set()
  return {field.name for field in dataclasses.fields(module)} - {'name', 'parent', 'attention'}


def _takes(function: Callable[..., Any], argument: str) -> bool:
  try:
    parameters = inspect.signature(function).parameters.values()
  except ValueError:  # a partial with arguments that its function does not take: calling it tells
    return True
  return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)
