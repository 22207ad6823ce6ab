"""CBAM in a Flax NNX module: the code of docs/nnx.md, run as it stands."""

import contextlib
import functools
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import ModifyScopeVariableError

from cbam_jax import CBAM

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'nnx.md'


@pytest.fixture(scope='module')
def example():
  """The names that the page's code leaves behind, and as 'printed' what it prints."""
  code = PAGE.read_text().split('```python\n')[1].split('```')[0]
  names, printed = {}, io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, PAGE.name, 'exec'), names)
  return names | {'printed': printed.getvalue()}


def linen_variables(module):
  """What a wrapped linen module's own `apply` takes."""
  variables = {}
  for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))):
    tree = variables.setdefault('params' if isinstance(variable, nnx.Param) else 'batch_stats', {})
    for name in path[:-1]:
      tree = tree.setdefault(name, {})
    tree[path[-1]] = variable[...]
  return variables


def features(seed=1):
  return jax.random.normal(jax.random.key(seed), (4, 8, 8, 32))


@pytest.mark.slow
def test_the_page_prints_what_it_says(example):
  told = PAGE.read_text().split('```\n')[2].strip()
  number = r'-?\d+\.\d+'
  assert re.sub(number, '#', example['printed'].strip()) == re.sub(number, '#', told)
  found, expected = (
    [float(text) for text in re.findall(number, output)] for output in (example['printed'], told)
  )
  # Digits may differ from machine to machine, and sixty steps magnify that.
  np.testing.assert_allclose(found, expected, rtol=0.2, atol=0.1)


def test_it_learns(example):
  first = example['loss'](example['Network'](nnx.Rngs(0)), example['images'], example['labels'])
  assert example['value'] < first / 5
  # It can tell by the running statistics what it learnt by the batch's.
  assert example['accuracy'](example['network'], example['images'], example['labels']) > 0.8


def test_statistics_change_in_training_alone(example):
  network = example['Network'](nnx.Rngs(0))
  before = jax.tree.map(np.asarray, linen_variables(network.attention)['batch_stats'])
  network(example['images'], train=False)
  after_evaluation = linen_variables(network.attention)['batch_stats']
  jax.tree.map(np.testing.assert_array_equal, after_evaluation, before)
  network(example['images'], train=True)
  norm = linen_variables(network.attention)['batch_stats']['spatial']['norm']
  assert norm['mean'] != before['spatial']['norm']['mean']
  assert norm['var'] != before['spatial']['norm']['var']


@pytest.mark.slow
def test_every_parameter_of_the_gates_has_the_gradient_of_linen(example):
  network = example['Network'](nnx.Rngs(0))
  # Where the norm's scale has left 0, and no unit of the MLP is off for good yet.
  optimizer = nnx.Optimizer(network, optax.sgd(0.1), wrt=nnx.Param)
  example['step'](network, optimizer, example['images'], example['labels'])
  attention = network.attention

  @nnx.jit
  def nnx_gradients(module, x):
    def total(module, x):
      return (module(x, train=True, mutable=['batch_stats']) ** 2).sum()

    return nnx.grad(total)(module, x)

  variables = jax.tree.map(jnp.copy, linen_variables(attention))

  @jax.jit
  def linen_gradients(params, x):
    def total(params):
      y, _ = CBAM(reduction=8).apply(
        variables | {'params': params}, x, train=True, mutable=['batch_stats']
      )
      return (y**2).sum()

    return jax.grad(total)(params)

  expected = linen_gradients(variables['params'], features())
  found = nnx.to_pure_dict(nnx_gradients(attention, features()))
  assert len(jax.tree.leaves(expected)) == 7  # the MLP's four, the convolution, the norm's two
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), dict(found), expected)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(expected))


@pytest.mark.parametrize('train', [False, True])
def test_it_computes_what_linen_does(example, train):
  attention = nnx.clone(example['network'].attention)
  variables = jax.tree.map(jnp.copy, linen_variables(attention))
  mutable = ['batch_stats'] if train else False
  expected = CBAM(reduction=8).apply(variables, features(), train=train, mutable=mutable)
  found = attention(features(), train=train, mutable=mutable)
  if train:
    expected, updated = expected
    found_stats = linen_variables(attention)['batch_stats']
    jax.tree.map(np.testing.assert_array_equal, found_stats, updated['batch_stats'])
  np.testing.assert_array_equal(found, expected)


def test_it_begins_as_linen_does():
  module = nnx.bridge.ToNNX(CBAM(reduction=8), rngs=nnx.Rngs(params=3))
  module.lazy_init(jnp.zeros((1, 2, 2, 32)), train=False)
  assert module(features(), train=False).shape == features().shape
  shapes = jax.eval_shape(
    functools.partial(CBAM(reduction=8).init, train=False), jax.random.key(0), features()
  )
  found = linen_variables(module)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(
    lambda a: (a.shape, a.dtype), shapes
  )


def test_what_is_left_out_is_an_error(example):
  attention = example['network'].attention
  with pytest.raises(TypeError, match='train'):
    attention(features())
  with pytest.raises(ModifyScopeVariableError):
    attention(features(), train=True)


def test_train_and_eval_do_not_reach_it(example):
  attention = nnx.clone(example['network'].attention)
  expected = attention(features(), train=False)
  attention.train()
  np.testing.assert_array_equal(attention(features(), train=False), expected)


def test_the_optimizer_is_told_of_the_gates(example):
  network = example['Network'](nnx.Rngs(0))
  before = jax.tree.map(np.asarray, linen_variables(network.attention)['params'])
  optimizer = nnx.Optimizer(network, optax.sgd(0.5), wrt=nnx.Param)
  for _ in range(2):  # the norm's scale starts at 0, so the convolution follows a step later
    example['step'](network, optimizer, example['images'], example['labels'])
  after = linen_variables(network.attention)['params']
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
  assert all(jax.tree.leaves(changed))
