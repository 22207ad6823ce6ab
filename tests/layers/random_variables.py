"""Variables that leave nothing at a special value, so that no mistake hides behind a 0 or a 1."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(module, *args, seed=0, **kwargs):
  """Random values for every variable that `module.init(key, *args, **kwargs)` makes.

  Kernels keep the scale of their input through a ReLU, scales and variances are positive, means
  and biases are not zero, and the spatial gate, whose norm's scale starts at 0, is open.
  """
  shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    if kind == 'kernel':
      values = rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    elif kind in ('scale', 'var'):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      values = rng.uniform(-0.5, 0.5, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def random_features(shape, seed=1, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
