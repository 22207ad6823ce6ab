import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import CBAM, ChannelAttention, SqueezeExcitation
from tests.attention import definitions
from tests.layers.random_variables import random_features, random_variables

SHAPES = [(3, 10, 8), (3, 5, 6, 8), (3, 4, 3, 5, 8)]
POOLS = ('avg', 'max', 'lse', 'lp')
MIXES = [mix for size in (1, 2, 4) for mix in itertools.combinations(POOLS, size)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('pools', MIXES, ids='-'.join)
def test_definition(shape, pools, x64):
  module = ChannelAttention(reduction=2, pools=pools, param_dtype=jnp.float64)
  x = random_features(shape)
  variables = random_variables(module, x)
  y = module.apply(variables, x)
  params = jax.tree.map(np.asarray, variables['params'])
  x = np.asarray(x)
  expected = x * definitions.sigmoid(definitions.channel_logits(x, params, pools))
  np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.parametrize('shape', SHAPES)
def test_squeeze_and_excitation_is_the_average_pool_alone(shape, x64):
  x = random_features(shape)
  se = SqueezeExcitation(reduction=2, param_dtype=jnp.float64)
  variables = random_variables(se, x)
  params = jax.tree.map(np.asarray, variables['params'])
  logits = definitions.mlp(
    np.asarray(x).mean(definitions.positions(x), keepdims=True), params['mlp']
  )
  y = se.apply(variables, x)
  np.testing.assert_allclose(y, np.asarray(x) * definitions.sigmoid(logits), rtol=1e-12)

  ablation = ChannelAttention(reduction=2, pools=('avg',), param_dtype=jnp.float64)
  np.testing.assert_allclose(ablation.apply(variables, x), y, rtol=1e-12)


def test_a_pool_twice_counts_twice():
  x = random_features((2, 4, 4, 8), dtype=np.float32)
  once, twice = (ChannelAttention(reduction=2, pools=('max',) * n) for n in (1, 2))
  variables = random_variables(once, x)
  logits = [module.apply(variables, x, method='logits') for module in (once, twice)]
  np.testing.assert_allclose(2 * logits[0], logits[1], rtol=1e-6)


@pytest.mark.parametrize('train', [False, True])
def test_train_changes_nothing(train):
  x = random_features((2, 4, 4, 8), dtype=np.float32)
  for module in (ChannelAttention(reduction=2), SqueezeExcitation(reduction=2)):
    variables = random_variables(module, x)
    assert set(variables) == {'params'}
    np.testing.assert_array_equal(
      module.apply(variables, x, train=train), module.apply(variables, x)
    )


def test_lp_of_a_silenced_channel_has_a_finite_gradient(x64):
  # ReLU silences whole channels; the derivative of a square root at 0 is infinite.
  module = ChannelAttention(reduction=2, pools=('avg', 'lp'), param_dtype=jnp.float64)
  x = random_features((2, 4, 4, 8)).at[..., 3].set(0).at[1].set(0)
  variables = random_variables(module, x)

  def loss(variables, x):
    return jnp.sum(module.apply(variables, x) ** 2)

  for gradient in (jax.grad(loss, (0, 1)), jax.jit(jax.grad(loss, (0, 1)))):
    parameters, features = gradient(variables, x)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((parameters, features)))
    assert np.any(features[0, ..., 0])


@pytest.mark.parametrize('pools', [('lse',), ('lp',), ('max',)])
@pytest.mark.parametrize('scale', [1e-6, 1e4])
def test_large_and_small_features_stay_finite(pools, scale):
  # exp(1e4) overflows float32 unless the log-sum-exp is shifted.
  module = ChannelAttention(reduction=2, pools=pools)
  x = scale * random_features((2, 4, 4, 8), dtype=np.float32)
  variables = random_variables(module, x)
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(module.apply(variables, x)))(x)
  assert np.isfinite(value)
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('module', [ChannelAttention(), CBAM(), SqueezeExcitation()])
def test_hidden_layer_is_never_empty(module):
  x = random_features((2, 5, 5, 4), dtype=np.float32)
  params = random_variables(module, x, train=False)['params']
  params = params.get('channel', params)
  assert params['mlp']['fc1']['kernel'].shape == (4, 1)
  assert params['mlp']['fc2']['kernel'].shape == (1, 4)
