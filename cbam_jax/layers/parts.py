"""A batch computed a few examples at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cbam_jax.errors import UserError

# Pixels of a device's images at once. What networks make of four images of 224x224 stays in a CPU's
# caches from one layer to the next; of fewer, a layer is too little work for all cores.
_PIXELS = 4 * 224 * 224


def in_parts(function: Callable[..., Any], images: jax.Array, *others: jax.Array) -> Any:
  """`function(images, *others)`, on a CPU a few examples at a time.

  A CPU then finds in its caches what one layer leaves to the next, where that of a whole batch goes
  to memory and back. The last part is as large as the others: a batch that does not come apart so
  is computed whole. As `compiler_options` do, this goes by JAX's default backend.

  Args:
    function: From arrays of some of the examples to a tree of arrays with a row for each. None may
      depend on another, as in training on a batch's statistics.
    images: (N, H, W, C).
    others: What else there is of each example, (N, ...).

  Returns:
    The tree of arrays (N, ...).

  Raises:
    UserError: If an array is not of N examples, or the function gives another number of rows.
  """
  if images.ndim != 4 or any(x.shape[:1] != images.shape[:1] for x in others):
    shapes = ', '.join(str(x.shape) for x in (images, *others))
    raise UserError(
      f'in_parts got arrays of shape {shapes}; it takes images, (N, H, W, C), and arrays (N, ...) '
      'of as many examples.'
    )
  size = _size(images.shape) if jax.default_backend() == 'cpu' else None
  if size is None:
    return _checked(function(images, *others), images.shape[0])
  devices = jax.device_count()

  def part(first: jax.Array) -> Any:
    # Of every device its own examples.
    own = (x.reshape(devices, -1, *x.shape[1:]) for x in (images, *others))
    some = (lax.dynamic_slice_in_dim(x, first, size, 1) for x in own)
    results = function(*(x.reshape(-1, *x.shape[2:]) for x in some))
    results = _checked(results, devices * size)
    return jax.tree.map(lambda y: y.reshape(devices, size, *y.shape[1:]), results)

  results = lax.map(part, jnp.arange(0, images.shape[0] // devices, size))
  return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[3:]), results)


def _size(shape: tuple[int, ...]) -> int | None:
  """Examples of each device to take at once, of images (N, H, W, C); None for all."""
  if not all(isinstance(size, int) for size in shape) or 0 in shape:
    return None
  count, odd = divmod(shape[0], jax.device_count())
  most = max(1, _PIXELS // math.prod(shape[1:3]))
  if odd or count <= most:
    return None
  size = max(s for s in range(1, most + 1) if count % s == 0)
  return size if 2 * size >= most else None


def _checked(results: Any, rows: int) -> Any:
  for y in jax.tree.leaves(results):
    if jnp.shape(y)[:1] != (rows,):
      raise UserError(
        f'the function of in_parts gave an array of shape {jnp.shape(y)} for {rows} examples; it '
        'must give a row for each.'
      )
  return results
