import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import CBAM, create_model
from cbam_jax.errors import UserError
from cbam_jax.models.description import describe, from_description
from tests.attention import definitions
from tests.layers.random_variables import random_features, random_variables

ORDERS = ['channel_first', 'spatial_first', 'parallel', 'channel_only', 'spatial_only']


@pytest.mark.parametrize('shape', [(3, 10, 8), (3, 9, 8, 8), (3, 5, 4, 6, 8)])
@pytest.mark.parametrize('order', ORDERS)
def test_definition(shape, order, x64):
  module = CBAM(reduction=2, order=order, param_dtype=jnp.float64)
  x = random_features(shape)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  tree = jax.tree.map(np.asarray, variables)
  # `channel_only` has no statistics.
  expected = definitions.cbam(np.asarray(x), tree['params'], tree.get('batch_stats'), order)
  np.testing.assert_allclose(y, expected, rtol=1e-11)


def test_fields_reach_the_parts(x64):
  x = random_features((3, 9, 8, 8))
  module = CBAM(
    reduction=4,
    pools=['lse', 'lp'],
    spatial_pool='conv1x1',
    spatial_kernel=3,
    use_bias=False,
    param_dtype=jnp.float64,
  )
  variables = random_variables(module, x, train=False)
  assert jax.tree.map(jnp.shape, variables['params']) == {
    'channel': {'mlp': {'fc1': {'kernel': (8, 2)}, 'fc2': {'kernel': (2, 8)}}},
    'spatial': {
      'reduce': {'kernel': (1, 1, 8, 1)},
      'conv': {'kernel': (3, 3, 1, 1)},
      'norm': {'scale': (1,), 'bias': (1,)},
    },
  }
  params, stats = (jax.tree.map(np.asarray, variables[name]) for name in ('params', 'batch_stats'))
  expected = np.asarray(x)
  expected = expected * definitions.sigmoid(
    definitions.channel_logits(expected, params['channel'], ('lse', 'lp'))
  )
  expected = expected * definitions.sigmoid(
    definitions.spatial_logits(expected, params['spatial'], stats['spatial'], 'conv1x1')
  )
  np.testing.assert_allclose(module.apply(variables, x, train=False), expected, rtol=1e-11)


@pytest.mark.parametrize('order', ['channel_first', 'spatial_first', 'parallel', 'spatial_only'])
def test_group_size_reaches_the_spatial_norm(order, x64):
  x = random_features((4, 6, 6, 8))
  whole = CBAM(reduction=2, order=order, param_dtype=jnp.float64)
  variables = random_variables(whole, x, train=True)

  @functools.partial(jax.jit, static_argnums=0)
  def run(module, x):
    return module.apply(variables, x, train=True, mutable=['batch_stats'])[0]

  apart = jnp.concatenate([run(whole, x[:2]), run(whole, x[2:])])
  np.testing.assert_allclose(run(whole.clone(group_size=2), x), apart, rtol=1e-11)


@pytest.mark.parametrize(
  ('module', 'count'),
  [
    # MLP 64 to 4 to 64: 64 * 4 + 4 + 4 * 64 + 64 = 580; 7 * 7 * 2 and a norm of 2: 100.
    (CBAM(), 580 + 100),
    (CBAM(order='parallel'), 680),
    (CBAM(order='spatial_first'), 680),
    (CBAM(order='channel_only'), 580),
    (CBAM(order='spatial_only'), 100),
    (CBAM(use_bias=False), 512 + 100),
    (CBAM(reduction=8), 64 * 8 + 8 + 8 * 64 + 64 + 100),
    (CBAM(pools=('avg',)), 680),
    (CBAM(spatial_kernel=3), 580 + 3 * 3 * 2 + 2),
    # 1x1 from 64 to 1, then 7x7 from 1 to 1.
    (CBAM(spatial_pool='conv1x1'), 580 + 64 + 49 + 2),
  ],
  ids=repr,
)
def test_parameter_count(module, count):
  params = random_variables(module, jnp.ones((2, 8, 8, 64)), train=False)['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    return x + CBAM(reduction=16)(x, train=train)


def test_inside_a_users_module():
  x = random_features((2, 6, 6, 32), dtype=np.float32)
  variables = random_variables(Block(), x, train=False)
  assert set(variables['params']) == {'CBAM_0'}
  step = functools.partial(Block().apply, train=True, mutable=['batch_stats'])
  y, updates = jax.eval_shape(step, variables, x)
  assert y.shape == x.shape
  assert set(updates['batch_stats']['CBAM_0']) == {'spatial'}


def test_numbers_may_be_numpys_and_pools_a_list():
  made = functools.partial(
    CBAM, reduction=np.int64(8), spatial_kernel=np.int64(3), norm_momentum=np.float64(0.5)
  )
  module = made(pools=['avg', 'max'])
  assert module == CBAM(reduction=8, spatial_kernel=3, norm_momentum=0.5)
  assert hash(module) == hash(CBAM(reduction=8, spatial_kernel=3, norm_momentum=0.5))
  network = create_model('resnet18', attention=made, num_classes=np.int64(10))
  assert from_description(json.loads(json.dumps(describe(network)))).attention() == made()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'reduction': True}, r'CBAM\(reduction=True\)|ChannelAttention\(reduction=True\)'),
    ({'spatial_kernel': True}, 'kernel_size .* is True; .* positive odd'),
    ({'spatial_kernel': 4}, 'kernel_size .* is 4; .* positive odd'),
    ({'use_bias': 'no'}, "use_bias is 'no'; it must be True or False"),
    ({'group_size': '2'}, "group_size is '2'; it must be an integer"),
    ({'dtype': jnp.int32}, "has dtype 'int32'; it must be floating"),
  ],
)
def test_fields_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    CBAM(**fields)
