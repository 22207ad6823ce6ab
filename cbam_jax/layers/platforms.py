"""One computation written for several platforms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax import lax

_portable = ContextVar('portable', default=False)


def by_platform(
  *inputs: jax.Array,
  default: Callable[..., jax.Array],
  **platforms: Callable[..., jax.Array],
) -> jax.Array:
  """`lax.platform_dependent`, but the default alone if it is so or in `any_platform`."""
  if _portable.get() or not platforms:
    return default(*inputs)
  return lax.platform_dependent(*inputs, default=default, **platforms)


@contextlib.contextmanager
def any_platform() -> Iterator[None]:
  """What is traced within holds no choice of platforms, for those that cannot read one."""
  token = _portable.set(True)
  try:
    yield
  finally:
    _portable.reset(token)
