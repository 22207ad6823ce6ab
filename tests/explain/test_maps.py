import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import (
  BAM,
  CBAM,
  ChannelAttention,
  SpatialAttention,
  SqueezeExcitation,
  UserError,
  create_model,
)
from cbam_jax.explain import attention_maps
from cbam_jax.models import vgg
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first
from tests.models.networks import ALL, image_shape, make

ORDERS = ['channel_first', 'spatial_first', 'parallel', 'channel_only', 'spatial_only']
SHAPES = [(2, 5, 6, 8), (2, 7, 8), (2, 3, 4, 2, 8)]


def features_and_maps(module, shape=(2, 5, 6, 8)):
  """Features, what `module` makes of them, and its maps; each alone in (0, 1)."""
  x = random_features(shape, dtype=np.float32)
  variables = random_variables(module, x, train=False)
  (maps,) = jax.jit(functools.partial(attention_maps, module))(variables, x).values()
  for values in maps.values():
    assert values.dtype == jnp.float32
    assert np.all((values > 0) & (values < 1))
  return np.asarray(x), module.apply(variables, x, train=False), jax.tree.map(np.asarray, maps)


def over_positions(channel, x):
  return channel.reshape(channel.shape[0], *(1,) * (x.ndim - 2), channel.shape[1])


# ---- each attention, multiplied out ------------------------------------------------------------


@pytest.mark.parametrize('order', ORDERS)
@pytest.mark.parametrize('shape', first(1, SHAPES))
def test_cbam_is_its_input_times_its_maps(order, shape):
  x, y, maps = features_and_maps(CBAM(reduction=2, order=order), shape)
  parts = {'channel_only': {'channel'}, 'spatial_only': {'spatial'}}
  assert maps.keys() == parts.get(order, {'channel', 'spatial'})
  if 'channel' in maps:
    assert maps['channel'].shape == (shape[0], shape[-1])
    maps['channel'] = over_positions(maps['channel'], x)
  if 'spatial' in maps:
    assert maps['spatial'].shape == shape[:-1]
    maps['spatial'] = maps['spatial'][..., None]
  if order == 'parallel':
    logit = sum(np.log(values / (1 - values)) for values in maps.values())
    factor = 1 / (1 + np.exp(-logit))
  else:
    factor = functools.reduce(np.multiply, maps.values())
  np.testing.assert_allclose(x * factor, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
def test_squeeze_excitation_is_its_input_times_its_map(shape):
  x, y, maps = features_and_maps(SqueezeExcitation(reduction=2), shape)
  assert maps.keys() == {'channel'}
  np.testing.assert_allclose(x * over_positions(maps['channel'], x), y, rtol=1e-5)


@pytest.mark.parametrize('combine', ['product', 'sum'])
@pytest.mark.parametrize('shape', first(1, SHAPES))
def test_bam_is_its_input_times_one_and_its_map(combine, shape):
  x, y, maps = features_and_maps(BAM(reduction=2, combine=combine), shape)
  assert {name: values.shape for name, values in maps.items()} == {'joint': shape}
  np.testing.assert_allclose(x * (1 + maps['joint']), y, rtol=1e-5)


@pytest.mark.parametrize(
  ('make', 'name'), [(ChannelAttention, 'channel'), (SpatialAttention, 'spatial')]
)
def test_a_part_alone(make, name):
  x, y, maps = features_and_maps(make())
  factor = maps[name][:, None, None] if name == 'channel' else maps[name][..., None]
  np.testing.assert_allclose(x * factor, y, rtol=1e-5)


@pytest.mark.parametrize('make', [CBAM, SqueezeExcitation, BAM])
def test_maps_are_float32_under_bfloat16_and_float64_under_float64(make, x64):
  for dtype, expected in ((jnp.bfloat16, 'float32'), (jnp.float64, 'float64')):
    x = random_features((2, 4, 4, 8), dtype=dtype)
    variables = random_variables(make(), x, train=False)
    shapes = jax.eval_shape(functools.partial(attention_maps, make()), variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(expected)}


# ---- in networks -------------------------------------------------------------------------------


def resnet(implementation, **fields):
  attention = functools.partial(CBAM, implementation=implementation, reduction=4)
  fields = {'stem': 'cifar', 'stage_sizes': (2, 1), 'width': 0.25, 'num_classes': 5, **fields}
  return create_model('resnet18', attention=attention, **fields)


@pytest.mark.slow
@pytest.mark.parametrize('remat', [False, True])
def test_plain_and_fused_have_the_maps_that_refine_every_block(remat):
  images = random_features((3, 12, 12, 3), dtype=np.float32)
  plain, fused = resnet('plain'), resnet('xla', remat=remat)
  variables = random_variables(plain, images, train=False)
  _, captured = jax.jit(
    functools.partial(
      plain.apply, train=False, capture_intermediates=True, mutable=['intermediates']
    )
  )(variables, images)
  maps = jax.jit(functools.partial(attention_maps, fused))(variables, images)
  expected = jax.jit(functools.partial(attention_maps, plain))(variables, images)
  blocks = ['stage1/block1', 'stage1/block2', 'stage2/block1']
  assert list(maps) == list(expected) == [f'{block}/attention' for block in blocks]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), maps, expected)

  for block in blocks:
    stage, name = block.split('/')
    seen = captured['intermediates'][stage][name]
    # A convolution's own result is the normalised one.
    (normalised,), (refined,) = seen['conv2']['__call__'], seen['attention']['__call__']
    found = maps[f'{block}/attention']
    product = normalised * found['channel'][:, None, None] * found['spatial'][..., None]
    np.testing.assert_allclose(product, refined, rtol=1e-4, atol=1e-6)


COUNTS = {
  **{f'resnet{depth}': blocks for depth, blocks in ((18, 8), (34, 16), (50, 16), (101, 33))},
  **{'resnet152': 50, 'wide_resnet18_1.5': 8, 'wide_resnet18_2.0': 8, 'wide_resnet50_2': 16},
  **{'resnext50_32x4d': 16, 'resnext101_32x4d': 33, 'mobilenet_v1': 27, 'vgg16': 5},
}
QUICK = [('resnet18', 'bam'), ('vgg16', 'cbam')]


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id='-'.join(case))
    for case in ALL
  ],
)
def test_every_network(name, attention, monkeypatch):
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)
  model = make(name, attention)
  images = jax.ShapeDtypeStruct(image_shape(name), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  features = functools.partial(model.apply, train=False, method='features')
  stages = jax.eval_shape(features, variables, images)
  maps = jax.eval_shape(functools.partial(attention_maps, model), variables, images)

  assert len(maps) == {'none': 0, 'bam': 3}.get(attention, COUNTS[name])
  for path, found in maps.items():
    assert path.endswith('stage_attention' if attention == 'bam' else 'attention')
    kinds = {'cbam': {'channel', 'spatial'}, 'se': {'channel'}, 'bam': {'joint'}}
    assert found.keys() == kinds[attention]
    n, *side, c = stages.get(path.split('/')[0], jnp.zeros((3, 28, 28, 32))).shape
    if attention == 'bam':
      assert found['joint'].shape == (n, *side, c)
    elif name != 'mobilenet_v1':  # whose depthwise convolutions have their input's channels
      assert found['channel'].shape == (n, c)
    if attention == 'cbam':
      assert found['spatial'].shape == (n, *side)


# ---- in modules of one's own -------------------------------------------------------------------


class Loud(CBAM):
  """A subclass, which no network fuses."""


class LoudParts(nn.Module):
  """Attention and parts of it under names of their own, one of them called twice."""

  @nn.compact
  def __call__(self, x, *, train):
    x = Loud(reduction=2, name='whole')(x, train=train)
    x = ChannelAttention(reduction=2, name='what')(x)
    where = SpatialAttention(name='where')
    return where(where(x, train=train), train=train)


def test_subclasses_and_parts_in_any_module():
  x = random_features((2, 4, 4, 8), dtype=np.float32)
  variables = random_variables(LoudParts(), x, train=False)
  maps = attention_maps(LoudParts(), variables, x)
  assert {path: set(found) for path, found in maps.items()} == {
    'whole': {'channel', 'spatial'},
    'what': {'channel'},
    'where': {'spatial'},
  }
  # The last call of `where` is what made the output out of what the others leave.
  for found in (maps['whole'], maps['what']):
    x = x * found['channel'][:, None, None]
    x = x * found['spatial'][..., None] if 'spatial' in found else x
  where = {name: tree['where'] for name, tree in variables.items()}
  x = SpatialAttention().apply(where, x, train=False)
  y = LoudParts().apply(variables, random_features((2, 4, 4, 8), dtype=np.float32), train=False)
  np.testing.assert_allclose(x * maps['where']['spatial'][..., None], y, rtol=1e-4, atol=1e-6)


def test_a_network_without_attention_has_no_maps():
  x = jnp.ones((2, 4))
  variables = nn.Sequential([nn.Dense(3)]).init(jax.random.key(0), x)

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      return nn.Dense(3, name='layers_0')(x)

  assert attention_maps(Plain(), variables, x) == {}


def test_images_that_cannot_be_used_are_refused():
  with pytest.raises(UserError, match='rank 3'):
    attention_maps(resnet('auto'), {}, jnp.zeros((8, 8, 3)))
