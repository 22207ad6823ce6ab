import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.attention.mlp import BottleneckMLP, hidden_size


@pytest.mark.parametrize(
  ('channels', 'reduction', 'hidden'),
  [
    (64, 16, 4),
    (256, 8, 32),
    (358, 16, 22),
    (716, 16, 45),  # Rounded, as MobileNet's count in the paper needs.
    (4, 16, 1),
    (1, 16, 1),
    (5, 1000, 1),
    (7, 1, 7),
    (10, 2.5, 4),
  ],
)
def test_hidden_size(channels, reduction, hidden):
  assert hidden_size(channels, reduction) == hidden


def test_initial_values():
  params = BottleneckMLP(4).init(jax.random.key(0), jnp.ones((1, 256)))['params']
  for name, fan_in in (('fc1', 256), ('fc2', 64)):
    kernel, bound = np.asarray(params[name]['kernel']), 1 / np.sqrt(fan_in)
    assert kernel.shape[0] == fan_in
    assert 0.99 * bound < kernel.max() <= bound
    assert -bound <= kernel.min() < -0.99 * bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)
    assert abs(kernel.mean()) < 0.02 * bound
    np.testing.assert_array_equal(params[name]['bias'], np.zeros(kernel.shape[1]))


def test_without_biases():
  params = BottleneckMLP(4, use_bias=False).init(jax.random.key(0), jnp.ones((1, 8)))['params']
  assert jax.tree.map(jnp.shape, params) == {'fc1': {'kernel': (8, 2)}, 'fc2': {'kernel': (2, 8)}}
