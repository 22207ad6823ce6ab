"""Variables that tell any mix-up, for the tests beside this file."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, shape=(1, 32, 32, 3), dtype=np.float32):
  """Variables of the right shapes with a random number everywhere, so that none can be mixed up."""
  rng = np.random.default_rng(0)
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros(shape, jnp.float32), train=False)
  )
  return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32).astype(dtype), variables)


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def without_biases(variables):
  """`variables` of a CBAM with the biases of its MLP at 0, as timm's form can hold them."""
  return jax.tree.map_with_path(
    lambda path, a: np.zeros_like(a) if 'mlp' in str(path) and 'bias' in str(path) else a,
    variables,
  )
