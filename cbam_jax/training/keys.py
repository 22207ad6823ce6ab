"""What each key of a configuration takes, and how the command line's text becomes its value."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from cbam_jax.data.transforms import AUGMENTATIONS, RESAMPLINGS
from cbam_jax.errors import UserError, check_choice
from cbam_jax.models.base import STEMS
from cbam_jax.models.registry import ATTENTIONS, MODELS
from cbam_jax.training.mixing import MIXINGS
from cbam_jax.training.optimizer import DECAYS, SCHEDULES

DTYPES = ('float32', 'bfloat16')

# More of anything is a mistake, and overflows somewhere.
MOST = 2**31 - 1
MOST_EPOCHS = 1e6

KINDS: dict[type, str] = {
  bool: 'true or false',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
  tuple: 'numbers, one a channel, such as (0.5, 0.5, 0.5)',
  dict: "fields and their values, such as {'width': 0.5}",
}


@dataclasses.dataclass(frozen=True)
class Key:
  """What a key takes.

  Attributes:
    kind: Type of its values, one of `KINDS`.
    allowed: Which values of the type are allowed, in words; empty for all.
    valid: Whether a value of the type is allowed.
    optional: Whether None is allowed as well.
    choices: The names that are allowed, where only some are.
  """

  kind: type
  allowed: str = ''
  valid: Callable[[Any], bool] = lambda value: True
  optional: bool = False
  choices: Iterable[str] = ()

  def __str__(self) -> str:
    words = f'{KINDS[self.kind]}, {self.allowed}' if self.allowed else KINDS[self.kind]
    return f'{words}, or None' if self.optional else words

  def check(self, name: str, value: Any) -> None:
    """Raises `UserError` unless the key called `name` takes `value`."""
    if value is None and self.optional:
      return
    if self.choices:
      check_choice(name, value, self.choices)
    if not (is_a(self.kind, value) and self.valid(value)):
      raise UserError(f'{name} is {shown(value)}; it must be {self}.')

  def read(self, name: str, text: str) -> Any:
    """The value that `text` means for the key called `name`.

    Raises:
      UserError: If it is none of the key's type.
    """
    if self.optional and text.lower() == 'none':
      return None
    if self.kind is str:
      return text
    value = literal(text)
    if self.kind is tuple and is_a(float, value):
      value = (value,)
    if not is_a(self.kind, value):
      raise UserError(f'{name} is {shown(text)}; it must be {self}.')
    return float(value) if self.kind is float else value


def literal(text: str) -> Any:
  """The value that `text` is in Python, 'true' and 'false' in any case; else the text itself."""
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  for parse in (ast.literal_eval, float):
    try:
      return parse(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      continue
  return text


def is_a(kind: type, value: Any) -> bool:
  """Whether `value` is of a kind of `KINDS`; an integer is a number, a truth value is neither."""
  if kind is tuple:
    return isinstance(value, (tuple, list)) and all(is_a(float, number) for number in value)
  if kind is dict:
    return hasattr(value, 'items')  # a ConfigDict too
  if isinstance(value, bool):
    return kind is bool
  if kind is float and isinstance(value, int):
    return abs(value) < 2**1023  # what a float holds
  return isinstance(value, kind)


def shown(value: Any) -> str:
  """`repr(value)`, cut short if it is long."""
  try:
    text = repr(value)
  except ValueError:  # Python prints no integer of more than 4300 digits
    return f'an {type(value).__name__} of thousands of digits'
  return text if len(text) <= 100 else f'{text[:100]}...'


def _from(low: int, high: int = MOST, *, optional: bool = False) -> Key:
  allowed = f'{low} or more' if high == MOST else f'from {low} to {high}'
  return Key(int, allowed, lambda value: low <= value <= high, optional)


def _number(allowed: str, valid: Callable[[float], bool], *, optional: bool = False) -> Key:
  return Key(float, allowed, valid, optional)


def _epochs() -> Key:
  return _number(f'above 0, at most {MOST_EPOCHS:,.0f}', lambda v: 0 < v <= MOST_EPOCHS)


def _one_of(choices: Iterable[str]) -> Key:
  return Key(str, choices=choices)


KEYS: dict[str, Key] = {
  'seed': Key(int, 'from 0 to under 2**32', lambda v: 0 <= v < 2**32),
  'init_from': Key(str, optional=True),
  'epochs': _epochs(),
  'batch_size': _from(1),
  'eval_batch_size': _from(1),
  'eval_every_epochs': _epochs(),
  'log_every_steps': _from(1),
  'dtype': _one_of(DTYPES),
  'accumulate': _from(1),
  'skip_nonfinite': _from(0),
  'model.name': _one_of(MODELS),
  'model.attention': _one_of(ATTENTIONS),
  'model.attention_fields': Key(dict),
  'model.num_classes': _from(1, optional=True),
  'model.stem': _one_of(STEMS),
  'model.group_size': _from(1, optional=True),
  'model.remat': Key(bool),
  'model.fields': Key(dict),
  'data.name': Key(str),
  'data.dir': Key(str, optional=True),
  'data.image_size': _from(1, 2**14),
  'data.resized_side': _from(1, 2**14, optional=True),
  'data.interpolation': _one_of(RESAMPLINGS),
  'data.augmentation': _one_of(AUGMENTATIONS),
  'data.mixing': _one_of(MIXINGS),
  'data.mixing_alpha': _number('finite and above 0', lambda v: 0 < v < math.inf),
  'data.mean': Key(tuple, 'finite', lambda v: all(math.isfinite(x) for x in v)),
  'data.std': Key(
    tuple, 'finite and none of them zero', lambda v: all(x and math.isfinite(x) for x in v)
  ),
  'data.workers': _from(0, 1024),
  'data.bad_share': _number('from 0 to 1', lambda v: 0 <= v <= 1),
  'optimizer.learning_rate': _number('finite and above 0', lambda v: 0 < v < math.inf),
  'optimizer.momentum': _number('from 0 to under 1', lambda v: 0 <= v < 1),
  'optimizer.nesterov': Key(bool),
  'optimizer.weight_decay': _number('finite and 0 or more', lambda v: 0 <= v < math.inf),
  'optimizer.decay': _one_of(DECAYS),
  'optimizer.clip_norm': _number('above 0', lambda v: v > 0, optional=True),
  'optimizer.schedule': _one_of(SCHEDULES),
  'optimizer.step_epochs': _epochs(),
  'optimizer.warmup_epochs': _number(
    f'0 or more, at most {MOST_EPOCHS:,.0f}', lambda v: 0 <= v <= MOST_EPOCHS
  ),
  'average_decay': _number('between 0 and 1', lambda v: 0 < v < 1, optional=True),
  'mesh.fsdp': _from(1),
  'label_smoothing': _number('from 0 to under 1', lambda v: 0 <= v < 1),
  'checkpoints.keep': _from(1),
  'checkpoints.every_minutes': _number('above 0', lambda v: v > 0),
  'checkpoints.every_steps': _from(1, optional=True),
}
