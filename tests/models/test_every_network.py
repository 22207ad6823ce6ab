"""One sweep over the registry: every network with every attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from cbam_jax.models import vgg
from tests.layers.random_variables import random_features, random_variables
from tests.models.networks import ALL, image_shape, make


def networks(*quick):
  """Every network with every attention; all but the `quick` ones in `make test-slow` only."""
  return pytest.mark.parametrize(
    ('name', 'attention'),
    [
      pytest.param(*case, id='-'.join(case), marks=() if case in quick else pytest.mark.slow)
      for case in ALL
    ],
  )


# Side and channels of each stage's output, for images of 224.
RESNET = [(56, 64), (28, 128), (14, 256), (7, 512)]
BOTTLENECK = [(side, 4 * channels) for side, channels in RESNET]
STAGES = {
  'resnet18': RESNET,
  'resnet34': RESNET,
  'resnet50': BOTTLENECK,
  'resnet101': BOTTLENECK,
  'resnet152': BOTTLENECK,
  'wide_resnet18_1.5': [(56, 96), (28, 192), (14, 384), (7, 768)],
  'wide_resnet18_2.0': [(56, 128), (28, 256), (14, 512), (7, 1024)],
  'wide_resnet50_2': BOTTLENECK,
  'resnext50_32x4d': BOTTLENECK,
  'resnext101_32x4d': BOTTLENECK,
  'mobilenet_v1': [(112, 64), (56, 128), (28, 256), (14, 512), (7, 1024)],
  'vgg16': [(224, 64), (112, 128), (56, 256), (28, 512), (14, 512)],
}


@pytest.fixture
def small_vgg(monkeypatch):
  """Shrinks VGG's first dense layer, which has 100 million of its parameters, 49-fold."""
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    pytest.param(*case, marks=pytest.mark.slow if re.search('101|152|34|wide', case[0]) else ())
    for case in ALL
  ],
)
def test_shapes_types_and_use_of_every_variable(name, attention):
  model = make(name, attention, num_classes=7, dtype=jnp.bfloat16)
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

  def init(key, images):
    logits, variables = model.init_with_output(
      key,
      images,
      train=False,
      capture_intermediates=lambda module, method: method == 'features',
      mutable=True,
    )
    (features,) = variables.pop('intermediates')['features']
    return logits, variables, features

  jaxpr, (logits, variables, features) = jax.make_jaxpr(init, return_shape=True)(
    jax.random.key(0), images
  )
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  assert {stage: (x.shape, x.dtype) for stage, x in features.items()} == {
    f'stage{i}': ((2, side, side, channels), jnp.bfloat16)
    for i, (side, channels) in enumerate(STAGES[name], 1)
  }

  result, *outputs = jaxpr.jaxpr.outvars
  used = ancestors(jaxpr.jaxpr, result)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  assert not [path for path, output in zip(paths, outputs, strict=False) if output not in used]


def ancestors(jaxpr, result):
  """Everything in `jaxpr` that `result` is computed from."""
  found = {result}
  for equation in reversed(jaxpr.eqns):
    if not found.isdisjoint(equation.outvars):
      found.update(v for v in equation.invars if not isinstance(v, core.Literal))
  return found


@networks()
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.usefixtures('small_vgg')
def test_runs_are_finite_and_compile_once(name, attention, dtype):
  model = make(name, attention, dtype=dtype)
  images = random_features(image_shape(name), dtype=np.float32)
  variables = random_variables(model, images, train=False)

  @jax.jit
  def step(variables, images):
    logits, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
    return logits, {**variables, **updates}

  logits, variables = step(variables, images)
  assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
  assert np.all(np.isfinite(logits))
  assert np.all(np.ptp(logits, axis=0) > 1e-5)  # The images differ, and so do their logits.

  # What a step returns is what the next one takes: types and shapes stay.
  again, variables = step(variables, images)
  np.testing.assert_allclose(again, logits, rtol=1e-6)
  assert step._cache_size() == 1
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(variables))


def awake(path, leaf):
  """Keeps an MLP's hidden units above 0: of two, chance would silence both for every image."""
  *_, mlp, layer, kind = ('', '', *(part.key for part in path))
  if (mlp, layer) != ('mlp', 'fc1'):
    return leaf
  return leaf + 1 if kind == 'bias' else leaf / 2


# A batch norm takes out what these add.
WITHOUT_GRADIENT = {
  ('channel', 'fc1', 'bias'),
  ('spatial', 'reduce', 'bias'),
  ('spatial', 'conv1', 'bias'),
  ('spatial', 'conv2', 'bias'),
}


@networks()
@pytest.mark.usefixtures('small_vgg')
def test_gradients(name, attention, x64):
  """Every parameter has one, and `jit` changes none: see `max_over_axis` for what would."""
  model = make(name, attention, dtype=jnp.float64, param_dtype=jnp.float64)
  images = random_features(image_shape(name))
  variables = random_variables(model, images, train=False)
  variables = jax.tree_util.tree_map_with_path(awake, variables)
  weights = random_features((3, 5), seed=2)

  def loss(params):
    logits, _ = model.apply(
      {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
    )
    return jnp.sum(logits * weights)

  gradient = jax.grad(loss)
  plain = jax.tree_util.tree_leaves_with_path(gradient(variables['params']))
  jitted = jax.tree.leaves(jax.jit(gradient)(variables['params']))
  norms = [np.linalg.norm(leaf) for _, leaf in plain]
  largest = max(norms)

  for (path, expected), norm, found in zip(plain, norms, jitted, strict=True):
    where = jax.tree_util.keystr(path)
    keys = tuple(part.key for part in path)
    if 'stage_attention' in keys and keys[-3:] in WITHOUT_GRADIENT:
      assert norm < 1e-11 * largest, where
    else:
      assert norm > 1e-11 * largest, where
    # The gradients of tiny norm are sums of large numbers that cancel.
    scale = norm if norm > 1e-6 * largest else largest
    error = np.linalg.norm(np.subtract(found, expected)) / scale
    assert error < 1e-9, f'{where}: {error:.1e} of {scale:.1e}'
