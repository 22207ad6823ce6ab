"""The one error this package raises for input it cannot use, and the checks that raise it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Names that an error shows of one kind; a wrong network has hundreds.
SHOWN = 20


class UserError(ValueError):
  """Input that cannot be used: the message names the value, what is allowed and what to do."""


class ChannelsError(UserError):
  """Features of other channels than a layer was made for."""


class RunError(RuntimeError):
  """A run that cannot go on: the message says what happened, what is safe and what to do."""


class MissingExtraError(UserError, ImportError):
  """A package of one of this project's extras is not installed."""


def near(value: object, allowed: Iterable[str]) -> str:
  """The sentence that offers the names of `allowed` that look like `value`; empty if none does."""
  folded: dict[str, list[str]] = {}
  for name in allowed:  # some may differ in case alone
    folded.setdefault(name.lower(), []).append(name)
  matches = difflib.get_close_matches(str(value).lower(), folded, n=3)
  names = [name for match in matches for name in folded[match]]
  return f' Did you mean {" or ".join(repr(name) for name in names)}?' if names else ''


def check_choice(what: str, value: object, allowed: Iterable[str]) -> None:
  """Raises `UserError` unless `value` is one of `allowed`."""
  allowed = list(allowed)
  if value not in allowed:
    raise UserError(f'{what} is {value!r}; allowed: {", ".join(allowed)}.{near(value, allowed)}')


def plain(value: Any) -> Any:
  """`value`, a number of Python's if it is one of NumPy's."""
  return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any) -> bool:
  """Whether `value` is a real number, NumPy's too."""
  return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
  """Whether `value` is an integer of at least 1, NumPy's too."""
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def whole(what: str, value: Any) -> int:
  """`value` as an int, or `UserError` unless it `is_whole`."""
  if not is_whole(value):
    raise UserError(f'{what} is {value!r}; it must be an integer of at least 1.')
  return int(value)


def checked_group_size(size: Any) -> int | None:
  """How many examples share a batch norm's statistics, or `UserError`; None for all of them."""
  return None if size is None else whole('group_size', size)


def check_dtypes(what: str, *dtypes: Any) -> None:
  """Raises `UserError` unless each of `dtypes` is None or a floating type."""
  for dtype in dtypes:
    try:
      floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
      floating = False
    if not floating:
      raise UserError(
        f'{what} has dtype {getattr(dtype, "__name__", dtype)!r}; it must be floating point: '
        'float32, bfloat16, float16 or float64.'
      )


def check_problems(what: str, problems: Mapping[str, Sequence[str]], remedy: str) -> None:
  """Raises `UserError` with all `problems`, names by kind, if there are any.

  Args:
    what: What is wrong, the first line.
    problems: Names of what has each kind of problem; empty where nothing has.
    remedy: What to do, the last line.
  """
  lines = [
    f'  {kind} ({len(names)}): {", ".join(names[:SHOWN])}{", ..." if len(names) > SHOWN else ""}'
    for kind, names in problems.items()
    if names
  ]
  if lines:
    raise UserError('\n'.join([f'{what}:', *lines, remedy]))


def check_feature_map(what: str, x: Any, *, spatial_axes: tuple[int, ...] = (1, 2, 3)) -> None:
  """Raises `UserError` unless `x` is a floating array (N, *spatial, C) with something in it.

  Args:
    what: Who asks, for the message.
    x: The array to check.
    spatial_axes: The numbers of spatial axes that are allowed.
  """
  shape = jnp.shape(x)
  if len(shape) - 2 not in spatial_axes:
    wanted = ' or '.join(str(n + 2) for n in spatial_axes)
    raise UserError(
      f'{what} got an input of rank {len(shape)}, shape {shape}; it takes (N, *spatial, C) of '
      f'rank {wanted}. Add the missing axes (x[None] for a single example), channels last.'
    )
  if 0 in shape[1:]:
    raise UserError(
      f'{what} got an input of shape {shape} with no extent on an axis; every spatial axis and '
      'the channels must be at least 1. Feed larger inputs or downsample less.'
    )
  dtype = jax.dtypes.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(
      f'{what} got an input of {dtype}; it takes floating point. Scale and convert it first, '
      'for example x.astype(jnp.float32) / 255.'
    )


def require(module: str, extra: str) -> ModuleType:
  """Imports `module`, or raises `MissingExtraError` naming the extra that installs it."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise MissingExtraError(
      f'{module.split(".")[0]} cannot be imported ({error}); it comes with an extra: '
      f"pip install 'cbam-jax[{extra}]'."
    ) from error


def first_line(error: BaseException) -> str:
  """The first line of what `error` says, or its type if it says nothing."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
