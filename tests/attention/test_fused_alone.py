"""CBAM called by itself, fused, against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cbam_jax import CBAM, create_model
from tests.attention.comparison import assert_close
from tests.layers.random_variables import random_features, random_variables


def make(implementation):
  dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  return CBAM(reduction=4, implementation=implementation, param_dtype=dtype)


def outputs(implementation, variables, x, train=True):
  """The gradients of a sum of the output's squares, by parameters and features; and the outputs."""

  def total(params, x):
    y, updated = make(implementation).apply(
      {**variables, 'params': params}, x, train=train, mutable=['batch_stats']
    )
    return jnp.sum(jnp.square(y)), (y, updated)

  gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
  return jax.jit(gradient)(variables['params'], x)


@pytest.mark.parametrize(
  ('implementation', 'shape', 'train'),
  [
    ('auto', (4, 6, 5, 8), True),
    ('xla', (4, 6, 5, 8), False),
    ('pallas', (4, 6, 5, 8), True),
    ('auto', (4, 7, 8), True),
    ('auto', (2, 3, 4, 5, 8), True),
    ('xla', (2, 1, 1, 8), False),
  ],
  ids=['2d', '2d-eval', 'pallas', '1d', '3d', 'pixel'],
)
def test_equals_the_definition(implementation, shape, train, x64):
  x = random_features(shape)
  variables = random_variables(make('plain'), x, train=False)
  actual, desired = (outputs(kind, variables, x, train) for kind in (implementation, 'plain'))
  assert_close(actual, desired, 1e-12)


def test_ties_go_to_the_first(x64):
  x = jnp.maximum(random_features((3, 6, 5, 8)), 0.5)
  variables = random_variables(make('plain'), x, train=False)
  assert_close(outputs('auto', variables, x), outputs('plain', variables, x), 1e-12)


def test_bfloat16_within_its_rounding(x64):
  x = random_features((4, 14, 14, 32)).astype(jnp.bfloat16)
  variables = random_variables(make('plain'), x.astype(jnp.float64), train=False)
  (_, d_x), (y, _) = outputs('auto', variables, x)
  (_, exact_d_x), (exact, _) = outputs('plain', variables, x.astype(jnp.float64))
  assert y.dtype == d_x.dtype == jnp.bfloat16
  assert_close(y, exact, 2**-7)
  assert_close(d_x, exact_d_x, 2**-5)


def test_second_derivatives(x64):
  x = random_features((2, 4, 3, 8))
  variables = random_variables(make('plain'), x, train=False)

  def total(implementation, x):
    return jnp.sum(jnp.square(outputs(implementation, variables, x)[0][1]))

  actual, desired = (jax.grad(functools.partial(total, kind))(x) for kind in ('auto', 'plain'))
  assert_close(actual, desired, 1e-10)


@pytest.mark.parametrize('mapped', ['x', 'channel', 'spatial'])
def test_gradients_of_vmap(mapped, x64):
  x = random_features((2, 4, 3, 8))
  variables = random_variables(make('plain'), x, train=False)
  params = variables['params']
  several = {'x': x, **params}[mapped]
  several = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -3 * v]), several)

  def gradients(implementation):
    def total(given, x, params):
      x, params = (given, params) if mapped == 'x' else (x, {**params, mapped: given})
      y, _ = make(implementation).apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.sum(jnp.square(y))

    def summed(*arguments):
      return jnp.sum(jax.vmap(total, (0, None, None))(*arguments))

    return jax.jit(jax.grad(summed, argnums=(0, 1, 2)))(several, x, params)

  assert_close(gradients('auto'), gradients('plain'), 1e-10)


@pytest.mark.usefixtures('eight_devices')
def test_gradients_in_a_shard_map(x64):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  x = random_features((8, 4, 3, 8))
  variables = random_variables(make('plain'), x, train=False)
  sharded, everywhere = PartitionSpec('data'), PartitionSpec()

  def gradients(implementation):
    @jax.jit
    @functools.partial(
      jax.shard_map, mesh=mesh, in_specs=(everywhere, sharded), out_specs=(everywhere, sharded)
    )
    def by_device(params, x):
      def total(params, x):
        y = make(implementation).apply({**variables, 'params': params}, x, train=False)
        return jnp.sum(jnp.square(y))

      return jax.grad(total, argnums=(0, 1))(params, x)

    return by_device(variables['params'], x)

  assert_close(gradients('xla'), gradients('plain'), 1e-10)


@pytest.mark.usefixtures('eight_devices')
@pytest.mark.parametrize('part', ['channel', 'spatial'])
def test_members_on_their_own_devices(part, x64):
  mesh = jax.make_mesh((8,), ('member',), axis_types=(jax.sharding.AxisType.Auto,))
  x = random_features((2, 4, 3, 8))
  variables = random_variables(make('plain'), x, train=False)
  several = jax.tree.map(
    lambda v: jnp.stack([i * v for i in range(1, 9)]), variables['params'][part]
  )

  def gradients(implementation):
    @jax.jit
    @functools.partial(
      jax.shard_map, mesh=mesh, in_specs=PartitionSpec('member'), out_specs=PartitionSpec('member')
    )
    def by_device(own):
      def total(own):
        params = {**variables['params'], part: jax.tree.map(lambda v: v[0], own)}
        y, _ = make(implementation).apply(
          {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
        )
        return jnp.sum(jnp.square(y))

      return jax.grad(total)(own)

    return by_device(several)

  assert_close(gradients('auto'), gradients('plain'), 1e-10)


def test_a_network_stores_less_than_by_the_definition():
  images = random_features((4, 64, 64, 3), dtype=np.float32)

  def stored(implementation):
    attention = functools.partial(CBAM, implementation=implementation)
    network = create_model('mobilenet_v1', attention=attention, width=0.5)
    variables = random_variables(network, images, train=False)

    def total(params):
      logits, _ = network.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      return jnp.sum(logits)

    step = jax.jit(jax.grad(total)).lower(variables['params']).compile()
    return step.memory_analysis().temp_size_in_bytes

  assert stored('auto') < 0.9 * stored('plain')


def test_at_inference_auto_is_the_definition(x64):
  x = random_features((2, 4, 3, 8))
  variables = random_variables(make('plain'), x, train=False)

  def tangent(implementation):
    module = make(implementation)
    return jax.jvp(lambda x: module.apply(variables, x, train=False), (x,), (jnp.cos(x),))[1]

  np.testing.assert_array_equal(tangent('auto'), tangent('plain'))
  with pytest.raises(TypeError, match='forward-mode'):
    tangent('xla')
