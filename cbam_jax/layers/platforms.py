"""What differs from platform to platform: how a computation is written, and how compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax import lax

_portable = ContextVar('portable', default=False)

# What XLA gives to YNNPACK by itself, without convolutions.
_ON_CPU = {
  'xla_cpu_experimental_ynn_fusion_type': (
    'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'
  )
}


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


def compiler_options() -> dict[str, str] | None:
  """How to compile a network: `jax.jit(f, compiler_options=cbam_jax.compiler_options())`.

  On a CPU, XLA gives convolutions to YNNPACK, which takes longer for nearly all of those here than
  XLA's own do, and for some gradients twice as long.

  Returns:
    Options for JAX's default backend; None if there are none for it, or if this release of XLA does
    not know them.
  """
  return dict(_ON_CPU) if jax.default_backend() == 'cpu' and _known(*_ON_CPU.items()) else None


@functools.cache
def _known(*options: tuple[str, str]) -> bool:
  try:
    jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
