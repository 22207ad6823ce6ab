import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import BAM, CBAM, SqueezeExcitation, UserError, create_model, list_models
from cbam_jax.layers import BatchNorm
from cbam_jax.models import ResNet
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first
from tests.models.networks import make


def parameters(model, side=32):
  """The paths of the parameters, as 'stage1/block1/conv1/kernel', and their shapes."""
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, side, side, 3)), train=False)
  )
  leaves = jax.tree_util.tree_leaves_with_path(variables['params'])
  return {'/'.join(part.key for part in path): leaf.shape for path, leaf in leaves}


def places(model, part='attention'):
  """The submodules of that name, in the order of their paths."""
  paths = [path.split('/') for path in parameters(model)]
  return sorted({'/'.join(path[: path.index(part)]) for path in paths if part in path})


def test_list_models():
  assert list_models() == [
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'wide_resnet18_1.5',
    'wide_resnet18_2.0',
    'wide_resnet50_2',
    'resnext50_32x4d',
    'resnext101_32x4d',
    'mobilenet_v1',
    'vgg16',
  ]


@pytest.mark.parametrize('attention', ['se', 'cbam'])
def test_places_of_block_attention(attention):
  assert places(make('resnet18', attention)) == [
    f'stage{i}/block{b}' for i in (1, 2, 3, 4) for b in (1, 2)
  ]
  mobilenet = [
    f'stage{i}/block{b}/{unit}'
    for i, blocks in enumerate((1, 2, 2, 6, 2), 1)
    for b in range(1, blocks + 1)
    for unit in ('depthwise', 'pointwise')
  ]
  assert places(make('mobilenet_v1', attention)) == [*mobilenet, 'stem']
  assert len(mobilenet) + 1 == 27
  assert places(make('vgg16', attention)) == [f'stage{i}' for i in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
  'attention',
  first(1, ['bam', BAM, functools.partial(BAM, combine='sum'), lambda: BAM(combine='sum')]),
  ids=['name', 'class', 'partial', 'nameless'],
)
@pytest.mark.parametrize(
  ('name', 'stages'), [('resnet18', (1, 2, 3)), ('mobilenet_v1', (2, 3, 4)), ('vgg16', (3, 4, 5))]
)
def test_bam_stands_between_stages(attention, name, stages):
  model = make(name, attention)
  assert places(model, 'stage_attention') == [f'stage{i}' for i in stages]
  assert places(model, 'attention') == []


def test_fields_of_a_partial_are_used():
  model = make('resnet18', functools.partial(BAM, combine='sum'))
  assert model.stage_attention(name='bam').combine == 'sum'
  assert make('resnet18', 'bam').stage_attention(name='bam').combine == 'product'
  for attention in (functools.partial(CBAM, reduction=8), lambda: CBAM(reduction=8)):
    shapes = parameters(make('resnet18', attention))
    assert shapes['stage1/block1/attention/channel/mlp/fc1/kernel'] == (64, 8)


class Scale(nn.Module):
  """An attention that a user may write: one factor for everything."""

  @nn.compact
  def __call__(self, x, *, train):
    return x * self.param('scale', nn.initializers.constant(0.5), ())


def named(name):
  return Scale(name=name)


@pytest.mark.parametrize(
  ('attention', 'path'),
  [
    (Scale, 'attention/scale'),
    (functools.partial(Scale), 'attention/scale'),
    (named, 'attention/scale'),
    (lambda name: Scale(name=name), 'attention/scale'),
    (lambda: Scale(), 'attention/scale'),
    (lambda: CBAM(reduction=8), 'attention/spatial/conv/kernel'),
  ],
  ids=['class', 'partial', 'function', 'lambda', 'nameless', 'nameless_cbam'],
)
def test_users_attention_goes_into_every_block(attention, path):
  plain, refined = parameters(make('resnet18')), parameters(make('resnet18', attention))
  assert set(plain) < set(refined)
  assert sum(added.endswith('/' + path) for added in set(refined) - set(plain)) == 8


@pytest.mark.parametrize(('name', 'count'), [('resnet50', 16), ('mobilenet_v1', 27), ('vgg16', 5)])
def test_users_attention_goes_into_every_network(name, count):
  plain, refined = parameters(make(name)), parameters(make(name, Scale))
  added = set(refined) - set(plain)
  assert len(added) == count
  assert all(path.endswith('/attention/scale') for path in added)


def test_users_attention_refines():
  # The stage's residual branch is halved, which a factor of 1 undoes.
  x = random_features((2, 16, 16, 3), dtype=np.float32)
  plain = make('resnet18', stem='cifar', stage_sizes=(1,))
  refined = make('resnet18', Scale, stem='cifar', stage_sizes=(1,))
  variables = random_variables(refined, x, train=False)
  block = variables['params']['stage1']['block1']
  outputs = []
  for scale in (0.5, 1.0):
    block['attention']['scale'] = jnp.float32(scale)
    outputs.append(refined.apply(variables, x, train=False))
  del block['attention']
  np.testing.assert_allclose(plain.apply(variables, x, train=False), outputs[1], rtol=1e-6)
  assert np.max(np.abs(outputs[0] - outputs[1])) > 1e-2


@pytest.mark.parametrize('attention', ['se', 'bam', 'cbam'])
@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenet_v1', 'vgg16'])
def test_group_size_is_handed_to_every_norm(name, attention):
  model = make(name, attention, group_size=2)
  sizes = []

  def note(call, args, kwargs, context):
    if isinstance(context.module, BatchNorm) and context.method_name == 'affine':
      sizes.append(context.module.group_size)
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    paths = parameters(model)
  norms = [path for path in paths if path.endswith('/scale')]
  assert sizes == [2] * len(norms)


def test_group_size_of_a_partial_wins():
  model = make('resnet18', functools.partial(CBAM, group_size=8), group_size=2)
  assert model.group_size == 2
  assert model.attention(name='attention').group_size == 8
  assert make('resnet18', CBAM, group_size=2).attention(name='attention').group_size == 2
  assert make('resnet18', SqueezeExcitation, group_size=2).attention(name='a').reduction == 16


def test_param_dtype_is_handed_to_the_attention(x64):
  for attention in ('se', 'bam', 'cbam', functools.partial(CBAM, reduction=8)):
    model = make('resnet18', attention, param_dtype=jnp.float64)
    variables = jax.eval_shape(
      lambda model=model: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float64')}


# Each message names the value, says what is allowed, and what to do.
@pytest.mark.parametrize(
  ('call', 'parts'),
  [
    (lambda: create_model('resnet5'), ["'resnet5'", 'resnet18, resnet34', 'mean', "'resnet50'"]),
    (lambda: create_model('ResNet50'), ["'ResNet50'", 'vgg16', "mean 'resnet50'"]),
    (lambda: create_model('mobilenet'), ["'mobilenet'", "mean 'mobilenet_v1'"]),
    (lambda: create_model('xyz'), ["'xyz'", 'allowed: resnet18']),
    (lambda: create_model(None), ['None', 'allowed: resnet18']),
    (lambda: make('resnet18', 'cbma'), ["'cbma'", 'none, se, bam, cbam', "mean 'cbam'"]),
    (lambda: make('resnet18', 'eca'), ["'eca'", 'none, se, bam, cbam']),
    (lambda: make('resnet18', None), ['None', 'none, se, bam, cbam', 'callable']),
    (lambda: make('resnet18', 3), ['is 3', 'none, se, bam, cbam', 'callable']),
    (lambda: make('resnet18', ['cbam']), ["['cbam']", 'none, se, bam, cbam', 'callable']),
    (lambda: make('resnet18', lambda: 3), ['int', 'linen module', '(x, *, train)']),
    (lambda: make('resnet18', nn.Dense), ['linen module', '(x, *, train)']),
    (lambda: create_model('resnet18', num_class=3), ["'num_class'", "mean 'num_classes'"]),
    (lambda: create_model('vgg16', width=2), ["vgg16 has no option 'width'", 'num_classes']),
    (lambda: create_model('resnet18', reduction=8), ["'reduction'", 'num_classes']),
    (lambda: create_model('resnet18', num_classes=0), ['0', 'at least 1']),
    (lambda: create_model('resnet18', num_classes=2.5), ['2.5', 'integer']),
    (lambda: create_model('resnet18', num_classes=True), ['True', 'integer']),
    (lambda: create_model('resnet18', group_size=0), ['group_size is 0', 'at least 1']),
    (lambda: create_model('resnet18', dtype=jnp.int32), ["dtype 'int32'", 'float32']),
    (lambda: ResNet(stage_sizes=()), ['stage_sizes', '(2, 2, 2, 2)']),
    (lambda: ResNet(stage_sizes=(2, 0)), ['stage_sizes', 'is 0']),
    (
      lambda: ResNet(bottleneck=True, groups=32, group_width=1, width=0.5),
      ['width=0.5', 'group_width=1'],
    ),
    (lambda: create_model('resnet18', stem='cifar10'), ["'cifar10'", "mean 'cifar'"]),
    (lambda: create_model('mobilenet_v1', width=0.01), ['0.01', 'at least 1/32', '0.7']),
    (lambda: create_model('mobilenet_v1', width='wide'), ["'wide'", 'at least 1/32', '0.7']),
    (lambda: create_model('mobilenet_v1', width=True), ['width is True', 'at least 1/32']),
    (lambda: create_model('resnet18', width=0), ['is 0', 'at least 1/64', '1.5']),
    (lambda: create_model('resnet18', width=np.complex64(2)), ['width is', 'at least 1/64']),
    (lambda: make('resnet18', 'bam', stage_attention=BAM), ['both', 'stage_attention', 'one of']),
    # A module instead of what makes one.
    (lambda: make('resnet18', CBAM()), ['CBAM', 'functools.partial']),
    (lambda: make('resnet18', lambda channels: CBAM()), ['channels', 'without arguments']),
    (lambda: make('resnet18', functools.partial(CBAM, reductoin=8)), ['reductoin']),
    (lambda: make('resnet18', functools.partial(CBAM, reduction=0)), ['reduction=0', 'at least 1']),
  ],
)
def test_bad_calls(call, parts):
  with pytest.raises(UserError) as error:
    call()
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('images', 'parts'),
  [
    (np.ones((32, 32, 3), np.float32), ['rank 3', '(32, 32, 3)', 'rank 4', 'x[None]']),
    (np.ones((1, 2, 32, 32, 3), np.float32), ['rank 5', 'rank 4']),
    (np.ones((1, 32, 32, 3), np.uint8), ['uint8', 'floating point', 'astype(jnp.float32) / 255']),
    (np.ones((1, 0, 32, 3), np.float32), ['(1, 0, 32, 3)', 'larger inputs']),
  ],
  ids=['rank3', 'rank5', 'uint8', 'no_extent'],
)
@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v1', 'vgg16'])
@pytest.mark.parametrize('method', ['__call__', 'features'])
def test_bad_images(images, parts, name, method):
  model = make(name)
  with pytest.raises(UserError) as error:
    jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False, method=method))
  for part in [type(model).__name__, *parts]:
    assert part in str(error.value)
