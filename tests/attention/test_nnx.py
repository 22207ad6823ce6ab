"""CBAM in a Flax NNX module: the code of docs/nnx.md, run as it stands."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cbam_jax import CBAM

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'nnx.md'


@pytest.fixture(scope='module')
def example():
  """The names that the page's code leaves behind."""
  code = PAGE.read_text().split('```python\n')[1].split('```')[0]
  names = {}
  exec(compile(code, PAGE.name, 'exec'), names)
  return names


def test_it_learns(example):
  network, images, labels = (example[name] for name in ('network', 'images', 'labels'))
  assert float(example['value']) < 1.9
  fresh = example['Network'](nnx.Rngs(0))
  loss = example['step'](fresh, nnx.Optimizer(fresh, example['optax'].sgd(0.5), wrt=nnx.Param),
                         images, labels)  # fmt: skip
  assert float(loss) > 2.2
  mean = network.attention.spatial['norm']['mean']
  assert not np.array_equal(mean[...], jnp.zeros(1))


def test_it_computes_what_linen_does(example):
  attention = example['network'].attention
  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 32))
  state = nnx.state(attention)
  variables = {'params': {}, 'batch_stats': {}}
  for path, variable in nnx.to_flat_state(state):
    kind = 'params' if isinstance(variable, nnx.Param) else 'batch_stats'
    if isinstance(variable, (nnx.Param, nnx.BatchStat)):
      tree = variables[kind]
      for name in path[:-1]:
        tree = tree.setdefault(name, {})
      tree[path[-1]] = variable[...]
  expected = CBAM(reduction=8).apply(variables, x, train=False)
  np.testing.assert_allclose(attention(x, train=False), expected, rtol=1e-6)
