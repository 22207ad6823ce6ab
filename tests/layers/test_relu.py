import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.layers import stored_relu
from tests.layers.random_variables import random_features

SPECIAL = [-np.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, np.inf, np.nan]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_is_the_relu(dtype):
  x = jnp.concatenate(
    [random_features((1000,), dtype=np.float32).astype(dtype), jnp.array(SPECIAL, dtype)]
  )
  y = jax.jit(stored_relu)(x)
  gradients = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x))))(x) for f in (stored_relu, nn.relu)]
  assert y.dtype == gradients[0].dtype == dtype
  y, expected, *gradients = (np.asarray(v, np.float32) for v in (y, nn.relu(x), *gradients))
  np.testing.assert_array_equal(y, expected)
  assert not np.signbit(y[:-1]).any()
  np.testing.assert_array_equal(*gradients)


def test_derivatives(x64):
  x, tangent, cotangent = (random_features((4, 5), seed=seed) for seed in range(3))
  y, pushed = jax.jvp(stored_relu, (x,), (tangent,))
  (pulled,) = jax.vjp(stored_relu, x)[1](cotangent)
  np.testing.assert_array_equal(y, np.maximum(x, 0))
  np.testing.assert_array_equal(pushed, np.where(x > 0, tangent, 0))
  np.testing.assert_array_equal(pulled, np.where(x > 0, cotangent, 0))
  # Of max(x, 0)^3: 6 x where x is positive.
  hessian = jax.hessian(lambda x: jnp.sum(stored_relu(x) ** 3))(x.ravel())
  np.testing.assert_allclose(hessian, np.diag(6 * np.maximum(x.ravel(), 0)), rtol=1e-14)
  np.testing.assert_array_equal(jax.vmap(stored_relu)(x), y)


def read_by_last(activation):
  """How many arrays XLA reads for the last of a chain of sums, each of which others read too."""
  x, kernel = jnp.ones((64, 64)), jnp.ones((64, 64))

  def chain(x, *kernels):
    for kernel in kernels:
      x = activation(x @ kernel + x)
    return x

  kernels = [kernel + i for i in range(4)]
  text = jax.jit(chain).lower(x, *kernels).compile().as_text()
  entry = text[text.index('\nENTRY') :]
  root = next(line for line in entry.splitlines() if 'ROOT' in line)
  return root.partition('fusion(')[2].partition(')')[0].count('%')


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason="it is XLA's CPU backend that is asked")
def test_a_sum_is_not_added_up_again():
  assert read_by_last(stored_relu) == 2  # nn.relu: 5
