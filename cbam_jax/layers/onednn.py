"""Convolutions on a CPU by oneDNN, which XLA holds and by itself calls for matrix products alone.

A network's forward pass takes 0.85 to 0.94 of its time that way. XLA is asked for it by a custom
call of its own, whose form it does not promise to keep, so this is careful: a release that it was
not tried with, a processor for which XLA holds no oneDNN, and a call that XLA cannot divide among
devices, store in a compilation cache or export, are left to the other form of the convolution.
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
TRIED = (0, 8, 2), (0, 11)
_TARGET = '__onednn$convolution'

# At lowering it is known for how many devices, and whether to be stored.
_either = Primitive('convolution_by_onednn_or_otherwise')


def preferred(forms: Forms, strides: int, dilation: int, groups: int) -> Forms:
  """A convolution by oneDNN where XLA can call it, in `forms` elsewhere.

  oneDNN gives the convolution and, at stride 1, its gradient by the features. XLA has no call for
  that by the kernel.

  Args:
    forms: The convolution of (N, H, W, C) and (K, L, C / groups, F), odd sides, each side padded by
      half of them times the dilation.
    strides: Step on both spatial axes.
    dilation: Distance between the taps of the kernel.
    groups: Groups of channels convolved apart.
  """
  either = functools.partial(_bound, strides=strides, dilation=dilation, groups=groups)
  by_features = forms.by_features
  if strides == 1:
    by_features = functools.partial(either, otherwise=by_features)
  return Forms(functools.partial(either, otherwise=forms.forward), by_features, forms.by_kernel)


@functools.cache
def is_found() -> bool:
  """Whether this XLA calls oneDNN as it is asked to here."""
  version = tuple(int(part) for part in jaxlib.__version__.split('.')[:3] if part.isdecimal())
  if not TRIED[0] <= version < TRIED[1] or platform.machine().lower() not in ('x86_64', 'amd64'):
    return False
  # All that the call tells: a step, a dilation, groups, sides that differ.
  rng = np.random.default_rng(0)
  x = rng.integers(-4, 5, (2, 9, 7, 4)).astype(np.float32)
  kernel = rng.integers(-4, 5, (3, 5, 2, 6)).astype(np.float32)
  call = functools.partial(_call, strides=2, dilation=2, groups=2, flipped=False)
  with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices(backend='cpu')[0]):
    try:
      y = np.asarray(jax.jit(call).lower(x, kernel).compile()(x, kernel))
    except jax.errors.JaxRuntimeError:
      return False
  return np.array_equal(y, _by_hand(x, kernel, strides=2, dilation=2, groups=2))


def is_used() -> bool:
  """Whether what JAX's default backend runs calls oneDNN, unless a compilation cache is set."""
  return jax.default_backend() == 'cpu' and jax.device_count() == 1 and is_found()


def _by_hand(
  x: np.ndarray, kernel: np.ndarray, strides: int, dilation: int, groups: int
) -> np.ndarray:
  """The convolution by its definition."""
  *sides, c, features = kernel.shape
  edges = [(dilation * (side // 2),) * 2 for side in sides]
  padded = np.pad(x, [(0, 0), *edges, (0, 0)])
  height, width = (-(-size // strides) for size in x.shape[1:3])
  y = np.zeros((x.shape[0], height, width, features), x.dtype)
  for i, j, k in np.ndindex(*sides, groups):
    read = padded[:, dilation * i :: strides, dilation * j :: strides, k * c : (k + 1) * c]
    own = slice(k * features // groups, (k + 1) * features // groups)
    y[..., own] += read[:, :height, :width] @ kernel[i, j, :, own]
  return y


def _bound(
  x: jax.Array, kernel: jax.Array, otherwise: Convolve, strides: int, dilation: int, groups: int
) -> jax.Array:
  known = all(isinstance(size, int) and size > 0 for size in x.shape)
  automatic = all(kind == AxisType.Auto for kind in jax.typeof(x).sharding.mesh.axis_types)
  if x.ndim != 4 or x.dtype != jnp.float32 or not known or not automatic:
    return otherwise(x, kernel)
  return _either.bind(
    x,
    kernel,
    otherwise=otherwise,
    strides=strides,
    dilation=dilation,
    groups=groups,
    flipped=False,
  )


def _call(
  x: jax.Array, kernel: jax.Array, strides: int, dilation: int, groups: int, flipped: bool
) -> jax.Array:
  """XLA's call of oneDNN; `flipped`, what goes back through the convolution at stride 1."""
  if flipped:
    # In each group, the channels that come in and the features change places.
    *sides, c, features = kernel.shape
    kernel = lax.rev(kernel, (0, 1)).reshape(*sides, c, groups, features // groups)
    kernel = kernel.swapaxes(2, 4).reshape(*sides, features // groups, groups * c)
  padding = [dilation * (side // 2) for side in kernel.shape[:2]]
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
  shape = _shape(x.shape, kernel.shape, strides, groups, flipped=False)
  called = jax.ffi.ffi_call(
    _TARGET,
    jax.ShapeDtypeStruct(shape, x.dtype),
    custom_call_api_version=2,
    legacy_backend_config=json.dumps({'onednn_conv_config': told}),
  )
  return called(x, kernel)


def _shape(
  x: tuple[int, ...], kernel: tuple[int, ...], strides: int, groups: int, flipped: bool
) -> tuple[int, ...]:
  features = groups * kernel[2] if flipped else kernel[3]
  return x[0], *(math.ceil(size / strides) for size in x[1:3]), features


@_either.def_impl
def _uncompiled(x: jax.Array, kernel: jax.Array, *, otherwise: Convolve, **how: Any) -> jax.Array:
  return otherwise(x, kernel)


@_either.def_abstract_eval
def _result(
  x: jax.core.ShapedArray, kernel: jax.core.ShapedArray, *, otherwise: Convolve, **how: Any
) -> jax.core.ShapedArray:
  shape = _shape(x.shape, kernel.shape, how['strides'], how['groups'], how['flipped'])
  return x.update(shape=shape, weak_type=False)


def _lowered(
  context: mlir.LoweringRuleContext, x: Any, kernel: Any, *, otherwise: Convolve, **how: Any
) -> Any:
  return mlir.lower_fun(otherwise, multiple_results=False)(context, x, kernel)


def _lowered_on_cpu(
  context: mlir.LoweringRuleContext, x: Any, kernel: Any, *, otherwise: Convolve, **how: Any
) -> Any:
  module, settings = context.module_context, jax.config.values
  alone = getattr(module.axis_context, 'num_devices', None) == 1
  stored = settings['jax_enable_compilation_cache'] and settings['jax_compilation_cache_dir']
  exported = module.lowering_parameters.for_export
  called = alone and not stored and not exported and is_found()
  function = functools.partial(_call, **how) if called else otherwise
  return mlir.lower_fun(function, multiple_results=False)(context, x, kernel)


mlir.register_lowering(_either, _lowered)
mlir.register_lowering(_either, _lowered_on_cpu, platform='cpu')


def _back_to_features(
  dy: jax.Array, x: ad.UndefinedPrimal, kernel: jax.Array, *, otherwise: Convolve, **how: Any
) -> jax.Array:
  aval = x.aval

  def back(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    (dx,) = jax.linear_transpose(lambda x: otherwise(x, kernel), aval)(dy)
    return dx

  if how['strides'] > 1:
    return back(dy, kernel)
  return _either.bind(dy, kernel, otherwise=back, **{**how, 'flipped': not how['flipped']})


def _back_to_kernel(
  dy: jax.Array, x: jax.Array, kernel: ad.UndefinedPrimal, *, otherwise: Convolve, **how: Any
) -> jax.Array:
  (d_kernel,) = jax.linear_transpose(lambda kernel: otherwise(x, kernel), kernel.aval)(dy)
  return d_kernel


ad.defbilinear(_either, _back_to_features, _back_to_kernel)


def _batched(
  arrays: tuple[jax.Array, ...],
  axes: tuple[int | None, ...],
  *,
  otherwise: Convolve,
  **how: Any,
) -> tuple[jax.Array, int]:
  return jax.vmap(otherwise, axes)(*arrays), 0


batching.primitive_batchers[_either] = _batched
