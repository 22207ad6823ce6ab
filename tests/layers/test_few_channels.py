"""Convolutions of few channels, written as others, against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.layers import few_channels
from cbam_jax.layers.convolution import convolve
from tests.layers.random_variables import random_features
from tests.marks import first


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('sides', [(3, 3), (7, 7), (5, 3), (5, 1)])
@pytest.mark.parametrize('size', first(1, [(9, 12), (8, 8), (7, 11)]))
def test_space_to_depth(size, sides, channels, x64):
  x, kernel = random_features((2, *size, channels)), random_features((*sides, channels, 6))
  agree(few_channels.space_to_depth, lambda *inputs: convolve(*inputs, 2), x, kernel)


@pytest.mark.parametrize('channels', [1, 2])
@pytest.mark.parametrize('sides', [(3, 3), (7, 7), (1, 5)])
@pytest.mark.parametrize('size', first(1, [(5, 9), (8, 8), (3, 2)]))
def test_by_rows(size, sides, channels, x64):
  x, kernel = random_features((2, *size, channels)), random_features((*sides, channels, 1))
  agree(few_channels.by_rows, lambda *inputs: convolve(*inputs, 1), x, kernel)


@pytest.mark.parametrize(
  ('shape', 'side', 'features', 'strides', 'expected'),
  [
    ((2, 56, 56, 2), 7, 1, 1, {'cuda': few_channels.by_rows, 'cpu': few_channels.by_rows}),
    ((2, 56, 129, 2), 7, 1, 1, {}),
    ((2, 224, 224, 3), 7, 64, 2, {'cuda': few_channels.space_to_depth}),
    ((2, 224, 224, 3), 3, 32, 2, dict.fromkeys(('cuda', 'cpu'), few_channels.space_to_depth)),
    ((2, 56, 56, 5), 7, 1, 1, {}),
    ((2, 56, 56, 2), 7, 8, 1, {}),
    ((2, 56, 2), 7, 1, 1, {}),
  ],
)
def test_where_they_are_faster(shape, side, features, strides, expected):
  sides = (side,) * (len(shape) - 2)
  kernel = jnp.zeros((*sides, shape[-1], features))
  assert few_channels.faster(jnp.zeros(shape), kernel, strides) == expected


def agree(actual, desired, *inputs):
  y = desired(*inputs)
  np.testing.assert_allclose(actual(*inputs), y, rtol=1e-11, atol=1e-12)
  cotangent = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
  gradients = (jax.jit(lambda *v, f=f: jax.vjp(f, *v)[1](cotangent)) for f in (actual, desired))
  for a, b in zip(*(gradient(*inputs) for gradient in gradients), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
