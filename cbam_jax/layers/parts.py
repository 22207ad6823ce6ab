"""A batch computed a few examples at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from cbam_jax.errors import UserError

# What networks make of four images of 224x224 stays in the caches of two cores from one layer to
# the next; of fewer, a layer is too little work for a core.
_PIXELS_A_CORE = 2 * 224 * 224
_FEWEST_CORES = 2


def in_parts(function: Callable[..., Any], images: jax.Array, *others: jax.Array) -> Any:
  """`function(images, *others)`, on a CPU a few examples at a time.

  A CPU then finds in its caches what one layer leaves to the next, where that of a whole batch goes
  to memory and back. All parts are of one size: a batch that does not come apart so is computed
  whole. As `compiler_options` do, this goes by JAX's default backend. It belongs under `jit`.

  This is a loop, in which XLA's CPU convolutions are fast only with channels last, and gradients of
  them only those of this package's `Conv`.

  Args:
    function: A pure function from arrays of some of the examples to a tree of arrays with a row for
      each. None may depend on another, as in training on a batch's statistics; random numbers
      are drawn anew only from keys among `others`.
    images: (N, *spatial, C), split over all devices or on one.
    others: What else there is of each example, (N, ...).

  Returns:
    The tree of arrays (N, ...).

  Raises:
    UserError: If an array is not of N examples, or the function gives another number of rows.
  """
  images, others = jnp.asarray(images), tuple(jnp.asarray(x) for x in others)
  if images.ndim == 0 or any(x.shape[:1] != images.shape[:1] for x in others):
    shapes = ', '.join(str(x.shape) for x in (images, *others))
    raise UserError(
      f'in_parts got arrays of shape {shapes}; each must have a row for each of the images.'
    )
  devices = _devices(images)
  size = _size(images.shape, devices) if jax.default_backend() == 'cpu' else None
  if size is None:
    return _checked(function(images, *others), images.shape[0])
  count = images.shape[0] // devices

  def part(first: jax.Array) -> Any:
    # Of every device its own examples.
    own = (x.reshape(devices, count, *x.shape[1:]) for x in (images, *others))
    some = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in own)
    results = function(*(x.reshape(devices * size, *x.shape[2:]) for x in some))
    results = _checked(results, devices * size)
    return jax.tree.map(lambda y: y.reshape(devices, size, *y.shape[1:]), results)

  results = lax.map(part, jnp.arange(0, count, size))
  return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(images.shape[0], *y.shape[3:]), results)


def _devices(x: jax.Array) -> int:
  """Over how many devices `x` may be split; in a `shard_map`, its own share."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    return jax.device_count()
  axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  return math.prod(size for size, kind in axes if kind != AxisType.Manual)


def _size(shape: tuple[int, ...], devices: int) -> int | None:
  """Examples of each device to take at once, of images (N, *spatial, C); None for all."""
  if len(shape) < 3 or not all(isinstance(size, int) for size in shape) or 0 in shape:
    return None
  count, odd = divmod(shape[0], devices)
  most = max(1, _pixels(devices) // math.prod(shape[1:-1]))
  if odd or count <= most:
    return None
  size = max(s for s in range(1, most + 1) if count % s == 0)
  return size if 2 * size >= most else None


def _pixels(devices: int) -> int:
  """Pixels of each device's images to take at once."""
  return _PIXELS_A_CORE * max(_FEWEST_CORES, _cores() // devices)


def _cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _checked(results: Any, rows: int) -> Any:
  for y in jax.tree.leaves(results):
    if jnp.shape(y)[:1] != (rows,):
      raise UserError(
        f'the function of in_parts gave an array of shape {jnp.shape(y)} for {rows} examples; it '
        'must give a row for each.'
      )
  return results
