"""Convolutions and products on a CPU by oneDNN, which XLA holds and by itself does not call.

A network's forward pass takes 0.85 to 0.94 of its time that way, and the gradients by 1x1 kernels
four fifths. XLA is asked for it by custom calls of its own, whose form it does not promise to
keep, so this is careful: with a release that they were not tried with, on a processor for which XLA
holds no oneDNN, on several devices or a mesh that is not automatic, and for an export, XLA computes
it in another form.

So it does with a compilation cache, if that was set before the program was first traced: XLA cannot
store what calls oneDNN, and `jax.experimental.serialize_executable` raises a MemoryError over it.
Nor does XLA's cost analysis count what is called.
"""

from __future__ import annotations

import functools
import math
import platform
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from cbam_jax.layers.gradients import Convolve, Forms
from cbam_jax.layers.onednn_calls import Convolution, Product

# From the first to below the last. A call that XLA reads otherwise ends the process.
TRIED = (0, 9), (0, 11)
# To so few places, a call takes longer than XLA's own form.
FEWEST_PLACES = 256

Call: TypeAlias = Convolution | Product


def preferred(forms: Forms, strides: int, dilation: int, groups: int) -> Forms:
  """A convolution by oneDNN where XLA can call it, in `forms` elsewhere.

  oneDNN gives the convolution and, at stride 1, its gradient by the features. XLA has no call for
  that by the kernel.

  Args:
    forms: The convolution of (N, H, W, C) and (K, L, C / groups, F), odd sides, each side padded by
      half of them times the dilation; of any N.
    strides: Step on both spatial axes.
    dilation: Distance between the taps of the kernel.
    groups: Groups of channels convolved apart.
  """
  if not _was_tried():
    return forms
  call = Convolution(strides, dilation, groups)
  forward, by_features = (
    functools.partial(_bound, call=call, otherwise=form)
    for form in (forms.forward, forms.by_features)
  )
  return Forms(forward, by_features if strides == 1 else forms.by_features, forms.by_kernel)


def preferred_product(forms: Forms) -> Forms:
  """A product of matrices by oneDNN, with both gradients, where XLA can call it; else in `forms`.

  Args:
    forms: The product of (P, C) and (C, F), of any P.
  """
  if not _was_tried():
    return forms
  bound = (
    functools.partial(_bound, call=Product(), otherwise=form)
    for form in (forms.forward, forms.by_features, forms.by_kernel)
  )
  return Forms(*bound)


def is_called() -> bool:
  """Whether float32 networks on JAX's default backend call oneDNN, as long as no cache is set."""
  return jax.default_backend() == 'cpu' and jax.device_count() == 1 and is_found()


@functools.cache
def is_found() -> bool:
  """Whether this XLA calls oneDNN as it is asked to here."""
  if not _was_tried():
    return False
  # All that the calls tell: a step, a dilation, groups, sides that differ; which is transposed.
  rng = np.random.default_rng(0)
  x, kernel, a, b = (
    rng.integers(-4, 5, shape).astype(np.float32)
    for shape in ((2, 9, 7, 4), (3, 5, 2, 6), (5, 7), (7, 3))
  )
  calls: tuple[Call, ...] = (
    Convolution(strides=2, dilation=2, groups=2),
    Product(),
    Product(transpose_first=True),
    Product(transpose_second=True),
  )
  operands = (x, kernel), (a, b), (a.T, b), (a, b.T)

  def ask(operands: Any) -> list[jax.Array]:
    return [call(*pair) for call, pair in zip(calls, operands, strict=True)]

  try:
    device = jax.local_devices(backend='cpu')[0]
    with jax.ensure_compile_time_eval(), jax.default_device(device), jax.transfer_guard('allow'):
      y, *products = map(np.asarray, jax.jit(ask).lower(operands).compile()(operands))
  except RuntimeError:  # no such device, or no such call
    return False
  convolved = _by_hand(x, kernel, strides=2, dilation=2, groups=2)
  return np.array_equal(y, convolved) and all(np.array_equal(v, a @ b) for v in products)


def _was_tried() -> bool:
  version = tuple(int(part) for part in jaxlib.__version__.split('.')[:3] if part.isdecimal())
  return TRIED[0] <= version < TRIED[1] and platform.machine().lower() in ('x86_64', 'amd64')


def _by_hand(
  x: np.ndarray, kernel: np.ndarray, strides: int, dilation: int, groups: int
) -> np.ndarray:
  """The convolution by its definition."""
  *sides, c, features = kernel.shape
  edges = [(dilation * (side // 2),) * 2 for side in sides]
  padded = np.pad(x, [(0, 0), *edges, (0, 0)])
  y = np.zeros(Convolution(strides, dilation, groups).shape(x.shape, kernel.shape), x.dtype)
  for i, j, k in np.ndindex(*sides, groups):
    read = padded[:, dilation * i :: strides, dilation * j :: strides, k * c : (k + 1) * c]
    own = slice(k * features // groups, (k + 1) * features // groups)
    y[..., own] += read[:, : y.shape[1], : y.shape[2]] @ kernel[i, j, :, own]
  return y


def _bound(x: jax.Array, kernel: jax.Array, call: Call, otherwise: Convolve) -> jax.Array:
  """`otherwise(x, kernel)`, or the call if it can be made."""
  fits = x.dtype == kernel.dtype == jnp.float32 and x.ndim == kernel.ndim == call.rank
  fits = fits and all(isinstance(size, int) and size > 0 for size in x.shape)
  fits = fits and math.prod(call.shape(x.shape, kernel.shape)[:-1]) >= FEWEST_PLACES
  kinds = jax.typeof(x).sharding.mesh.axis_types
  if not fits or any(kind != AxisType.Auto for kind in kinds):
    return otherwise(x, kernel)
  return _either().bind(x, kernel, call=call, otherwise=otherwise)


@functools.cache
def _either() -> Primitive:
  """The call, or `otherwise`: at lowering it is known for how many devices, and what for."""
  primitive = Primitive('by_onednn_or_otherwise')
  primitive.def_impl(_uncompiled)
  primitive.def_abstract_eval(_result)
  mlir.register_lowering(primitive, _lowered)
  mlir.register_lowering(primitive, _lowered_on_cpu, platform='cpu')
  ad.defbilinear(primitive, _back_to_first, _back_to_second)
  batching.primitive_batchers[primitive] = _batched
  return primitive


def _uncompiled(x: jax.Array, y: jax.Array, *, call: Call, otherwise: Convolve) -> jax.Array:
  return otherwise(x, y)


def _result(
  x: jax.core.ShapedArray, y: jax.core.ShapedArray, *, call: Call, otherwise: Convolve
) -> jax.core.ShapedArray:
  return x.update(shape=call.shape(x.shape, y.shape), weak_type=False)


def _lowered(
  context: mlir.LoweringRuleContext, x: Any, y: Any, *, call: Call, otherwise: Convolve
) -> Any:
  return mlir.lower_fun(otherwise, multiple_results=False)(context, x, y)


def _lowered_on_cpu(
  context: mlir.LoweringRuleContext, x: Any, y: Any, *, call: Call, otherwise: Convolve
) -> Any:
  module, settings = context.module_context, jax.config.values
  here = tuple(module.platforms) == ('cpu',) and not module.lowering_parameters.for_export
  alone = getattr(module.axis_context, 'num_devices', None) == 1
  stored = settings['jax_enable_compilation_cache'] and settings['jax_compilation_cache_dir']
  called = here and alone and not stored and is_found()
  function = call if called else otherwise
  return mlir.lower_fun(function, multiple_results=False)(context, x, y)


def _back_to_first(
  dz: jax.Array, x: ad.UndefinedPrimal, y: jax.Array, *, call: Call, otherwise: Convolve
) -> jax.Array:
  shape = x.aval.shape

  def back(dz: jax.Array, y: jax.Array) -> jax.Array:
    # Under vmap there may be more examples.
    count = dz.shape[:1] if call.keeps_rows else shape[:1]
    like = jax.ShapeDtypeStruct((*count, *shape[1:]), dz.dtype)
    (dx,) = jax.linear_transpose(lambda x: otherwise(x, y), like)(dz)
    return dx

  return _called(call.back_to_first(), dz, y, back)


def _back_to_second(
  dz: jax.Array, x: jax.Array, y: ad.UndefinedPrimal, *, call: Call, otherwise: Convolve
) -> jax.Array:
  shape = y.aval.shape

  def back(x: jax.Array, dz: jax.Array) -> jax.Array:
    # Where rows are summed over, under vmap there may be more of them in both operands.
    count = shape[:1] if call.keeps_rows else x.shape[:1]
    like = jax.ShapeDtypeStruct((*count, *shape[1:]), dz.dtype)
    (dy,) = jax.linear_transpose(lambda y: otherwise(x, y), like)(dz)
    return dy

  return _called(call.back_to_second(), x, dz, back)


def _called(call: Call | None, first: jax.Array, second: jax.Array, back: Convolve) -> jax.Array:
  """`back(first, second)`, by the call if there is one for it."""
  if call is None:
    return back(first, second)
  return _either().bind(first, second, call=call, otherwise=back)


def _batched(
  operands: tuple[jax.Array, jax.Array],
  axes: tuple[int | None, int | None],
  *,
  call: Call,
  otherwise: Convolve,
) -> tuple[jax.Array, int]:
  x, y = operands
  axis, of_second = axes
  if axis is None or of_second is not None or not call.keeps_rows:
    return jax.vmap(otherwise, axes)(x, y), 0
  x = jnp.moveaxis(x, axis, 0)
  z = _either().bind(x.reshape(-1, *x.shape[2:]), y, call=call, otherwise=otherwise)
  return z.reshape(*x.shape[:2], *z.shape[1:]), 0
