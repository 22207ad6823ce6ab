import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import create_model
from cbam_jax.errors import UserError
from cbam_jax.layers import BatchNorm, Conv, any_platform, convolution
from tests.layers.random_variables import random_features, random_variables

SPATIAL = (11, 8, 6)
"""Odd and even: at stride 2, 'SAME' would pad the even ones on one side only."""


def convolve(x, kernel, strides, dilation):
  """The definition: pad both sides alike, then a sum over the kernel's taps."""
  *sizes, _, features = kernel.shape
  spans = [dilation * (size - 1) for size in sizes]
  padded = np.pad(x, [(0, 0), *((span // 2, span // 2) for span in spans), (0, 0)])
  y = np.zeros((*x.shape[:-1], features))
  for tap in itertools.product(*map(range, sizes)):
    starts = [dilation * t for t in tap]
    windows = (slice(s, s + n) for s, n in zip(starts, x.shape[1:-1], strict=True))
    y += padded[(slice(None), *windows)] @ kernel[tap]
  return y[(slice(None), *(slice(None, None, strides) for _ in sizes))]


@pytest.mark.parametrize('axes', [1, 2, 3])
@pytest.mark.parametrize('size', [1, 3, 7])
@pytest.mark.parametrize(('strides', 'dilation'), [(1, 1), (2, 1), (3, 4)])
def test_against_the_definition(axes, size, strides, dilation, x64):
  conv = Conv(4, (size,) * axes, strides, dilation, use_bias=True, param_dtype=jnp.float64)
  x = random_features((2, *SPATIAL[:axes], 3))
  variables = random_variables(conv, x)
  params = {name: np.asarray(value) for name, value in variables['params'].items()}
  y = conv.apply(variables, x)
  expected = convolve(np.asarray(x), params['kernel'], strides, dilation) + params['bias']
  assert y.shape == expected.shape
  np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
  ('size', 'groups', 'strides'), [(1, 1, 1), (1, 1, 2), (1, 6, 2), (3, 1, 2), (3, 6, 1), (7, 2, 2)]
)
def test_against_linen(size, groups, strides, x64):
  x = random_features((2, 9, 8, 6))
  ours = Conv(12, (size, size), strides, groups=groups, use_bias=True, param_dtype=jnp.float64)
  theirs = nn.Conv(
    12,
    (size, size),
    strides,
    padding=[((size - 1) // 2,) * 2] * 2,
    feature_group_count=groups,
    param_dtype=jnp.float64,
  )
  variables = random_variables(theirs, x)
  assert jax.tree.map(jnp.shape, random_variables(ours, x)) == jax.tree.map(jnp.shape, variables)

  def loss(module, variables):
    y = module.apply(variables, x)
    return jnp.sum(y**2), y

  (_, y), gradients = jax.jit(jax.value_and_grad(lambda v: loss(ours, v), has_aux=True))(variables)
  (_, expected_y), expected = jax.jit(jax.value_and_grad(lambda v: loss(theirs, v), has_aux=True))(
    variables
  )
  np.testing.assert_allclose(y, expected_y, rtol=1e-11, atol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), gradients, expected)


@pytest.mark.parametrize('axes', [1, 2, 3])
@pytest.mark.parametrize('strides', [1, 2])
def test_1x1_is_a_matrix_product_on_a_cpu(axes, strides):
  conv = Conv(4, (1,) * axes, strides)
  x = jnp.ones((2, *SPATIAL[:axes], 3))
  on_a_cpu = lowered(conv, x, 'cpu')
  assert 'dot_general' in on_a_cpu
  assert 'stablehlo.convolution' not in on_a_cpu
  # XLA for GPUs (of jaxlib 0.10.2) aborts on products with stepping operands in a train step.
  on_a_gpu = lowered(conv, x, 'cuda')
  assert 'dot_general' not in on_a_gpu
  assert 'stablehlo.convolution' in on_a_gpu


def lowered(conv, x, platform):
  apply = jax.jit(functools.partial(conv.apply, random_variables(conv, x)))
  return apply.trace(x).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(('size', 'groups'), [(3, 1), (1, 3)])
def test_others_are_convolutions(size, groups):
  conv = Conv(6, (size, size), groups=groups)
  x = jnp.ones((2, 5, 5, 3))
  jaxpr = str(jax.make_jaxpr(conv.apply)(random_variables(conv, x), x))
  assert 'conv_general_dilated' in jaxpr


def test_parameters():
  x = jnp.ones((2, 8, 8, 6), jnp.bfloat16)
  with_bias = random_variables(Conv(4, (3, 5), groups=2, use_bias=True), x)['params']
  assert jax.tree.map(jnp.shape, with_bias) == {'kernel': (3, 5, 3, 4), 'bias': (4,)}
  assert {leaf.dtype for leaf in with_bias.values()} == {jnp.dtype('float32')}
  assert set(random_variables(Conv(4, (3, 3)), x)['params']) == {'kernel'}


@pytest.mark.parametrize('size', [1, 3])
def test_types(size):
  x = jnp.ones((2, 8, 8, 6), jnp.bfloat16)
  conv = Conv(4, (size, size), use_bias=True)
  variables = random_variables(conv, x)
  assert conv.apply(variables, x).dtype == jnp.bfloat16
  assert conv.clone(dtype=jnp.float32).apply(variables, x).dtype == jnp.float32


def test_initial_values():
  # Kaiming, fan out: a variance of 2 / (kernel positions * features).
  variables = Conv(64, (3, 3), use_bias=True).init(jax.random.key(0), jnp.ones((1, 4, 4, 128)))
  kernel = np.asarray(variables['params']['kernel'], np.float64)
  assert abs(kernel.mean()) < 1e-3
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.01)
  np.testing.assert_array_equal(variables['params']['bias'], np.zeros(64))


def test_initial_values_of_a_depthwise_convolution():
  # PyTorch's fan out is that of the kernel's whole array, whatever the groups.
  conv = Conv(512, (3, 3), groups=512)
  kernel = conv.init(jax.random.key(0), jnp.ones((1, 4, 4, 512)))['params']['kernel']
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 512)), rtol=0.05)


class Normalized(nn.Module):
  conv: Conv
  norm: BatchNorm
  apart: bool = False

  def __call__(self, x, *, train):
    if self.apart:
      return self.norm(self.conv(x), train=train)
    return self.conv(x, self.norm, train=train)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
  """Takes what a GPU would compute, on the CPU."""
  monkeypatch.setattr(
    convolution,
    'by_platform',
    lambda *inputs, default, cpu=None, cuda=None: (cuda or default)(*inputs),
  )


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('use_bias', [False, True])
@pytest.mark.parametrize(
  ('size', 'groups', 'strides', 'channels'),
  [(1, 1, 1, 6), (1, 1, 2, 6), (3, 1, 1, 6), (3, 6, 2, 6), (7, 2, 2, 6), (7, 1, 2, 3)],
)
@pytest.mark.usefixtures('as_on_a_gpu')
def test_with_a_norm(size, groups, strides, channels, use_bias, train, x64):
  x = random_features((4, 9, 8, channels))
  conv = Conv(12, (size, size), strides, groups=groups, use_bias=use_bias, param_dtype=jnp.float64)
  norm = BatchNorm(param_dtype=jnp.float64)
  variables = random_variables(Normalized(conv, norm), x, train=False)

  def result(apart):
    module = Normalized(conv, norm, apart)
    return module.apply(variables, x, train=train, mutable=['batch_stats'])

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
    result(False),
    result(True),
  )


def test_a_gpu_normalizes_within_the_convolution():
  module = Normalized(Conv(12, (3, 3)), BatchNorm())
  x = jnp.ones((4, 9, 8, 6))
  variables = random_variables(module, x, train=False)
  apply = jax.jit(functools.partial(module.apply, variables, train=False))
  text = apply.trace(x).lower(lowering_platforms=('cuda',)).as_text()
  assert 'multiply' in text
  assert not re.search(r'multiply.*tensor<4x9x8x12xf32>', text)


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    pytest.param('resnet18', 'cbam', marks=pytest.mark.slow),
    pytest.param('resnet18', 'bam', marks=pytest.mark.slow),
    pytest.param('mobilenet_v1', 'cbam', marks=pytest.mark.slow),
    pytest.param('resnext50_32x4d', 'se', marks=pytest.mark.slow),
  ],
)
def test_networks_are_the_same_on_a_gpu(name, attention, monkeypatch, request, x64):
  model = create_model(
    name, attention=attention, num_classes=10, dtype=jnp.float64, param_dtype=jnp.float64
  )
  x = random_features((2, 64, 64, 3))
  variables = random_variables(model, x, train=False)
  on_a_cpu = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  request.getfixturevalue('as_on_a_gpu')
  on_a_gpu = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  np.testing.assert_allclose(on_a_gpu, on_a_cpu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('axes', [1, 3])
@pytest.mark.usefixtures('as_on_a_gpu')
def test_with_a_norm_over_other_axes(axes, x64):
  x = random_features((2, *SPATIAL[:axes], 3))
  conv = Conv(4, (3,) * axes, dilation=2, param_dtype=jnp.float64)
  norm = BatchNorm(param_dtype=jnp.float64)
  variables = random_variables(Normalized(conv, norm), x, train=False)
  inside, apart = (Normalized(conv, norm, a).apply(variables, x, train=False) for a in (0, 1))
  np.testing.assert_allclose(inside, apart, rtol=1e-10, atol=1e-12)


def test_the_type_is_the_norms():
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 6))
  module = Normalized(Conv(4, (3, 3), dtype=jnp.bfloat16), BatchNorm(dtype=jnp.float32))
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  assert y.dtype == jnp.float32
  apart = module.clone(apart=True).apply(variables, x, train=False)
  np.testing.assert_array_equal(y, apart)


def test_another_norm_is_called():
  class Doubled(BatchNorm):
    def __call__(self, x, *, train):
      return 2 * super().__call__(x, train=train)

  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 6))
  module = Normalized(Conv(4, (3, 3)), BatchNorm())
  variables = random_variables(module, x, train=False)
  doubled = module.clone(norm=Doubled()).apply(variables, x, train=False)
  np.testing.assert_allclose(doubled, 2 * module.apply(variables, x, train=False), rtol=1e-6)


def test_a_norm_needs_to_be_told():
  with pytest.raises(UserError, match='train=True or train=False'):
    Conv(4, (3, 3)).init(jax.random.key(0), jnp.ones((2, 5, 5, 6)), BatchNorm())


@pytest.mark.parametrize(('features', 'size', 'strides'), [(8, 3, 2), (1, 5, 1)])
def test_few_channels_and_any_size(features, size, strides):
  conv, x = Conv(features, (size, size), strides), jnp.ones((1, 9, 12, 3))
  variables = random_variables(conv, x)
  assert conv.apply(variables, x).shape[0] == 1
  height, width = jax.export.symbolic_shape('h, w')
  symbolic = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  exported = jax.export.export(jax.jit(conv.apply), platforms=('cpu', 'cuda'))(variables, symbolic)
  np.testing.assert_allclose(exported.call(variables, x), conv.apply(variables, x), rtol=1e-5)


def test_any_platform_holds_no_choice():
  model = create_model('resnet18', attention='cbam', num_classes=10)
  x = jnp.ones((1, 64, 64, 3))
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

  def jaxpr():
    return str(jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, x))

  assert 'platform_index' in jaxpr()
  with any_platform():
    assert 'platform_index' not in jaxpr()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'kernel_size': (3, 4)}, r'kernel_size is \(3, 4\); every side must be odd'),
    ({'strides': -1}, 'strides is -1; it must be an integer of at least 1'),
    ({'groups': 3}, 'groups=3 do not divide its features=8'),
    ({'dtype': jnp.int8}, "Conv has dtype 'int8'"),
    ({'dtype': 'banana'}, "Conv has dtype 'banana'"),
    ({'kernel_size': 3}, r'kernel_size is 3; .* each spatial axis, as \(3, 3\)'),
  ],
)
def test_fields_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    Conv(**{'features': 8, 'kernel_size': (3, 3)} | fields)


def test_kernels_may_be_boxed():
  init = nn.with_partitioning(nn.initializers.ones, (None, None, None, 'model'))
  conv, x = Conv(8, (3, 3), kernel_init=init), jnp.ones((1, 4, 4, 3))
  variables = conv.init(jax.random.key(0), x)
  assert isinstance(variables['params']['kernel'], nn.Partitioned)
  np.testing.assert_array_equal(conv.apply(variables, x)[0, 1, 1], np.full(8, 27))


def test_channels_first():
  conv = Conv(8, (3, 3))
  variables = conv.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  with pytest.raises(UserError, match=r'of 3 channels got .* \(1, 3, 16, 16\); channels come last'):
    conv.apply(variables, jnp.ones((1, 3, 16, 16)))


@pytest.mark.parametrize('shape', [(2, 8, 4), (2, 8, 8, 3)])
def test_inputs_that_cannot_be(shape):
  conv = Conv(8, (3, 3), groups=2)
  with pytest.raises(UserError, match=re.escape(f'groups=2 got an input of shape {shape}')):
    conv.init(jax.random.key(0), jnp.ones(shape))
