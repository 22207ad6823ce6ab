"""CBAM's pools as Pallas kernels: what `cbam_jax.attention.fused` needs of a pass, in one read.

XLA takes a mean, a maximum and its position in reductions of different shapes, and reads the
features again for each. Here one kernel reads a tile once and keeps all three.

A TPU's kernel holds its whole tile in vector memory. A GPU's walks over the tile in chunks whose
sides are powers of two, as Triton wants them, and masks what sticks out. Elsewhere the kernels are
interpreted, which is slow and serves the tests.

Shapes: `x` is (N, P, C) with P positions; what belongs to channels is (N or 1, 1, C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from cbam_jax.layers import at_least_float32

# Positions and channels that a GPU's kernel has in registers at a time.
GPU_CHUNK = (32, 64)
# Channels of a TPU's tile (its lanes), and positions of one that is pooled over channels.
TPU_CHANNELS, TPU_POSITIONS = 128, 256

Three = tuple[jax.Array, jax.Array, jax.Array]


def over_positions(x: jax.Array, sign: jax.Array) -> Three:
  """Of each channel: the mean of `x`, the maximum of `x * sign`, and the latter's position.

  Returns:
    Three arrays (N, C), the position int32 and the first of equals.
  """
  rule = 'n p c, n one c -> n c, n c, n c'
  return _on_each_device(_positions_pooled, rule)(x, _for_each_example(sign, x))


def _positions_pooled(x: jax.Array, sign: jax.Array) -> Three:
  n, p, c = x.shape
  outputs = [((n, 1, c), dtype) for dtype in _dtypes(x)]

  def run(channels: int, chunk: int, **options: Any) -> list[jax.Array]:
    vector = pl.BlockSpec((None, 1, channels), lambda i, j: (i, 0, j))
    return pl.pallas_call(
      functools.partial(_over_positions, positions=p, chunk=chunk),
      out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
      grid=(n, c // channels),
      in_specs=[pl.BlockSpec((None, p, channels), lambda i, j: (i, 0, j)), vector],
      out_specs=[vector] * 3,
      name='cbam_pools_over_positions',
      **options,
    )(x, sign)

  channels = TPU_CHANNELS if c % TPU_CHANNELS == 0 else c
  total, peak, position = _on_each_platform(
    tpu=functools.partial(run, channels, p),
    gpu=functools.partial(run, _power_of_two(c, GPU_CHUNK[1]), GPU_CHUNK[0]),
  )
  return total[:, 0] / p, peak[:, 0], position[:, 0]


def _over_positions(x_ref: Any, sign_ref: Any, *outputs: Any, positions: int, chunk: int) -> None:
  sign = sign_ref[...]
  rows = lax.broadcasted_iota(jnp.int32, (chunk, sign.shape[1]), 0)

  def look(start: Any, carry: Three) -> Three:
    inside = None if positions % chunk == 0 else start + rows < positions
    x = _read(x_ref.at[pl.ds(start, chunk)], inside).astype(outputs[0].dtype)
    values = x * sign if inside is None else jnp.where(inside, x * sign, -jnp.inf)
    return _keep(carry, x, values, start, 0)

  for ref, found in zip(outputs, _walk(positions, chunk, look, sign.shape, outputs), strict=True):
    ref[...] = found


def over_channels(x: jax.Array, scale: jax.Array, offset: jax.Array) -> Three:
  """Of each position, over channels of `x * scale + offset`: mean, maximum, the latter's channel.

  Returns:
    Three arrays (N, P), the channel int32 and the first of equals.
  """
  rule = 'n p c, n one c, n one c -> n p, n p, n p'
  vectors = (_for_each_example(v, x) for v in (scale, offset))
  return _on_each_device(_channels_pooled, rule)(x, *vectors)


def _channels_pooled(x: jax.Array, scale: jax.Array, offset: jax.Array) -> Three:
  n, p, c = x.shape
  outputs = [((n, p, 1), dtype) for dtype in _dtypes(x)]

  def run(rows: int, chunk: int, masked: bool = False, **options: Any) -> list[jax.Array]:
    vector = pl.BlockSpec((None, 1, c), lambda i, j: (i, 0, 0))
    return pl.pallas_call(
      functools.partial(_over_channels, positions=p, channels=c, chunk=chunk, masked=masked),
      out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
      grid=(n, pl.cdiv(p, rows)),
      in_specs=[pl.BlockSpec((None, rows, c), lambda i, j: (i, j, 0)), vector, vector],
      out_specs=[pl.BlockSpec((None, rows, 1), lambda i, j: (i, j, 0))] * 3,
      name='cbam_pools_over_channels',
      **options,
    )(x, scale, offset)

  rows = min(p, TPU_POSITIONS)
  total, peak, position = _on_each_platform(
    tpu=functools.partial(run, rows, c),
    # What sticks out of a TPU's last tile is never written; a GPU must not touch it.
    gpu=functools.partial(
      run, GPU_CHUNK[0], _power_of_two(c, GPU_CHUNK[1]), masked=p % GPU_CHUNK[0] > 0
    ),
  )
  return total[..., 0] / c, peak[..., 0], position[..., 0]


def _over_channels(
  x_ref: Any, scale_ref: Any, offset_ref: Any, *outputs: Any,
  positions: int, channels: int, chunk: int, masked: bool,
) -> None:  # fmt: skip
  rows = x_ref.shape[0]
  left = positions - pl.program_id(1) * rows

  def inside(columns: int) -> jax.Array | None:
    shape = (rows, columns)
    return lax.broadcasted_iota(jnp.int32, shape, 0) < left if masked else None

  def look(start: Any, carry: Three) -> Three:
    columns = pl.ds(start, chunk)
    x = _read(x_ref.at[:, columns], inside(chunk)).astype(outputs[0].dtype)
    values = x * scale_ref[:, columns] + offset_ref[:, columns]
    return _keep(carry, values, values, start, 1)

  found = _walk(channels, chunk, look, (rows, 1), outputs)
  for ref, value in zip(outputs, found, strict=True):
    if masked:
      triton.store(ref, value, mask=inside(1))
    else:
      ref[...] = value


# ------------------------------------------------------------------- what both kernels share


def _for_each_example(vector: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.broadcast_to(vector, (x.shape[0], *vector.shape[1:]))


def _on_each_device(pools: Callable[..., Three], rule: str) -> Callable[..., Three]:
  """`pools`, whose examples stand alone, on each device's own ones.

  Neither the compiler's partitioner nor `vmap`, whose axis joins the examples, can look into a
  kernel.
  """

  def partition(mesh: Any, arguments: Any, results: Any) -> Any:
    examples = NamedSharding(mesh, PartitionSpec(*arguments[0].sharding.spec[:1]))
    return mesh, pools, (examples,) * len(results), (examples,) * len(arguments)

  partitioned = custom_partitioning(pools)
  partitioned.def_partition(
    partition=partition, sharding_rule=rule, need_replication_factors=('p', 'c', 'one')
  )
  run = jax.custom_batching.custom_vmap(partitioned)

  @run.def_vmap
  def more_examples(size: int, batched: Any, *arrays: jax.Array) -> Any:
    stacked = (
      array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
      for array, is_batched in zip(arrays, batched, strict=True)
    )
    outputs = run(*(array.reshape(-1, *array.shape[2:]) for array in stacked))
    return tuple(output.reshape(size, -1, output.shape[1]) for output in outputs), (True,) * 3

  return run


def _dtypes(x: jax.Array) -> tuple[Any, ...]:
  """Of a sum, a maximum and its position."""
  dtype = at_least_float32(x.dtype)
  return dtype, dtype, jnp.int32


def _on_each_platform(tpu: Callable[..., Any], gpu: Callable[..., Any]) -> Any:
  by_triton = functools.partial(gpu, compiler_params=triton.CompilerParams())
  return lax.platform_dependent(
    tpu=tpu, cuda=by_triton, rocm=by_triton, default=functools.partial(tpu, interpret=True)
  )


def _power_of_two(size: int, most: int) -> int:
  """The largest power of two that divides `size`, up to `most`."""
  return min(size & -size, most)


def _read(ref: Any, inside: jax.Array | None) -> jax.Array:
  return ref[...] if inside is None else triton.load(ref, mask=inside, other=0)


def _walk(
  size: int, chunk: int, look: Callable[[Any, Three], Three], shape: tuple[int, ...], outputs: Any
) -> Three:
  """`look` from every chunk's start on, from nothing: a sum, a maximum, its position."""
  total, peak, position = (jnp.zeros(shape, ref.dtype) for ref in outputs)
  nothing = total, jnp.full_like(peak, -jnp.inf), position
  if chunk >= size:
    return look(0, nothing)
  return lax.fori_loop(0, pl.cdiv(size, chunk), lambda i, carry: look(i * chunk, carry), nothing)


def _keep(carry: Three, x: jax.Array, values: jax.Array, start: Any, axis: int) -> Three:
  """`carry` with a further chunk: `x` to sum, and `values` to find the maximum of."""
  total, peak, position = carry
  here = jnp.max(values, axis, keepdims=True)
  place = start + jnp.expand_dims(lax.argmax(values, axis, jnp.int32), axis)
  return (
    total + jnp.sum(x, axis, keepdims=True),
    jnp.maximum(peak, here),
    jnp.where(here > peak, place, position),
  )
