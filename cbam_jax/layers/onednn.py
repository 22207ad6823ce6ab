"""Convolutions on a CPU by oneDNN, which XLA holds and by itself calls for matrix products alone.

A network's forward pass takes 0.85 to 0.94 of its time that way. XLA is asked for it by a custom
call of its own, whose form it does not promise to keep, so this is careful: with a release that it
was not tried with, on a processor for which XLA holds no oneDNN, on several devices or a mesh that
is not automatic, and for an export, the convolution has its other form.

So it has with a compilation cache, if that was set before the program was first traced: XLA cannot
store what calls oneDNN, and `jax.experimental.serialize_executable` raises a MemoryError over it.
Nor does XLA's cost analysis count what is called.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from cbam_jax.layers.gradients import Convolve, Forms

# From the first to below the last. A call that XLA reads otherwise ends the process.
TRIED = (0, 9), (0, 11)
# To so few places, a call takes longer than the convolution.
FEWEST_PLACES = 256
_TARGET = '__onednn$convolution'


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
  either = functools.partial(_bound, strides=strides, dilation=dilation, groups=groups)
  by_features = forms.by_features
  if strides == 1:
    by_features = functools.partial(either, otherwise=by_features)
  return Forms(functools.partial(either, otherwise=forms.forward), by_features, forms.by_kernel)


def is_called() -> bool:
  """Whether float32 networks on JAX's default backend call oneDNN, as long as no cache is set."""
  return jax.default_backend() == 'cpu' and jax.device_count() == 1 and is_found()


@functools.cache
def is_found() -> bool:
  """Whether this XLA calls oneDNN as it is asked to here."""
  if not _was_tried():
    return False
  # All that the call tells: a step, a dilation, groups, sides that differ.
  rng = np.random.default_rng(0)
  x = rng.integers(-4, 5, (2, 9, 7, 4)).astype(np.float32)
  kernel = rng.integers(-4, 5, (3, 5, 2, 6)).astype(np.float32)
  call = functools.partial(_call, strides=2, dilation=2, groups=2, flipped=False)
  try:
    device = jax.local_devices(backend='cpu')[0]
    with jax.ensure_compile_time_eval(), jax.default_device(device), jax.transfer_guard('allow'):
      y = np.asarray(jax.jit(call).lower(x, kernel).compile()(x, kernel))
  except RuntimeError:  # no such device, or no such call
    return False
  return np.array_equal(y, _by_hand(x, kernel, strides=2, dilation=2, groups=2))


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
  y = np.zeros(_shape(x.shape, features, strides), x.dtype)
  for i, j, k in np.ndindex(*sides, groups):
    read = padded[:, dilation * i :: strides, dilation * j :: strides, k * c : (k + 1) * c]
    own = slice(k * features // groups, (k + 1) * features // groups)
    y[..., own] += read[:, : y.shape[1], : y.shape[2]] @ kernel[i, j, :, own]
  return y


def _shape(x: tuple[int, ...], features: int, strides: int) -> tuple[int, ...]:
  return x[0], *(math.ceil(size / strides) for size in x[1:3]), features


def _bound(
  x: jax.Array, kernel: jax.Array, otherwise: Convolve, strides: int, dilation: int, groups: int
) -> jax.Array:
  fits = x.ndim == kernel.ndim == 4 and x.dtype == kernel.dtype == jnp.float32
  fits = fits and all(isinstance(size, int) and size > 0 for size in x.shape)
  fits = fits and math.prod(_shape(x.shape, 1, strides)) >= FEWEST_PLACES
  kinds = jax.typeof(x).sharding.mesh.axis_types
  if not fits or any(kind != AxisType.Auto for kind in kinds):
    return otherwise(x, kernel)
  told = {'strides': strides, 'dilation': dilation, 'groups': groups, 'flipped': False}
  return _either().bind(x, kernel, otherwise=otherwise, **told)


def _call(
  x: jax.Array, kernel: jax.Array, strides: int, dilation: int, groups: int, flipped: bool
) -> jax.Array:
  """XLA's call of oneDNN; `flipped`, what goes back through the convolution at stride 1."""
  if flipped:
    # In each group, the channels that come in and the features change places.
    *sides, c, features = kernel.shape
    kernel = lax.rev(kernel, (0, 1)).reshape(*sides, c, groups, features // groups)
    kernel = kernel.swapaxes(2, 4).reshape(*sides, features // groups, groups * c)
  *sides, _, features = kernel.shape
  padding = [dilation * (side // 2) for side in sides]
  data = {'batch_dim': 0, 'spatial_dims': [1, 2], 'feature_dim': 3}
  filters = {'spatial_dims': [0, 1], 'input_feature_dim': 2, 'output_feature_dim': 3}
  told = {
    'dims': 4,
    'feature_groups': groups,
    'input': {'dims': 4, 'data': data},
    'kernel': {'dims': 4, 'filter': filters},
    'output': {'dims': 4, 'data': data},
    'window': {
      'strides': [strides] * 2,
      'pad_left': padding,
      'pad_right': padding,
      'window_dilations': [dilation] * 2,
    },
  }
  called = jax.ffi.ffi_call(
    _TARGET,
    jax.ShapeDtypeStruct(_shape(x.shape, features, strides), x.dtype),
    custom_call_api_version=2,
    legacy_backend_config=json.dumps({'onednn_conv_config': told}),
  )
  return called(x, kernel)


@functools.cache
def _either() -> Primitive:
  """The call, or `otherwise`: at lowering it is known for how many devices, and what for."""
  primitive = Primitive('convolution_by_onednn_or_otherwise')
  primitive.def_impl(_uncompiled)
  primitive.def_abstract_eval(_result)
  mlir.register_lowering(primitive, _lowered)
  mlir.register_lowering(primitive, _lowered_on_cpu, platform='cpu')
  ad.defbilinear(primitive, _back_to_features, _back_to_kernel)
  batching.primitive_batchers[primitive] = _batched
  return primitive


def _uncompiled(x: jax.Array, kernel: jax.Array, *, otherwise: Convolve, **told: Any) -> jax.Array:
  return otherwise(x, kernel)


def _result(
  x: jax.core.ShapedArray, kernel: jax.core.ShapedArray, *, otherwise: Convolve, **told: Any
) -> jax.core.ShapedArray:
  features = told['groups'] * kernel.shape[2] if told['flipped'] else kernel.shape[3]
  return x.update(shape=_shape(x.shape, features, told['strides']), weak_type=False)


def _lowered(
  context: mlir.LoweringRuleContext, x: Any, kernel: Any, *, otherwise: Convolve, **told: Any
) -> Any:
  return mlir.lower_fun(otherwise, multiple_results=False)(context, x, kernel)


def _lowered_on_cpu(
  context: mlir.LoweringRuleContext, x: Any, kernel: Any, *, otherwise: Convolve, **told: Any
) -> Any:
  module, settings = context.module_context, jax.config.values
  here = tuple(module.platforms) == ('cpu',) and not module.lowering_parameters.for_export
  alone = getattr(module.axis_context, 'num_devices', None) == 1
  stored = settings['jax_enable_compilation_cache'] and settings['jax_compilation_cache_dir']
  called = here and alone and not stored and is_found()
  function = functools.partial(_call, **told) if called else otherwise
  return mlir.lower_fun(function, multiple_results=False)(context, x, kernel)


def _back_to_features(
  dy: jax.Array, x: ad.UndefinedPrimal, kernel: jax.Array, *, otherwise: Convolve, **told: Any
) -> jax.Array:
  *places, channels = x.aval.shape[1:]

  def back(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct((dy.shape[0], *places, channels), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: otherwise(x, kernel), like)(dy)
    return dx

  if told['strides'] > 1:
    return back(dy, kernel)
  told['flipped'] = not told['flipped']
  return _either().bind(dy, kernel, otherwise=back, **told)


def _back_to_kernel(
  dy: jax.Array, x: jax.Array, kernel: ad.UndefinedPrimal, *, otherwise: Convolve, **told: Any
) -> jax.Array:
  (d_kernel,) = jax.linear_transpose(lambda kernel: otherwise(x, kernel), kernel.aval)(dy)
  return d_kernel


def _batched(
  arrays: tuple[jax.Array, jax.Array],
  axes: tuple[int | None, int | None],
  *,
  otherwise: Convolve,
  **told: Any,
) -> tuple[jax.Array, int]:
  x, kernel = arrays
  axis, of_kernels = axes
  if axis is None or of_kernels is not None:
    return jax.vmap(otherwise, axes)(x, kernel), 0
  x = jnp.moveaxis(x, axis, 0)
  y = _either().bind(x.reshape(-1, *x.shape[2:]), kernel, otherwise=otherwise, **told)
  return y.reshape(*x.shape[:2], *y.shape[1:]), 0
