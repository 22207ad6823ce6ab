import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import CBAM, SpatialAttention
from tests.attention import definitions
from tests.layers.random_variables import random_features, random_variables

SHAPES = [(3, 10, 4), (3, 9, 8, 4), (3, 5, 4, 6, 4)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kernel_size', [1, 3, 7])
@pytest.mark.parametrize('pool', ['channel', 'conv1x1'])
def test_definition(shape, kernel_size, pool, x64):
  module = SpatialAttention(kernel_size, pool, param_dtype=jnp.float64)
  x = random_features(shape)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  tree = jax.tree.map(np.asarray, variables)
  x = np.asarray(x)
  logits = definitions.spatial_logits(x, tree['params'], tree['batch_stats'], pool)
  np.testing.assert_allclose(y, x * definitions.sigmoid(logits), rtol=1e-11)


def test_training_normalises_the_map_and_keeps_99_percent(x64):
  module = SpatialAttention(param_dtype=jnp.float64)
  x = random_features((3, 9, 8, 4))
  variables = random_variables(module, x, train=True)
  y, updates = module.apply(variables, x, train=True, mutable=['batch_stats'])

  tree = jax.tree.map(np.asarray, variables)
  pooled = np.stack([np.asarray(x).max(-1), np.asarray(x).mean(-1)], -1)
  convolved = definitions.convolution(pooled, tree['params']['conv'])
  norm, stats = tree['params']['norm'], tree['batch_stats']['norm']
  batch = {'mean': convolved.mean(), 'var': convolved.var()}
  logits = definitions.batch_norm(convolved, norm, batch)
  np.testing.assert_allclose(y, np.asarray(x) * definitions.sigmoid(logits), rtol=1e-10)
  mean = 0.99 * stats['mean'] + 0.01 * convolved.mean()
  var = 0.99 * stats['var'] + 0.01 * convolved.var(ddof=1)
  np.testing.assert_allclose(updates['batch_stats']['norm']['mean'], mean, rtol=1e-12)
  np.testing.assert_allclose(updates['batch_stats']['norm']['var'], var, rtol=1e-12)


def test_groups_are_normalised_apart(x64):
  x = random_features((4, 6, 6, 4))
  whole = SpatialAttention(param_dtype=jnp.float64)
  variables = random_variables(whole, x, train=True)

  def run(module, x):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  apart = jnp.concatenate([run(whole, x[:2]), run(whole, x[2:])])
  np.testing.assert_allclose(run(whole.clone(group_size=2), x), apart, rtol=1e-12)


@pytest.mark.parametrize('pool', ['channel', 'conv1x1'])
def test_gate_starts_at_one_half(pool):
  # Its norm's scale starts at 0, as in the authors' code.
  x = random_features((2, 5, 5, 4), dtype=np.float32)
  module = SpatialAttention(pool=pool)
  variables = module.init(jax.random.key(0), x, train=False)
  np.testing.assert_array_equal(variables['params']['norm']['scale'], [0])
  for train in (False, True):
    y, _ = module.apply(variables, x, train=train, mutable=['batch_stats'])
    np.testing.assert_array_equal(y, x / 2)


@pytest.mark.parametrize('module', [SpatialAttention(), CBAM(order='spatial_only')])
@pytest.mark.parametrize('shift', [(1, 2), (-3, 0), (2, -2)])
def test_translation(module, shift, x64):
  # With nothing at the borders, where zero padding begins, shifting commutes with attention.
  x = jnp.pad(random_features((2, 5, 5, 4)), [(0, 0), (4, 4), (4, 4), (0, 0)])
  variables = random_variables(module, x, train=False)

  def roll(x):
    return jnp.roll(x, shift, (1, 2))

  y = module.apply(variables, x, train=False)
  np.testing.assert_allclose(
    module.apply(variables, roll(x), train=False), roll(y), rtol=1e-5, atol=1e-7
  )


def test_order_of_channels_does_not_matter():
  module = SpatialAttention()
  x = random_features((2, 6, 6, 8), dtype=np.float32)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  np.testing.assert_allclose(
    module.apply(variables, x[..., ::-1], train=False), y[..., ::-1], rtol=1e-5, atol=1e-7
  )
