"""Sweeps of which the default run takes a part."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(count: int, values: Iterable[Any]) -> list[Any]:
  """`values` for `pytest.mark.parametrize`, those after the first `count` of them slow."""
  values = list(values)
  return values[:count] + [pytest.param(value, marks=pytest.mark.slow) for value in values[count:]]


def first_rows(count: int, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
  """The same, of several parameters at once."""
  rows = list(rows)
  return rows[:count] + [pytest.param(*row, marks=pytest.mark.slow) for row in rows[count:]]
