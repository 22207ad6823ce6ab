import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import BAM
from tests.attention import definitions
from tests.layers.random_variables import random_features, random_variables


@pytest.mark.parametrize('shape', [(3, 16, 8), (3, 12, 10, 8), (3, 6, 7, 5, 8)])
@pytest.mark.parametrize('combine', ['product', 'sum'])
def test_definition(shape, combine, x64):
  module = BAM(reduction=2, combine=combine, param_dtype=jnp.float64)
  x = random_features(shape)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  tree = jax.tree.map(np.asarray, variables)
  expected = definitions.bam(np.asarray(x), tree['params'], tree['batch_stats'], combine)
  np.testing.assert_allclose(y, expected, rtol=1e-11)


@pytest.mark.parametrize('dilation', [1, 2])
def test_dilation(dilation, x64):
  module = BAM(reduction=2, dilation=dilation, param_dtype=jnp.float64)
  x = random_features((3, 12, 10, 8))
  variables = random_variables(module, x, train=False)
  tree = jax.tree.map(np.asarray, variables)
  expected = definitions.bam(
    np.asarray(x), tree['params'], tree['batch_stats'], 'product', dilation
  )
  y = module.apply(variables, x, train=False)
  np.testing.assert_allclose(y, expected, rtol=1e-11)


def test_group_size_reaches_every_norm(x64):
  x = random_features((6, 6, 6, 8))
  whole = BAM(reduction=2, param_dtype=jnp.float64)
  variables = random_variables(whole, x, train=True)

  @functools.partial(jax.jit, static_argnums=0)
  def run(module, x):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])

  y, updates = run(whole.clone(group_size=3), x)
  (first, first_stats), (second, second_stats) = run(whole, x[:3]), run(whole, x[3:])
  np.testing.assert_allclose(y, jnp.concatenate([first, second]), rtol=1e-11)
  jax.tree.map(
    lambda whole, a, b: np.testing.assert_allclose(whole, (a + b) / 2, rtol=1e-11),
    updates,
    first_stats,
    second_stats,
  )


def test_parameter_count():
  # Channel: 64 * 4 + 4, norm 8, 4 * 64 + 64. Spatial: 64 * 4 + 4, twice 9 * 4 * 4 + 4, three
  # norms of 8, 4 + 1.
  params = random_variables(BAM(), jnp.ones((2, 8, 8, 64)), train=False)['params']
  counts = {
    name: sum(leaf.size for leaf in jax.tree.leaves(branch)) for name, branch in params.items()
  }
  assert counts == {'channel': 260 + 8 + 320, 'spatial': 260 + 2 * 148 + 3 * 8 + 5}


def test_hidden_layers_are_never_empty():
  params = random_variables(BAM(), jnp.ones((2, 8, 8, 4)), train=False)['params']
  assert params['channel']['fc1']['kernel'].shape == (4, 1)
  assert params['spatial']['reduce']['kernel'].shape == (1, 1, 4, 1)


def test_initial_values():
  init = jax.jit(lambda key: BAM(reduction=4).init(key, jnp.ones((2, 4, 4, 256)), train=False))
  params = init(jax.random.key(0))['params']
  for name, fan_in in (('fc1', 256), ('fc2', 64)):
    kernel, bound = np.asarray(params['channel'][name]['kernel']), 1 / np.sqrt(fan_in)
    assert 0.99 * bound < np.abs(kernel).max() <= bound
  kernel = np.asarray(params['spatial']['conv1']['kernel'])
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
  for norm in (
    params['channel']['norm'],
    *(params['spatial'][name] for name in ('reduce_norm', 'norm1', 'norm2')),
  ):
    np.testing.assert_array_equal(norm['scale'], np.ones(64))


def test_gate_is_between_one_and_two():
  x = random_features((3, 6, 6, 8), dtype=np.float32)
  for combine in ('product', 'sum'):
    module = BAM(reduction=2, combine=combine)
    variables = random_variables(module, x, train=False)
    ratio = jax.jit(functools.partial(module.apply, train=False))(variables, x) / x
    assert np.all(ratio > 1)
    assert np.all(ratio < 2)
