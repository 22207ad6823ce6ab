"""CBAM in few passes: alone, or as a block's end, `relu(shortcut + CBAM(x * scale + offset))`.

CBAM's arithmetic is little; what it costs is passes over the features. Written as its definition
says, it stores the normalised features and the gated ones, for the backward pass too. Here the
batch norm's affine map and the channel gate are one map of each channel of each example,
`x * scale + offset`, which every pass applies as it reads: nothing of the size of `x` is stored
but `x`, which the batch norm keeps anyway, and the block's output, which the next block keeps.

Maxima carry the positions of their elements (see `cbam_jax.layers.max_over_axis`). The passes
write the map in different ways on purpose: XLA would compute a common expression once and store it.
With `pallas`, what is reduced are the kernels of `cbam_jax.attention.kernels`.

Shapes: `x` is (N, P, C) with P positions; `scale` and `offset` are (N, 1, C).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from cbam_jax.attention.reductions import affine_maximum, two_sums, two_sums_by_blocks
from cbam_jax.errors import UserError
from cbam_jax.layers import at_least_float32, by_platform, stored_relu


def refine(
  x: jax.Array,
  channel_logits: Callable[[jax.Array, jax.Array], jax.Array],
  spatial_logits: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  pallas: bool = False,
) -> jax.Array:
  """`CBAM(x)`, channel attention first, of the shape and type of `x` (N, *spatial, C).

  The other arguments are those of `refine_and_add`.
  """
  one = jnp.ones(x.shape[-1:], at_least_float32(x.dtype))
  vectors = lax.expand_dims(one, range(x.ndim - 1))
  return refine_and_add(
    x,
    one,
    lambda *_: (vectors, jnp.zeros_like(vectors)),
    None,
    channel_logits,
    spatial_logits,
    train=False,
    pallas=pallas,
  )


def refine_and_add(
  x: jax.Array,
  sign: jax.Array,
  affine: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]],
  shortcut: jax.Array | None,
  channel_logits: Callable[[jax.Array, jax.Array], jax.Array],
  spatial_logits: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  train: bool,
  pallas: bool = False,
) -> jax.Array:
  """`relu(shortcut + CBAM(x * scale + offset))`, channel attention first.

  Args:
    x: (N, *spatial, C).
    sign: Of `scale`, (C,).
    affine: From the means over positions of `x` and, in training, of its square, both (N, C), to
      `scale` and `offset`, both (N or 1, 1, ..., C), float32 at the least, as all gates and sums
      are.
    shortcut: Like `x`; None for neither sum nor ReLU.
    channel_logits: From the average and the maximum over positions, both (N, C), to (N, C).
    spatial_logits: From the maximum and the mean over channels, both (N, *spatial, 1), to the same.
    train: Whether `affine` asks for the mean of squares.
    pallas: Whether reductions are Pallas kernels.

  Returns:
    An array of the shape and type of `shortcut`, or of `x` without one.
  """
  n, *spatial, c = x.shape
  sign = sign.reshape(1, 1, c).astype(at_least_float32(x.dtype))
  flat, sign, shortcut = _varying_alike(x.reshape(n, math.prod(spatial), c), sign, shortcut)
  flat = _mapped_as(flat, sign)
  mean, square, extreme = channel_pools(flat, sign, train, pallas)
  scale, offset = affine(mean, square)
  # At once and not where each is used, so that their gradients are summed over the examples once.
  scale, offset = (
    jnp.broadcast_to(v.reshape(v.shape[0], 1, c), (n, 1, c)) for v in (scale, offset)
  )
  pooled = (v * scale[:, 0] + offset[:, 0] for v in (mean, extreme))
  gate = nn.sigmoid(channel_logits(*pooled))[:, None]
  flat, scale, offset, shortcut = _varying_alike(flat, scale * gate, offset * gate, shortcut)
  peak, mean, flat = spatial_pools(flat, scale, offset, pallas)
  maps = (n, *spatial, 1)
  gate = nn.sigmoid(spatial_logits(peak.reshape(maps), mean.reshape(maps)))
  flat, scale, offset, gate, shortcut = _varying_alike(flat, scale, offset, gate, shortcut)
  scale, offset = (lax.expand_dims(v[:, 0], range(1, x.ndim - 1)) for v in (scale, offset))
  return gate_and_add(flat.reshape(x.shape), scale, offset, gate, shortcut)


def _varying_alike(*arrays: jax.Array | None) -> Sequence[Any]:
  """`arrays`, which in a `shard_map` vary over one another's axes from here on; None stays.

  A derivative of one's own must have the type of what it is by. The compiler sees that nothing is
  ever chosen but the arrays.
  """
  if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
    return arrays
  given = [v for v in arrays if v is not None]
  never = functools.reduce(jnp.logical_or, (jnp.any(jnp.isnan(v)) for v in given)) & False
  return [v if v is None else jnp.where(never, jnp.zeros((), v.dtype), v) for v in arrays]


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(at_least_float32(x.dtype))


def _reduced(pallas: bool, name: str, definition: Callable[..., Any], *inputs: jax.Array) -> Any:
  """By the kernel of that name, or as its definition says, which also is its derivative."""
  return _kernel(name, definition)(*inputs) if pallas else definition(*inputs)


@functools.cache
def _kernel(name: str, definition: Callable[..., Any]) -> Callable[..., Any]:
  # Imported when they are asked for: Pallas takes a while, and no other implementation needs it.
  try:
    from cbam_jax.attention import kernels
  except ImportError as error:
    raise UserError(
      "implementation='pallas' needs Pallas's Triton backend, which JAX "
      f"{jax.__version__} does not have: take 'auto' or 'xla', or an older JAX."
    ) from error

  kernel = jax.custom_jvp(getattr(kernels, name))

  @kernel.defjvp
  def derivative(primals: Any, tangents: Any) -> Any:
    return kernel(*primals), jax.jvp(definition, primals, tangents)[1]

  return kernel


# ------------------------------------------------------------------------ pools over positions


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def channel_pools(
  x: jax.Array, sign: jax.Array, squares: bool = True, pallas: bool = False
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """What a batch norm and the channel attention after it ask of the positions, each (N, C).

  Args:
    x: (N, P, C).
    sign: Of the norm's scale, (1, 1, C).
    squares: Whether the mean of squares is asked for.
    pallas: Whether to reduce by a Pallas kernel.

  Returns:
    The mean of `x`, the mean of its square or None, and the element that the norm takes to its
    maximum: under a negative scale the least, under none the first.
  """
  if pallas:
    return _channel_pools_forward(x, sign, squares, pallas)[0]
  values = _wide(x)
  square = jnp.mean(lax.square(values), 1) if squares else None
  return jnp.mean(values, 1), square, _extreme(jnp.max(values * sign, 1), values, sign)


def _extreme(peak: jax.Array, values: jax.Array, sign: jax.Array) -> jax.Array:
  """The element of which `peak` is the maximum of `values * sign`: signs round nothing."""
  return jnp.where(sign[:, 0] == 0, values[:, 0], peak * sign[:, 0])


def _channel_pools_forward(x: jax.Array, sign: jax.Array, squares: bool, pallas: bool) -> Any:
  if squares or pallas:
    mean, square, *highest = _reduced(pallas, 'over_positions', _over_positions, x, sign)
  else:
    mean, highest = jnp.mean(_wide(x), 1), affine_maximum(_wide(x), sign, jnp.zeros_like(sign), 1)
  peak, position = highest
  outputs = mean, square if squares else None, _extreme(peak, _wide(x), sign)
  return outputs, (x, sign, position)


def _over_positions(
  x: jax.Array, sign: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  values = _wide(x)
  total, squares = two_sums(lambda v: (v, lax.square(v)), values)
  highest = affine_maximum(values, sign, jnp.zeros_like(sign), 1)
  return total / x.shape[1], squares / x.shape[1], *highest


def _channel_pools_backward(squares: bool, pallas: bool, residuals: Any, cotangents: Any) -> Any:
  del pallas  # what it leaves is read in one pass
  x, sign, position = residuals
  d_mean, d_square, d_extreme = cotangents
  here = lax.broadcasted_iota(position.dtype, x.shape, 1) == position[:, None]
  dx = (d_mean / x.shape[1])[:, None] + jnp.where(here, d_extreme[:, None], 0)
  if squares:
    dx += x * (d_square * (2 / x.shape[1]))[:, None]
  return dx.astype(x.dtype), jnp.zeros_like(sign)


channel_pools.defvjp(_channel_pools_forward, _channel_pools_backward)


# ------------------------------------------------------------------------- pools over channels


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spatial_pools(
  x: jax.Array, scale: jax.Array, offset: jax.Array, pallas: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The maximum and the mean of `x * scale + offset` over channels, both (N, P); and `x`.

  The cotangent of this `x` is not its own but that of `x * scale + offset`, as `gate_and_add` gives
  it: so all that goes back to `scale` and `offset` is summed in one pass.
  """
  if pallas:
    return _spatial_pools_forward(x, scale, offset, pallas)[0]
  values = _wide(x)
  return (
    jnp.max(values * scale + offset, 2),
    _mean(values, scale, offset),
    _mapped_as(x, scale, offset),
  )


def _mapped_as(x: jax.Array, *vectors: jax.Array) -> jax.Array:
  """`x`, on whose `vmap`ped axis each of `vectors` is.

  Their cotangents are made of that of `x`, which `vmap` would sum over an axis that `x` has not.
  The compiler sees that nothing is ever chosen but `x`.
  """
  for vector in vectors:
    x = jnp.where(jnp.isnan(vector) & False, jnp.zeros((), x.dtype), x)
  return x


def _mean(x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
  # Divided first, so that `x * scale` is not an expression in common with the maximum's.
  return jnp.sum(x * (scale / x.shape[2]), 2) + jnp.mean(offset, 2)


def _spatial_pools_forward(x: jax.Array, scale: jax.Array, offset: jax.Array, pallas: bool) -> Any:
  mean, peak, channel = _reduced(pallas, 'over_channels', _over_channels, x, scale, offset)
  return (peak, mean, _mapped_as(x, scale, offset)), (x, scale, channel)


def _over_channels(
  x: jax.Array, scale: jax.Array, offset: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  values = _wide(x)
  return _mean(values, scale, offset), *affine_maximum(values, scale, offset, 2)


def _spatial_pools_backward(pallas: bool, residuals: Any, cotangents: Any) -> Any:
  x, scale, channel = residuals
  d_peak, d_mean, dy = cotangents
  inputs = x, dy, d_mean / x.shape[2], d_peak, channel
  sums = _reduced(pallas, 'gradient_sums', _gradient_sums, *inputs)
  d_scale, d_offset = (v[:, None] for v in sums)
  return (_gradient(*inputs[1:]) * scale).astype(x.dtype), d_scale, d_offset


def _gradient(dy: jax.Array, d_mean: jax.Array, d_peak: jax.Array, channel: jax.Array) -> jax.Array:
  """What goes back to `x * scale + offset`, of which `dy` comes past the pools."""
  here = lax.broadcasted_iota(channel.dtype, dy.shape, 2) == channel[..., None]
  return _wide(dy) + d_mean[..., None] + jnp.where(here, d_peak[..., None], 0)


def _gradient_sums(x: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  dy = _gradient(*inputs)
  return two_sums(lambda dy, x: (dy * x, dy), dy, x)


spatial_pools.defvjp(_spatial_pools_forward, _spatial_pools_backward)

# ------------------------------------------------------------------------------ gate and sum


@jax.custom_vjp
def gate_and_add(
  x: jax.Array,
  scale: jax.Array,
  offset: jax.Array,
  gate: jax.Array,
  shortcut: jax.Array | None,
) -> jax.Array:
  """`relu((x * scale + offset) * gate + shortcut)`; without a shortcut, what is gated alone.

  Here alone positions are not one axis: `x` is (N, *spatial, C), `scale` and `offset`
  (N, 1, ..., C), `gate` (N, *spatial, 1).

  The cotangent of `x` is that of `x * scale + offset`, and `scale` and `offset` have none: see
  `spatial_pools`.
  """
  return _gate_and_add(x, scale, offset, gate, shortcut)


def _gate_and_add(
  x: jax.Array,
  scale: jax.Array,
  offset: jax.Array,
  gate: jax.Array,
  shortcut: jax.Array | None,
) -> jax.Array:
  gated = _wide(x) * (scale * gate)
  if shortcut is None:
    return (gated + offset * gate).astype(x.dtype)
  total = gated + (offset * gate + shortcut)
  # The barrier keeps XLA from keeping the wider sum as well, to spare the next block a rounding; on
  # a CPU, where XLA drops it early, `stored_relu` does what it is about.
  return lax.optimization_barrier(stored_relu(total).astype(shortcut.dtype))


def _gate_and_add_forward(*inputs: Any) -> Any:
  # Not by `gate_and_add`, whose cotangents are no derivatives: a second derivative comes by here.
  out = _gate_and_add(*inputs)
  x, scale, offset, gate, shortcut = inputs
  return out, (x, scale, offset, gate, None if shortcut is None else out)


def _gate_and_add_backward(residuals: Any, d_out: jax.Array) -> Any:
  x, scale, offset, gate, sum_ = residuals
  # Not `sum_ > 0`, which XLA would ask of the sum before the ReLU, and keep that too.
  du = d_out if sum_ is None else jnp.where(sum_ != 0, d_out, 0)
  wide = _wide(du)
  d_gate = by_platform(wide, x, scale, offset, default=_gate_sum, cpu=_gate_sums)
  return (
    (wide * gate).astype(x.dtype),
    jnp.zeros_like(scale),
    jnp.zeros_like(offset),
    d_gate,
    None if sum_ is None else du,
  )


gate_and_add.defvjp(_gate_and_add_forward, _gate_and_add_backward)


def _gate_sum(du: jax.Array, x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
  """The sum of `du * (x * scale + offset)` over channels, in one pass with what makes `du`."""
  return jnp.sum(du * x * scale + du * offset, -1, keepdims=True)


def _gate_sums(du: jax.Array, x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
  """The same as two sums: a CPU would store `scale` and `offset` for each position."""
  n, *spatial, c = x.shape
  inputs = [v.reshape(n, math.prod(v.shape[1:-1]), c) for v in (du, x, scale, offset)]

  def products(
    du: jax.Array, x: jax.Array, scale: jax.Array, offset: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return du * (x * scale), du * offset

  total = jnp.add(*two_sums_by_blocks(products, *inputs, axis=2))
  return total.reshape(*du.shape[:-1], 1)
