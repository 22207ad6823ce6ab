"""CBAM's reductions as Pallas kernels: what `cbam_jax.attention.fused` needs, each in one read.

XLA takes a mean, a maximum and its position in reductions of different shapes, and reads the
features again for each. Here one kernel reads a tile once and keeps them all.

A GPU's kernel walks over its tile in chunks whose sides are powers of two, as Triton wants them,
and masks what sticks out; each element of a chunk keeps its own sums and maximum, and these meet
after the last chunk. A TPU's kernel holds its whole tile in vector memory. Elsewhere the kernels
are interpreted, which is slow and serves the tests.

Shapes: `x` is (N, P, C) with P positions; what belongs to channels is (N or 1, 1, C), what belongs
to positions (N, P).
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

# Positions and channels that a GPU's kernel has in registers at a time: the fastest of ten on an
# H200.
GPU_POSITIONS, GPU_GRADIENT, GPU_CHANNELS = (16, 128), (32, 128), (32, 64)
# Channels of a TPU's tile (its lanes), and positions of one that is pooled over channels.
TPU_CHANNELS, TPU_POSITIONS = 128, 256

Arrays = tuple[jax.Array, ...]


# ------------------------------------------------------------------------------ over positions


def over_positions(x: jax.Array, sign: jax.Array) -> Arrays:
  """Of each channel: means of `x` and its square, the maximum of `x * sign`, the latter's position.

  Returns:
    Four arrays (N, C), the position int32 and the first of equals.
  """
  rule = 'n p c, n one c -> n c, n c, n c, n c'
  return _on_each_device(_positions_pooled, rule)(x, _for_each_example(sign, x))


def _positions_pooled(x: jax.Array, sign: jax.Array) -> Arrays:
  dtypes = _dtypes(x)
  total, squares, *highest = _for_each_channel(
    _pool_positions, (dtypes[0], *dtypes), x, sign, gpu_chunk=GPU_POSITIONS
  )
  return total / x.shape[1], squares / x.shape[1], *highest


def _pool_positions(x_ref: Any, sign_ref: Any, *outputs: Any, positions: int, chunk: int) -> None:
  sign = sign_ref[...]
  rows = lax.broadcasted_iota(jnp.int32, (chunk, sign.shape[1]), 0)

  def look(start: Any, carry: Arrays) -> Arrays:
    total, squares, *highest = carry
    x = _positions_of(x_ref, start, chunk).astype(sign.dtype)
    values = x * sign
    if positions % chunk:
      values = jnp.where(start + rows < positions, values, -jnp.inf)
    return total + x, squares + x * x, *_higher(highest, values, start + rows)

  found = _joined(_walk(positions, chunk, look, _nothing(rows.shape, outputs)), 0, positions)
  for ref, value in zip(outputs, found, strict=True):
    ref[...] = value


def gradient_sums(
  x: jax.Array, dy: jax.Array, d_mean: jax.Array, d_peak: jax.Array, channel: jax.Array
) -> Arrays:
  """Sums over positions of `d * x` and of `d = dy + d_mean + (d_peak in its channel)`.

  Args:
    x: (N, P, C).
    dy: Likewise.
    d_mean: What each channel of a position gets, (N, P), as are all that follow.
    d_peak: What one channel of a position gets.
    channel: Which one, int32.

  Returns:
    Two arrays (N, C).
  """
  rule = 'n p c, n p c, n p, n p, n p -> n c, n c'
  return _on_each_device(_gradient_summed, rule)(x, dy, d_mean, d_peak, channel)


def _gradient_summed(x: jax.Array, dy: jax.Array, *maps: jax.Array) -> Arrays:
  maps = tuple(v[..., None] for v in maps)
  return _for_each_channel(
    _sum_gradient, _dtypes(x)[:1] * 2, x, dy, *maps, gpu_chunk=GPU_GRADIENT, walks=True
  )


def _sum_gradient(*refs: Any, positions: int, chunk: int) -> None:
  *inputs, with_x_ref, alone_ref = refs
  shape = chunk, alone_ref.shape[1]
  columns = pl.program_id(1) * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)

  def look(start: Any, carry: Arrays) -> Arrays:
    x, dy, d_mean, d_peak, channel = (_positions_of(ref, start, chunk) for ref in inputs)
    d = dy.astype(alone_ref.dtype) + d_mean + jnp.where(columns == channel, d_peak, 0)
    return carry[0] + d * x, carry[1] + d

  sums = _walk(positions, chunk, look, (jnp.zeros(shape, alone_ref.dtype),) * 2)
  for ref, found in zip((with_x_ref, alone_ref), sums, strict=True):
    ref[...] = jnp.sum(found, 0, keepdims=True)


def _for_each_channel(
  kernel: Callable[..., None],
  dtypes: Any,
  *inputs: jax.Array,
  gpu_chunk: tuple[int, int],
  walks: bool = False,
) -> Arrays:
  """Runs a kernel that keeps (1, channels) of all positions, from features, maps and vectors.

  If it `walks`, then on a TPU too, where maps take a lane each.
  """
  n, p, c = inputs[0].shape

  def run(channels: int, chunk: int, **options: Any) -> Any:
    def block(rows: int, columns: int) -> pl.BlockSpec:
      across = columns > 1
      return pl.BlockSpec(
        (None, rows, channels if across else 1), lambda i, j: (i, 0, j if across else 0)
      )

    return pl.pallas_call(
      functools.partial(kernel, positions=p, chunk=chunk),
      out_shape=[jax.ShapeDtypeStruct((n, 1, c), dtype) for dtype in dtypes],
      grid=(n, c // channels),
      in_specs=[block(*v.shape[1:]) for v in inputs],
      out_specs=[block(1, c)] * len(dtypes),
      name=f'cbam{kernel.__name__}',
      **options,
    )(*inputs)

  # A TPU walks by eights, as its sublanes are.
  parts = [k for k in range(8, TPU_POSITIONS + 1, 8) if p % k == 0]
  tpu_chunk = parts[-1] if walks and parts else p
  outputs = _on_each_platform(
    tpu=functools.partial(run, TPU_CHANNELS if c % TPU_CHANNELS == 0 else c, tpu_chunk),
    gpu=functools.partial(run, _power_of_two(c, gpu_chunk[1]), gpu_chunk[0]),
  )
  return tuple(output[:, 0] for output in outputs)


# ------------------------------------------------------------------------------- over channels


def over_channels(x: jax.Array, scale: jax.Array, offset: jax.Array) -> Arrays:
  """Of each position, over channels of `x * scale + offset`: mean, maximum, the latter's channel.

  Returns:
    Three arrays (N, P), the channel int32 and the first of equals.
  """
  rule = 'n p c, n one c, n one c -> n p, n p, n p'
  vectors = (_for_each_example(v, x) for v in (scale, offset))
  return _on_each_device(_channels_pooled, rule)(x, *vectors)


def _channels_pooled(x: jax.Array, scale: jax.Array, offset: jax.Array) -> Arrays:
  n, p, c = x.shape
  outputs = [((n, p, 1), dtype) for dtype in _dtypes(x)]

  def run(rows: int, chunk: int, masked: bool = False, **options: Any) -> Any:
    vector = pl.BlockSpec((None, 1, c), lambda i, j: (i, 0, 0))
    return pl.pallas_call(
      functools.partial(_pool_channels, positions=p, channels=c, chunk=chunk, masked=masked),
      out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
      grid=(n, pl.cdiv(p, rows)),
      in_specs=[pl.BlockSpec((None, rows, c), lambda i, j: (i, j, 0)), vector, vector],
      out_specs=[pl.BlockSpec((None, rows, 1), lambda i, j: (i, j, 0))] * 3,
      name='cbam_pool_channels',
      **options,
    )(x, scale, offset)

  rows = min(p, TPU_POSITIONS)
  total, peak, position = _on_each_platform(
    tpu=functools.partial(run, rows, c),
    # What sticks out of a TPU's last tile is never written; a GPU must not touch it.
    gpu=functools.partial(
      run, GPU_CHANNELS[0], _power_of_two(c, GPU_CHANNELS[1]), masked=p % GPU_CHANNELS[0] > 0
    ),
  )
  return total[..., 0] / c, peak[..., 0], position[..., 0]


def _pool_channels(
  x_ref: Any, scale_ref: Any, offset_ref: Any, *outputs: Any,
  positions: int, channels: int, chunk: int, masked: bool,
) -> None:  # fmt: skip
  shape = x_ref.shape[0], chunk
  left = positions - pl.program_id(1) * shape[0]

  def inside(columns: int) -> jax.Array | None:
    rows = lax.broadcasted_iota(jnp.int32, (shape[0], columns), 0)
    return rows < left if masked else None

  def look(start: Any, carry: Arrays) -> Arrays:
    total, *highest = carry
    columns = pl.ds(start, chunk)
    x = _read(x_ref.at[:, columns], inside(chunk)).astype(total.dtype)
    values = x * scale_ref[:, columns] + offset_ref[:, columns]
    places = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    return total + values, *_higher(highest, values, places)

  found = _joined(_walk(channels, chunk, look, _nothing(shape, outputs)), 1, channels)
  for ref, value in zip(outputs, found, strict=True):
    if masked:
      triton.store(ref, value, mask=inside(1))
    else:
      ref[...] = value


# ---------------------------------------------------------------------------- what kernels share


def _dtypes(x: jax.Array) -> tuple[Any, ...]:
  """Of a sum, a maximum and its position."""
  dtype = at_least_float32(x.dtype)
  return dtype, dtype, jnp.int32


def _nothing(shape: tuple[int, ...], outputs: Any) -> Arrays:
  """Sums, maximum and position before the first chunk."""
  *sums, peak, position = (jnp.zeros(shape, ref.dtype) for ref in outputs)
  return *sums, jnp.full_like(peak, -jnp.inf), position


def _walk(size: int, chunk: int, look: Callable[[Any, Arrays], Arrays], carry: Arrays) -> Arrays:
  """`look` from every chunk's start on."""
  if chunk >= size:
    return look(0, carry)
  return lax.fori_loop(0, pl.cdiv(size, chunk), lambda i, carry: look(i * chunk, carry), carry)


def _positions_of(ref: Any, start: Any, chunk: int) -> jax.Array:
  """A chunk of positions, zero beyond the last."""
  positions, columns = ref.shape
  inside = None
  if positions % chunk:
    inside = start + lax.broadcasted_iota(jnp.int32, (chunk, columns), 0) < positions
  return _read(ref.at[pl.ds(start, chunk)], inside)


def _read(ref: Any, inside: jax.Array | None) -> jax.Array:
  return ref[...] if inside is None else triton.load(ref, mask=inside, other=0)


def _higher(highest: Any, values: jax.Array, places: jax.Array) -> Arrays:
  """Maximum and place, with further values looked at; the first of equals stays."""
  peak, place = highest
  return jnp.maximum(peak, values), jnp.where(values > peak, places, place)


def _joined(carry: Arrays, axis: int, size: int) -> Arrays:
  """Sums, maximum and place along `axis`, from those of the elements of a chunk."""
  *sums, peaks, places = carry
  sums = [jnp.sum(v, axis, keepdims=True) for v in sums]
  peak = jnp.max(peaks, axis, keepdims=True)
  place = jnp.min(jnp.where(peaks == peak, places, size - 1), axis, keepdims=True)
  # Triton's maximum passes over what is not a number, but no sum does.
  return *sums, jnp.where(jnp.isnan(sums[0]), sums[0], peak), place


def _power_of_two(size: int, most: int) -> int:
  """The largest power of two that divides `size`, up to `most`."""
  return min(size & -size, most)


# ------------------------------------------------------------------- where and on what they run


def _for_each_example(vector: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.broadcast_to(vector, (x.shape[0], *vector.shape[1:]))


@functools.cache
def _on_each_device(pools: Callable[..., Arrays], rule: str) -> Callable[..., Arrays]:
  """`pools`, whose examples stand alone, on each device's own ones.

  Neither the compiler's partitioner nor `vmap`, whose axis joins the examples, can look into a
  kernel.
  """

  def partition(mesh: Any, arguments: Any, results: Any) -> Any:
    examples = NamedSharding(mesh, PartitionSpec(*arguments[0].sharding.spec[:1]))
    return mesh, pools, (examples,) * len(results), (examples,) * len(arguments)

  partitioned = custom_partitioning(pools)
  whole = tuple(factor for factor in ('p', 'c', 'one') if factor in rule)
  partitioned.def_partition(partition=partition, sharding_rule=rule, need_replication_factors=whole)
  run = jax.custom_batching.custom_vmap(partitioned)

  @run.def_vmap
  def more_examples(size: int, batched: Any, *arrays: jax.Array) -> Any:
    stacked = (
      array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
      for array, is_batched in zip(arrays, batched, strict=True)
    )
    outputs = run(*(array.reshape(-1, *array.shape[2:]) for array in stacked))
    outputs = tuple(output.reshape(size, -1, output.shape[1]) for output in outputs)
    return outputs, (True,) * len(outputs)

  return run


def _on_each_platform(tpu: Callable[..., Any], gpu: Callable[..., Any]) -> Any:
  by_triton = functools.partial(gpu, compiler_params=triton.CompilerParams())
  return lax.platform_dependent(
    tpu=tpu, cuda=by_triton, rocm=by_triton, default=functools.partial(tpu, interpret=True)
  )
