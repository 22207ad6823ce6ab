import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.layers import Conv
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
def test_1x1_is_a_matrix_product(axes, strides):
  conv = Conv(4, (1,) * axes, strides)
  x = jnp.ones((2, *SPATIAL[:axes], 3))
  jaxpr = str(jax.make_jaxpr(conv.apply)(random_variables(conv, x), x))
  assert 'dot_general' in jaxpr
  assert 'conv_general_dilated' not in jaxpr


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
