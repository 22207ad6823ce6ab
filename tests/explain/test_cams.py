import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import CBAM, UserError, create_model, from_torch, list_models
from cbam_jax.explain import eigen_cam, grad_cam, grad_cam_plus_plus
from cbam_jax.models import vgg
from tests.explain.networks import Layer, Small, one_stage
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first
from tests.models.networks import ALL, image_shape, make

METHODS = [grad_cam, grad_cam_plus_plus]
QUICK = [('vgg16', 'cbam')]


def assert_close(actual, expected, tolerance):
  """Within `tolerance` of the largest expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.all(np.isfinite(actual))
  np.testing.assert_array_less(np.abs(actual - expected), tolerance * np.max(np.abs(expected)))


# ---- against PyTorch ---------------------------------------------------------------------------


@pytest.fixture
def resnet50(golden_file):
  """A function from a type to the golden file's network, variables, images and contents."""
  spec = importlib.util.spec_from_file_location('golden_weights', golden_file('weights.py'))
  weights = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(weights)
  golden = np.load(golden_file('gradcam_imagenet_resnet50_cbam.npz'))
  keys = golden_file('official_imagenet_resnet50_cbam.keys.json')

  def build(dtype):
    model = create_model('resnet50', attention='cbam', dtype=dtype, param_dtype=dtype)
    images = np.moveaxis(weights.images((2, 3, 224, 224), 0), 1, -1)
    variables = from_torch(model, weights.state_dict(keys))
    return model, variables, jnp.asarray(images, dtype), golden

  return build


def test_golden(resnet50, x64):
  model, variables, images, golden = resnet50(jnp.float64)
  cams = jax.jit(functools.partial(grad_cam, model))(variables, images, golden['classes'])
  assert cams.dtype == jnp.float64
  assert_close(cams, golden['cam_7x7'], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-4), (jnp.bfloat16, 0.1)])
def test_golden_in_fewer_bits(resnet50, dtype, tolerance):
  model, variables, images, golden = resnet50(dtype)
  cams = jax.jit(functools.partial(grad_cam, model))(variables, images, golden['classes'])
  assert cams.dtype == jnp.float32
  assert_close(cams, golden['cam_7x7'], tolerance)


# ---- by hand -----------------------------------------------------------------------------------

# Of the image [[1, 2], [3, 4]] the layer's two channels are x and relu(3 - x):
#   A0 = [[1, 2], [3, 4]], of sum 10;   A1 = [[2, 1], [0, 0]], of sum 3.
# A logit is the mean of A0 and A1 times its weights, so at each of the four positions its slope is
# a fourth of them: 1 and -2 for class 0, -1 and 2 for class 1.
BY_HAND = one_stage(kernel=[1, -1], bias=[0, 3], head=[[4, -4], [-8, 8]])
IMAGE = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)


# The weights are the slopes: relu(A0 - 2 A1) and relu(2 A1 - A0).
@pytest.mark.parametrize(('label', 'expected'), [(0, [[0, 0], [3, 4]]), (1, [[3, 0], [0, 0]])])
def test_grad_cam_by_hand(label, expected):
  np.testing.assert_allclose(grad_cam(*BY_HAND, IMAGE, label, 'stage1')[0], expected, rtol=1e-6)


# A slope that is negative weighs nothing. Class 0: alpha = 1 / (2 + 10), four times over, makes A0
# weigh 1/3. Class 1: alpha = 2^2 / (2 * 2^2 + 2^3 * 3) = 1/8, four times over and times 2, makes A1
# weigh 1.
@pytest.mark.parametrize(
  ('label', 'expected'), [(0, [[1 / 3, 2 / 3], [1, 4 / 3]]), (1, [[2, 1], [0, 0]])]
)
def test_grad_cam_plus_plus_by_hand(label, expected):
  cam = grad_cam_plus_plus(*BY_HAND, IMAGE, label, 'stage1')
  np.testing.assert_allclose(cam[0], expected, rtol=1e-6)


# A = x (3, 4) has one singular value, along (3, 4) / 5: the projection is 5 x or -5 x, whichever
# sums to more than zero.
@pytest.mark.parametrize('sign', [1, -1])
def test_eigen_cam_by_hand(sign):
  model, variables = one_stage([3, 4], [0, 0], [[0], [0]], act='none')
  image = sign * jnp.array([[1.0, -2.0], [3.0, 1.0]]).reshape(1, 2, 2, 1)
  cam = eigen_cam(model, variables, image, 'stage1')
  np.testing.assert_allclose(cam[0], [[5, 0], [15, 5]], rtol=1e-5, atol=1e-5)


def test_what_says_nothing_has_an_empty_map():
  for method in METHODS:
    # A0 and A1 are relu(-x) and relu(-x) of positive images.
    model, variables = one_stage([-1, -1], [0, 0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(method(model, variables, IMAGE, 0, 'stage1'), 0)
  np.testing.assert_array_equal(eigen_cam(model, variables, IMAGE, 'stage1'), 0)


# ---- independent computations ------------------------------------------------------------------


def finite_differences(f, a, step=1e-5):
  """The derivative of `f`, from (M, *shape of a) to (M,), by central differences."""
  steps = step * np.eye(a.size).reshape(a.size, *a.shape)
  return ((np.asarray(f(a + steps)) - np.asarray(f(a - steps))) / (2 * step)).reshape(a.shape)


@pytest.mark.parametrize('image', [0, 1])
@pytest.mark.parametrize('label', first(1, [2, 0]))
def test_finite_differences_and_the_papers_formulas(image, label, x64):
  model = Small(3, widths=(4, 5), side=3, act='softplus', dtype=jnp.float64)
  images = random_features((2, 6, 5, 3))
  variables = jax.tree.map(
    lambda x: x.astype(jnp.float64), random_variables(model, images, train=False)
  )
  params = variables['params']

  def logit(a):
    x = Layer(5, 3, 'softplus').apply({'params': params['stage2']}, jnp.asarray(a), train=False)
    return (np.mean(x, (1, 2)) @ params['head']['kernel'])[:, label]

  stages = model.apply(variables, images, train=False, method='features')
  a = np.asarray(stages['stage1'][image])
  slope = finite_differences(logit, a)
  alpha = slope**2 / (2 * slope**2 + slope**3 * a.sum((0, 1)))
  weights = {
    grad_cam: slope.mean((0, 1)),
    grad_cam_plus_plus: (alpha * np.maximum(slope, 0)).sum((0, 1)),
  }
  for method in METHODS:
    cams = method(model, variables, images, label, 'stage1')
    assert_close(cams[image], np.maximum(a @ weights[method], 0), 1e-7)


def test_eigen_cam_by_the_gram_matrix(x64):
  model = Small(3, widths=(4, 5), side=3, act='softplus', dtype=jnp.float64)
  images = random_features((2, 6, 5, 3))
  variables = random_variables(model, images, train=False)
  stages = model.apply(variables, images, train=False, method='features')
  for stage, features in stages.items():
    cams = eigen_cam(model, variables, images, stage)
    for cam, a in zip(cams, np.asarray(features), strict=True):
      flat = a.reshape(-1, a.shape[-1])
      projection = a @ np.linalg.eigh(flat.T @ flat)[1][:, -1]
      assert_close(cam, np.maximum(projection * np.sign(projection.sum()), 0), 1e-9)


class Probe(nn.Module):
  """Adds a parameter of the features' shape, with respect to which anyone can differentiate."""

  @nn.compact
  def __call__(self, x, *, train):
    del train
    return x + self.param('change', nn.initializers.zeros, x.shape, x.dtype)


def assert_as_with_probes(name, attention, side, **fields):
  """Grad-CAM agrees with a `Probe` at the end of each stage that can have one."""
  images = random_features((2, side, side, 3))
  fields = {'dtype': jnp.float64, 'param_dtype': jnp.float64, **fields}
  model = make(name, attention, **fields)
  probed = make(name, attention, stage_attention=Probe, **fields)
  # Features that grow from block to block grow errors too: of 1e-16 to 4e-5 in resnet101.
  variables = jax.tree_util.tree_map_with_path(
    lambda path, x: x / 2 if path[-1].key == 'scale' else x,
    random_variables(model, images, train=False),
  )

  @jax.jit
  def stages_and_cams(variables):
    stages = model.apply(variables, images, train=False, method='features')
    labels = np.array([1, 3])
    return stages, {stage: grad_cam(model, variables, images, labels, stage) for stage in stages}

  @jax.jit
  @jax.grad
  def slopes(change, variables):
    params = dict(variables['params'])
    for stage, value in change.items():
      params[stage] = {**params[stage], 'stage_attention': {'change': value}}
    logits = probed.apply({**variables, 'params': params}, images, train=False)
    return logits[0, 1] + logits[1, 3]

  stages, cams = stages_and_cams(variables)
  assert [cams[stage].shape for stage in stages] == [a.shape[:3] for a in stages.values()]
  shapes = jax.eval_shape(lambda: probed.init(jax.random.key(0), images, train=False))['params']
  change = {k: jnp.zeros_like(a) for k, a in stages.items() if 'stage_attention' in shapes[k]}
  assert change
  for stage, slope in slopes(change, variables).items():
    sums = np.sum(np.mean(slope, (1, 2), keepdims=True) * stages[stage], -1)
    # Of all sums, since none may be positive.
    tolerance = 1e-8 * np.max(np.abs(sums))
    np.testing.assert_allclose(cams[stage], np.maximum(sums, 0), rtol=0, atol=tolerance)


@pytest.mark.slow
def test_stages_against_a_probe(x64):
  assert_as_with_probes('resnet18', 'cbam', 8, stem='cifar', stage_sizes=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('name', list_models())
def test_every_stage_of_every_network_against_a_probe(name, monkeypatch, x64):
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)
  assert_as_with_probes(name, 'cbam', 40)


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id='-'.join(case))
    for case in ALL
  ],
)
def test_every_network_has_maps_of_its_last_stage(name, attention):
  model = make(name, attention, remat=True)
  images = jax.ShapeDtypeStruct(image_shape(name), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  features = functools.partial(model.apply, train=False, method='features')
  stage, last = list(jax.eval_shape(features, variables, images).items())[-1]
  cams = functools.partial(grad_cam, model, classes=2, stage=stage)
  assert jax.eval_shape(cams, variables, images).shape == last.shape[:3]


# ---- what holds of any network -----------------------------------------------------------------


def resnet(dtype=jnp.float32, **fields):
  fields = {'stem': 'cifar', 'stage_sizes': (1, 1), 'num_classes': 5, 'dtype': dtype, **fields}
  return create_model('resnet18', attention='cbam', **fields)


def small(dtype=jnp.float32):
  return Small(5, widths=(4, 6), side=3, dtype=dtype)


@functools.cache
def case(make, dtype=np.float32):
  """A network's variables, and three images for it."""
  images = random_features((3, 8, 8, 3), dtype=dtype)
  variables = random_variables(make(), images, train=False)
  return jax.tree.map(lambda x: x.astype(dtype), variables), images


@functools.cache
def compiled(method):
  """A function of variables, images and classes."""
  return jax.jit(functools.partial(method, resnet(), stage='stage1'))


@pytest.mark.parametrize(
  ('method', 'make'),
  [
    (grad_cam, small),
    pytest.param(grad_cam, functools.partial(resnet, stage_sizes=(1,)), marks=pytest.mark.slow),
    (grad_cam_plus_plus, small),
    (eigen_cam, small),
  ],
)
def test_compiled_or_not_they_are_the_same(method, make, x64):
  variables, images = case(make, np.float64)
  labels = () if method is eigen_cam else (np.array([4, 0, 2]),)
  of = functools.partial(method, make(dtype=jnp.float64), stage='stage1')
  cams = of(variables, images, *labels)
  assert np.max(cams) > 0
  assert_close(jax.jit(of)(variables, images, *labels), cams, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_vmap_over_classes(method):
  variables, images = case(resnet)
  cams = jax.vmap(lambda label: compiled(method)(variables, images, label))(jnp.arange(5))
  assert cams.shape == (5, 3, 8, 8)
  for label in range(5):
    alone = compiled(method)(variables, images, np.full(3, label))
    assert_close(cams[label], alone, 1e-4)


@pytest.mark.parametrize('method', first(1, METHODS))
def test_classes_in_every_form(method):
  variables, images = case(small)
  of = functools.partial(method, small(), variables, images, stage='stage2')
  expected = of(np.array([2, 2, 2]))
  for classes in (2, np.int64(2), [2, 2, 2], (2, 2, 2), jnp.array([2, 2, 2], jnp.uint8)):
    np.testing.assert_array_equal(of(classes), expected)
    if not isinstance(classes, tuple):
      assert_close(jax.jit(of)(classes), expected, 1e-5)
  mixed = of(np.array([2, 4, 2]))
  np.testing.assert_array_equal(mixed[::2], expected[::2])
  assert np.any(mixed[1] != expected[1])


@pytest.mark.parametrize('method', METHODS)
def test_other_classes_have_no_say(method):
  variables, images = case(resnet)
  labels = np.full(3, 2)
  head = jax.tree.map(lambda x: x[..., np.array([4, 0, 2, 1, 3])], variables['params']['head'])
  permuted = {**variables, 'params': {**variables['params'], 'head': head}}
  cams = compiled(method)(variables, images, labels)
  assert_close(compiled(method)(permuted, images, labels), cams, 1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_examples_do_not_meet(method):
  variables, images = case(resnet)
  cams = compiled(method)(variables, images, np.array([0, 1, 2]))
  alone = compiled(method)(variables, images.at[1:].set(0), np.array([0, 3, 3]))
  assert_close(alone[0], cams[0], 1e-5)


@pytest.mark.parametrize('name', first(1, ['vgg16', 'resnet18']))
def test_computing_blocks_again_changes_nothing(name, monkeypatch):
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)
  fields = {'attention': CBAM, 'stem': 'cifar', 'stage_sizes': (1, 1), 'num_classes': 5}
  images = random_features((2, 4, 4, 3), dtype=np.float32)
  plain, remat = (create_model(name, remat=remat, **fields) for remat in (False, True))
  variables = random_variables(plain, images, train=False)

  def cams(model):
    return jax.jit(functools.partial(grad_cam, model, classes=1, stage='stage1'))(variables, images)

  assert_close(cams(remat), cams(plain), 1e-5)


def test_nothing_of_the_network_changes():
  variables, images = case(small)
  model = small()
  before = jax.tree.map(np.array, variables)
  logits = model.apply(variables, images, train=False)
  twice = [grad_cam(model, variables, images, 1, 'stage2') for _ in range(2)]
  np.testing.assert_array_equal(*twice)
  jax.tree.map(np.testing.assert_array_equal, before, variables)
  np.testing.assert_array_equal(model.apply(variables, images, train=False), logits)
  assert model == small()


@pytest.mark.parametrize('method', first(1, METHODS))
def test_bfloat16(method):
  variables, images = case(resnet)
  labels = np.array([0, 1, 2])
  cams = jax.jit(functools.partial(method, resnet(jnp.bfloat16), stage='stage1'))(
    variables, images, labels
  )
  assert cams.dtype == jnp.float32
  assert_close(cams, compiled(method)(variables, images, labels), 0.1)


def test_a_traced_class_that_does_not_exist_has_an_empty_map():
  of = jax.jit(functools.partial(grad_cam, small(), *case(small), stage='stage2'))
  np.testing.assert_array_equal(of(5), 0)


def test_an_empty_batch_is_no_mistake():
  variables, images = case(small)
  for method in METHODS:
    assert method(small(), variables, images[:0], 1, 'stage2').shape == (0, 8, 8)


# Each message names the value, says what is allowed, and what to do.
@pytest.mark.parametrize(
  ('changed', 'parts'),
  [
    ({'stage': 'stage3'}, ["'stage3'", 'Small', 'stage1, stage2', "'stage2'"]),
    ({'stage': 'features'}, ["'features'", 'stage1, stage2']),
    ({'classes': 5}, ['has 5', '5 classes', '0 to 4', 'Name one']),
    ({'classes': -1}, ['has -1', '0 to 4']),
    ({'classes': [0, 1, 7]}, ['has 7', '0 to 4']),
    ({'classes': [0, 1]}, ['shape (2,)', '3 images', '(3,)']),
    ({'classes': [[0], [1], [2]]}, ['shape (3, 1)', '(3,)']),
    ({'classes': 1.0}, ['float64', 'one integer']),
    ({'classes': True}, ['bool', 'one integer']),
    ({'images': jnp.zeros((8, 8, 3))}, ['rank 3', 'rank 4', 'x[None]']),
    ({'images': np.zeros((3, 8, 8, 3), np.uint8)}, ['uint8', 'floating point']),
    ({'model': nn.Dense(3)}, ['Dense', 'create_model', 'Classifier']),
  ],
)
def test_what_cannot_be_used_is_refused(changed, parts):
  variables, images = case(small)
  arguments = {'model': small(), 'images': images, 'classes': 1, 'stage': 'stage2', **changed}
  for method in METHODS:
    with pytest.raises(UserError) as error:
      method(variables=variables, **arguments)
    for part in parts:
      assert part in str(error.value)
  if 'classes' not in changed:
    del arguments['classes']
    with pytest.raises(UserError):
      eigen_cam(variables=variables, **arguments)
