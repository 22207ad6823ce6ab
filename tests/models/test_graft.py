"""Attention grafted into plain networks: the same outputs, and gates that learn."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import cbam_jax
from cbam_jax import (
  BAM,
  CBAM,
  ChannelAttention,
  SpatialAttention,
  SqueezeExcitation,
  UserError,
  graft,
)
from cbam_jax.attention.cbam import ORDERS
from cbam_jax.models import mobilenet, vgg
from cbam_jax.models.graft import GATES
from cbam_jax.models.mobilenet import StageSpec
from tests.layers.random_variables import random_features, random_variables

# With hidden units enough that thin networks do not have all of them silent by chance.
ATTENTIONS = {
  'se': functools.partial(SqueezeExcitation, reduction=4),
  'bam': functools.partial(BAM, reduction=4),
  'bam_sum': functools.partial(BAM, reduction=4, combine='sum'),
  'channel': functools.partial(ChannelAttention, reduction=4),
  'spatial': functools.partial(SpatialAttention, pool='conv1x1'),
  'cbam_unbiased': functools.partial(CBAM, reduction=4, use_bias=False),
  **{f'cbam_{order}': functools.partial(CBAM, reduction=4, order=order) for order in ORDERS},
}

# Thin ones; a 32-fold ResNeXt thinner than this has groups without a channel.
WIDTHS = {
  'mobilenet_v1': 0.25,
  'wide_resnet18_1.5': 0.1875,
  'wide_resnet18_2.0': 0.25,
  'resnext50_32x4d': 0.25,
  'resnext101_32x4d': 0.25,
}

# One of each kind, with every sort of place that attention takes in it.
SHORT = {
  'resnet18': {'stage_sizes': (1, 1)},
  'resnet50': {'stage_sizes': (1, 1)},
  'mobilenet_v1': {},
  'vgg16': {'stage_sizes': (1, 1, 1, 1, 1)},
}


def make(name, attention='none', **fields):
  if name != 'vgg16':
    fields = {'width': WIDTHS.get(name, 0.125), **fields}
  return cbam_jax.create_model(name, attention=attention, num_classes=7, **fields)


@pytest.fixture(autouse=True)
def _small_vgg(monkeypatch):
  """Shrinks VGG's first dense layer, which has 100 million of its parameters, 49-fold."""
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)


def images(channels=3):
  return random_features((4, 64, 64, channels), dtype=np.float32)


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- what it computes ------------------------------------------------------------------------

fast = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.mark.slow
@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('name', cbam_jax.list_models())
def test_logits_of_every_network(name, attention):
  plain, model, x = make(name), make(name, ATTENTIONS[attention]), images()
  before = random_variables(plain, x, train=False)
  # Not compiled as a whole, which takes longer for the deep ones.
  assert_close(
    model.apply(graft(model, before), x, train=False), plain.apply(before, x, train=False)
  )


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'attention'), list(itertools.product(SHORT, ATTENTIONS)))
def test_it_starts_from_the_plain_network_and_every_gate_learns(name, attention, monkeypatch):
  stages = (StageSpec(64, 1, 1), StageSpec(128, 1, 2), StageSpec(256, 1, 2))
  monkeypatch.setattr(mobilenet, 'STAGES', stages)
  plain, x = make(name, **SHORT[name]), images()
  model = make(name, ATTENTIONS[attention], **SHORT[name])
  before = random_variables(plain, x, train=False)
  after = graft(model, before)
  weights = random_features((len(x), 7), seed=2, dtype=np.float32)

  @fast
  def logits_and_gradients(variables):
    def loss(params):
      trained, _ = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.sum(trained * weights), trained

    gradients, trained = jax.grad(loss, has_aux=True)(variables['params'])
    return model.apply(variables, x, train=False), trained, gradients

  evaluated, trained, gradients = logits_and_gradients(after)
  assert_close(evaluated, plain.apply(before, x, train=False))
  assert_close(trained, plain.apply(before, x, train=True, mutable=['batch_stats'])[0])
  norms = gate_gradients(model, gradients)
  assert min(norms.values()) > 1e-5 * max(norms.values())


def gate_gradients(model, gradients):
  """The norm of the gradient by each layer that `graft` has set to 0."""
  slot = 'attention' if model.attention is not None else 'stage_attention'
  module = getattr(model, slot)(name=slot)
  zeroed = tuple(f'/{slot}/{layer}' for layer in GATES[type(module)](module).zeroed)
  norms = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    layer = '/'.join(part.key for part in path[:-1])
    if layer.endswith(zeroed):
      norms[layer] = norms.get(layer, 0) + np.linalg.norm(leaf)
  return norms


@pytest.mark.slow
def test_both_slots_at_once():
  fields = {'stage_sizes': (1, 1)}
  plain, x = make('resnet18', **fields), images()
  model = make('resnet18', 'cbam', stage_attention=BAM, **fields)
  before = random_variables(plain, x, train=False)
  after = graft(model, before)
  assert_close(model.apply(after, x, train=False), plain.apply(before, x, train=False))


# ---- which values ----------------------------------------------------------------------------


@pytest.fixture
def small():
  """A plain network of two blocks, the same with CBAM, and variables of the plain one."""
  plain, model = (make('resnet18', a, stage_sizes=(1, 1)) for a in ('none', 'cbam'))
  return plain, model, random_variables(plain, images(), train=False)


def test_cbam_is_absorbed_by_the_norm_before_it(small):
  _, model, before = small
  after = graft(model, before)
  for stage in ('stage1', 'stage2'):
    was, now = before['params'][stage]['block1'], after['params'][stage]['block1']
    for leaf in ('scale', 'bias'):
      np.testing.assert_array_equal(now['norm2'][leaf], 4 * was['norm2'][leaf])
    attention = now.pop('attention')
    unchanged = now.keys() - {'norm2'}
    assert unchanged == was.keys() - {'norm2'}
    for layer in unchanged:
      jax.tree.map(np.testing.assert_array_equal, now[layer], was[layer])
    fc1, fc2 = attention['channel']['mlp']['fc1'], attention['channel']['mlp']['fc2']
    assert np.any(fc1['kernel'])
    assert not any(map(np.any, jax.tree.leaves((fc2, attention['spatial']['norm']))))
  for collection, name in (('params', 'stem'), ('params', 'head'), ('batch_stats', 'stem')):
    jax.tree.map(np.testing.assert_array_equal, after[collection][name], before[collection][name])


def test_what_is_not_zero_has_the_attentions_own_initial_values(small):
  _, model, before = small
  expected = jax.eval_shape(lambda: model.init(jax.random.key(0), images(), train=False))
  one, again, other = (graft(model, before, key=jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, again)
  jax.tree.map(np.testing.assert_array_equal, one, graft(model, before))
  assert jax.tree.structure(one) == jax.tree.structure(expected)
  assert jax.tree.map(jnp.result_type, one) == jax.tree.map(lambda leaf: leaf.dtype, expected)
  kernels = [
    variables['params'][stage]['block1']['attention']['spatial']['conv']['kernel']
    for variables in (one, other)
    for stage in ('stage1', 'stage2')
  ]
  for i, kernel in enumerate(kernels):
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / 49), rel=0.3)  # as for any convolution
    assert not any(np.array_equal(kernel, another) for another in kernels[:i])
  statistics = one['batch_stats']['stage1']['block1']['attention']['spatial']['norm']
  assert (statistics['mean'], statistics['var']) == (0, 1)


def test_types_are_the_models_and_images_may_be_grey():
  fields = {'stage_sizes': (1,), 'param_dtype': jnp.bfloat16}
  plain, model = (make('resnet18', a, **fields) for a in ('none', 'cbam'))
  before = jax.tree.map(np.float32, random_variables(plain, images(channels=1), train=False))
  after = graft(model, freeze(before))
  assert after['params']['stem']['conv']['kernel'].shape == (7, 7, 1, 64)
  assert {leaf.dtype for leaf in jax.tree.leaves(after['params'])} == {jnp.dtype(jnp.bfloat16)}
  assert {leaf.dtype for leaf in jax.tree.leaves(after['batch_stats'])} == {jnp.dtype('float32')}


# ---- what it refuses -------------------------------------------------------------------------


def test_variables_of_another_network_are_named(small):
  _, model, before = small
  del before['params']['stem']['norm']['bias'], before['batch_stats']['stem']
  before['params']['stage3'] = {'extra': np.zeros(2)}
  before['params']['head'] = {'kernel': np.zeros((16, 9)), 'bias': np.zeros(7)}
  with pytest.raises(UserError) as error:
    graft(model, before)
  assert str(error.value).splitlines()[1:-1] == [
    '  missing (3): batch_stats/stem/norm/mean, batch_stats/stem/norm/var, params/stem/norm/bias',
    '  left over (1): params/stage3/extra',
    '  of the wrong shape (1): params/head/kernel (16, 9) instead of (16, 7)',
  ]
  assert "attention='none'" in str(error.value)


def test_a_pytorch_state_dict_is_sent_to_from_torch(small):
  _, model, _ = small
  with pytest.raises(UserError, match='goes through from_torch first'):
    graft(model, {'conv1.weight': np.zeros((64, 3, 7, 7))})
  with pytest.raises(UserError, match='are of type list'):
    graft(model, [1, 2])


def test_only_a_known_attention_in_a_known_network(small):
  plain, _, before = small
  with pytest.raises(UserError, match=r"has no attention .* as in create_model\('resnet50'"):
    graft(plain, before)

  class Own(CBAM):
    """May do anything."""

  with pytest.raises(UserError, match=r'the attention is Own; .*CBAM, BAM'):
    graft(make('resnet18', Own), before)
  with pytest.raises(UserError, match=r'got Dense; .* Give a network of create_model'):
    graft(nn.Dense(3), before)
