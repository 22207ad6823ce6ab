"""What differs from platform to platform: how a computation is written, and how compiled."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

_Result = TypeVar('_Result')

_portable = ContextVar('portable', default=False)

_YNNPACK = 'xla_cpu_experimental_ynn_fusion_type'
# All that XLA gives to YNNPACK by itself but convolutions.
_ON_CPU = {_YNNPACK: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE'}


def by_platform(
  *inputs: jax.Array,
  default: Callable[..., _Result],
  **platforms: Callable[..., _Result],
) -> _Result:
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


def on_explicit_mesh(x: jax.Array) -> bool:
  """Whether `x` has the sharding of a mesh with explicit axes, where any axis may be split."""
  return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def compiler_options() -> dict[str, str] | None:
  """How to compile a network: `jax.jit(f, compiler_options=cbam_jax.compiler_options())`.

  On a CPU, recent releases of XLA give convolutions to YNNPACK, which takes longer for nearly all
  of those here than XLA's own do, and for some gradients twice as long.

  JAX takes options at the outermost `jit` alone. To ask for them starts its backend: not before
  `jax.distributed.initialize`.

  Returns:
    Options for JAX's default backend; None where XLA needs none, knows none, or was told by
    XLA_FLAGS what to give to YNNPACK.
  """
  told = _YNNPACK in os.environ.get('XLA_FLAGS', '')
  pays = jax.default_backend() == 'cpu' and not told and _takes_convolutions_back()
  return dict(_ON_CPU) if pays else None


def once_options() -> dict[str, int] | None:
  """How to compile what runs once: on a CPU, optimising it takes far longer than running it."""
  return {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None


@functools.cache
def _takes_convolutions_back() -> bool:
  """Whether XLA gives convolutions to YNNPACK by itself, and knows our options."""
  inputs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 32), (3, 3, 32, 32)))
  layout = 'NHWC', 'HWIO', 'NHWC'

  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)

  lowered = jax.jit(convolve).lower(*inputs)
  try:
    lowered.compile({**_ON_CPU})
  except jax.errors.JaxRuntimeError:
    return False
  return '__ynn_fusion' in (lowered.compile().as_text() or '')
