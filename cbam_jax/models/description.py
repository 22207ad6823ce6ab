"""A network as plain data, from which `create_model` makes it again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from cbam_jax.attention import BAM
from cbam_jax.errors import UserError
from cbam_jax.models.base import Classifier
from cbam_jax.models.registry import ATTENTIONS, MODELS, create_model, named_attention

SLOTS = ('attention', 'stage_attention')

HANDED_DOWN = ('param_dtype', 'group_size')

UNDESCRIBED = ('name', 'parent', *SLOTS)


def describe(model: Classifier) -> dict[str, Any]:
  """What `model` is, as JSON can hold it.

  Returns:
    'model' and 'attention' as `create_model` takes them, and 'attention_fields' and 'fields' with
    whatever differs from the defaults. `from_description` is the inverse.

  Raises:
    UserError: If the network or its attention is none of this package.
  """
  kin = [name for name, make in MODELS.items() if type(make()) is type(model)]
  if not kin:
    raise UserError(
      f'{type(model).__name__} is none of the networks of create_model, which a description tells '
      f'by their names: {", ".join(MODELS)}.'
    )
  # What takes the fewest words: a wide_resnet18_1.5 is that, not a resnet18 of another width.
  fields, name = min(
    ((_differences(model, MODELS[name]()), name) for name in kin), key=lambda entry: len(entry[0])
  )
  attention, attention_fields = _attention(model)
  return {
    'model': name,
    'attention': attention,
    'attention_fields': attention_fields,
    'fields': fields,
  }


def from_description(description: Any) -> Classifier:
  """The network of a description.

  Raises:
    UserError: If it describes none.
  """
  try:
    name, attention = description['model'], description['attention']
    made = named_attention(attention, **_as_tuples(description['attention_fields']))
    model = create_model(name, attention=made or 'none', **_as_tuples(description['fields']))
    for dtype in (model.dtype, model.param_dtype):
      jnp.dtype(dtype)  # a name may be of none
    return model
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(
      f'{description!r} describes no network ({error}); it takes model, attention, '
      'attention_fields and fields, as save_pretrained writes them.'
    ) from error


def _attention(model: Classifier) -> tuple[str, dict[str, Any]]:
  """Name and fields of the attention, whichever slot it is in."""
  slots = [slot for slot in SLOTS if getattr(model, slot) is not None]
  if not slots:
    return 'none', {}
  module = getattr(model, slots[0])(name='attention')
  name = next((name for name, kind in ATTENTIONS.items() if type(module) is kind), None)
  usual = ['stage_attention' if isinstance(module, BAM) else 'attention']
  if name is None or slots != usual:
    raise UserError(
      f'the attention of this network is {type(module).__name__} as {" and ".join(slots)}; a '
      f'description holds one of {", ".join(ATTENTIONS)} alone, where create_model puts it. Save '
      'the variables yourself, and keep the code beside them.'
    )
  # What the network hands down to its attention is the network's to describe.
  return name, {
    field: value
    for field, value in _differences(module, type(module)()).items()
    if field not in HANDED_DOWN or getattr(module, field) != getattr(model, field)
  }


def _differences(module: Any, plain: Any) -> dict[str, Any]:
  """The fields in which two modules of one type differ, as JSON can hold them."""
  return {
    field.name: _as_json(getattr(module, field.name))
    for field in dataclasses.fields(module)
    if field.name not in UNDESCRIBED
    and _as_json(getattr(module, field.name)) != _as_json(getattr(plain, field.name))
  }


def _as_tuples(fields: dict[str, Any]) -> dict[str, Any]:
  return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def _as_json(value: Any) -> Any:
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (tuple, list)):
    return [_as_json(item) for item in value]
  return jnp.dtype(value).name
