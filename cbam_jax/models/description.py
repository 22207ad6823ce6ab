"""A network as plain data, from which `create_model` makes it again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from cbam_jax.attention import BAM
from cbam_jax.errors import UserError, check_choice, first_line, near
from cbam_jax.models.base import Classifier
from cbam_jax.models.registry import ATTENTIONS, MODELS, create_model, named_attention

SLOTS = ('attention', 'stage_attention')

HANDED_DOWN = ('param_dtype', 'group_size')

UNDESCRIBED = ('name', 'parent', *SLOTS)

DTYPES = ('bfloat16', 'float16', 'float32', 'float64')


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _are_counts(value: Any) -> bool:
  return isinstance(value, tuple) and all(map(_is_count, value))


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
  'bool': (lambda value: isinstance(value, bool), 'true or false'),
  'int': (_is_count, 'an integer of at least 1'),
  'float': (_is_number, 'a finite number'),
  'str': (lambda value: isinstance(value, str), 'a text'),
  'Dtype': (lambda value: value in DTYPES, f'one of {", ".join(DTYPES)}'),
  'Sequence[int]': (_are_counts, 'a list of integers of at least 1'),
  'tuple[int, ...]': (_are_counts, 'a list of integers of at least 1'),
  'Sequence[str]': (
    lambda value: isinstance(value, tuple) and all(isinstance(text, str) for text in value),
    'a list of texts',
  ),
}
"""By a field's annotation without ' | None': whether a value is of it, and which are, in words."""


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
    attention_fields = dict(description['attention_fields'])
    fields = dict(description['fields'])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{description!r} describes no network ({error}); it takes model, attention, '
      'attention_fields and fields, as save_pretrained writes them.'
    ) from error
  return from_names(name, attention, attention_fields, fields)


def from_names(
  name: Any, attention: Any, attention_fields: Mapping[str, Any], fields: Mapping[str, Any]
) -> Classifier:
  """The network of a name with the attention of another, whose fields anyone may have written.

  Args:
    name: As `create_model` takes it.
    attention: Likewise.
    attention_fields: Fields of the attention, as JSON can hold them.
    fields: Fields of the network, likewise.

  Raises:
    UserError: On an unknown name or field, or a value that is none of its field's.
  """
  check_choice('the model', name, MODELS)
  check_choice('the attention', attention, ATTENTIONS)
  attention_fields, fields = _as_tuples(attention_fields), _as_tuples(fields)
  _check_fields(f'the attention {attention!r}', ATTENTIONS[attention], attention_fields)
  _check_fields(f'the network {name!r}', MODELS[name], fields)
  made = named_attention(attention, **attention_fields)
  return create_model(name, attention=made or 'none', **fields)


@contextlib.contextmanager
def blaming_fields(model: Classifier) -> Iterator[None]:
  """Turns what JAX raises while `model` is initialised into a `UserError` with its fields."""
  try:
    yield
  except UserError:
    raise
  except (ArithmeticError, TypeError, ValueError) as error:
    told = describe(model)
    raise UserError(
      f'{told["model"]} with the fields {told["fields"]} and the attention {told["attention"]} '
      f'with {told["attention_fields"]} cannot be made ({type(error).__name__}: '
      f'{first_line(error)}); change the field that does not fit, or leave it out.'
    ) from error


def _check_fields(what: str, factory: Any, fields: Mapping[str, Any]) -> None:
  """Refuses fields that a module does not have, that are code, or that have another type."""
  while isinstance(factory, functools.partial):
    factory = factory.func
  declared = {
    field.name: field
    for field in (dataclasses.fields(factory) if factory else ())
    if field.name not in UNDESCRIBED
  }
  for name, value in fields.items():
    if name not in declared:
      raise UserError(
        f'{what} has no field {name!r} to be told; it takes '
        f'{", ".join(sorted(declared)) or "none"}.{near(name, declared)}'
      )
    kind, _, optional = str(declared[name].type).partition(' | ')
    valid, words = KINDS[kind]
    if not (valid(value) or (optional and value is None)):
      raise UserError(
        f'{what} cannot be made: its field {name} is {value!r}; give {words}'
        f'{", or None" if optional else ""}, or leave it out.'
      )


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


def _as_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def _as_json(value: Any) -> Any:
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (tuple, list)):
    return [_as_json(item) for item in value]
  return jnp.dtype(value).name
