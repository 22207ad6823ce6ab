"""Convolutions and products by oneDNN: what they give, and where they are left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cbam_jax
from cbam_jax.layers import Conv, any_platform, onednn, onednn_calls
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first

CALL = onednn_calls.TARGET
CACHE = 'jax_compilation_cache_dir'


@pytest.fixture(autouse=True)
def _no_cache():
  """A program that is kept does not call oneDNN."""
  before = {name: jax.config.values[name] for name in (CACHE, 'jax_enable_compilation_cache')}
  compilation_cache.reset_cache()
  jax.config.update(CACHE, None)
  jax.config.update('jax_enable_compilation_cache', True)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def onednn_found(_no_cache):
  """Skips the test where XLA does not call oneDNN."""
  if not onednn.is_found():
    pytest.skip('this XLA does not call oneDNN as it was tried')


needs_onednn = pytest.mark.usefixtures('onednn_found')


def layer_of(features=32, size=(3, 3), shape=(8, 12, 11, 32), dtype=jnp.float32, **attributes):
  """A convolution, its variables and features."""
  conv = Conv(features, size, **attributes)
  x = random_features(shape, dtype=np.float32).astype(dtype)
  return conv, random_variables(conv, x), x


def calls(function, *inputs):
  """How often the compiled function calls oneDNN."""
  return jax.jit(function).lower(*inputs).compile().as_text().count(CALL)


def back_to(layer, what, variables, x, dy):
  """The gradient by the features or the kernel alone."""
  if what == 'x':
    return jax.vjp(lambda x: layer.apply(variables, x), x)[1](dy)
  params = variables['params']

  def apply(kernel):
    return layer.apply({'params': {**params, 'kernel': kernel}}, x)

  return jax.vjp(apply, params['kernel'])[1](dy)


@needs_onednn
@pytest.mark.parametrize(
  'changed',
  [
    pytest.param({}, id='3x3'),
    pytest.param({'strides': 2}, id='strides'),
    pytest.param({'strides': 3, 'shape': (20, 11, 10, 32)}, id='steps that do not fit'),
    pytest.param({'dilation': 2}, id='dilation'),
    pytest.param({'size': (5, 1)}, id='sides that differ'),
    pytest.param({'size': (7, 7), 'strides': 2, 'shape': (4, 16, 18, 3)}, id='stem'),
    pytest.param({'size': (3, 3), 'strides': 2, 'shape': (4, 16, 18, 3)}, id='small stem'),
    pytest.param({'groups': 8}, id='groups'),
    pytest.param({'groups': 8, 'features': 48}, id='wider groups'),
    pytest.param({'groups': 8, 'strides': 2}, id='groups with strides'),
    pytest.param({'groups': 32}, id='depthwise'),
    pytest.param({'groups': 32, 'strides': 2, 'dilation': 2}, id='depthwise with strides'),
    pytest.param({'use_bias': True}, id='bias'),
    pytest.param({'size': (1, 1), 'features': 48}, id='1x1'),
    pytest.param({'size': (1, 1), 'features': 8}, id='tall 1x1'),
    pytest.param({'size': (1, 1), 'strides': 2, 'shape': (8, 21, 16, 32)}, id='1x1 with strides'),
  ],
)
def test_values_and_derivatives(changed, request):
  layer, variables, x = layer_of(**changed)
  dy = random_features(jax.eval_shape(layer.apply, variables, x).shape, 2, np.float32)

  def all_of_it(variables, x, dy):
    y, back = jax.vjp(layer.apply, variables, x)
    tangents = jax.jvp(layer.apply, (variables, x), (variables, x))
    # Once more through both: the gradients of the gradients.
    twice = jax.grad(lambda v, x, dy: (jax.vjp(layer.apply, v, x)[1](dy)[1] ** 2).sum(), (0, 1, 2))
    return y, back(dy), tangents, twice(variables, x, dy)

  assert calls(layer.apply, variables, x) == 1
  product = changed.get('size') == (1, 1)
  to_x, to_kernel = (functools.partial(back_to, layer, what) for what in ('x', 'kernel'))
  assert calls(to_x, variables, x, dy) == (product or changed.get('strides', 1) == 1)
  assert calls(to_kernel, variables, x, dy) == product
  ours = jax.jit(all_of_it)(variables, x, dy)
  request.getfixturevalue('x64')
  wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (variables, x, dy))
  with any_platform():
    theirs = jax.jit(lambda *inputs: all_of_it(*inputs))(*wide)
  for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-5 * np.abs(their).max())


@needs_onednn
@pytest.mark.parametrize('name', first(1, ['resnet18', 'mobilenet_v1', 'resnext50_32x4d']))
def test_networks(name):
  model = cbam_jax.create_model(name, num_classes=10, attention='cbam')
  x = random_features((2, 64, 64, 3), dtype=np.float32)
  variables = random_variables(model, x[:1], train=False)

  def loss(params, x):
    return (model.apply({**variables, 'params': params}, x, train=False) ** 2).mean()

  gradients = jax.value_and_grad(loss)
  assert calls(gradients, variables['params'], x) > 5
  ours = jax.jit(gradients)(variables['params'], x)
  with any_platform():
    theirs = jax.jit(lambda *inputs: gradients(*inputs))(variables['params'], x)
  ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
  assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@needs_onednn
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_in_a_loop_and_under_checkpoint(size):
  layer, variables, x = layer_of(size=size, shape=(4, 17, 16, 32))

  def looped(x):
    rows = jax.lax.map(jax.checkpoint(lambda row: layer.apply(variables, row)), x[:, None])
    return rows[:, 0]

  def gradient(form, x):
    return jax.grad(lambda x: (form(x) ** 2).sum())(x)

  assert calls(looped, x) == 1
  whole = functools.partial(layer.apply, variables)
  np.testing.assert_allclose(jax.jit(looped)(x), whole(x), rtol=1e-4, atol=1e-4)
  ours, theirs = (jax.jit(functools.partial(gradient, form))(x) for form in (looped, whole))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_each_with_its_own_kernel(size):
  layer, _, x = layer_of(size=size)
  kernels = random_features((3, *size, 32, 32), dtype=np.float32)

  def apply(kernel, x):
    return layer.apply({'params': {'kernel': kernel}}, x)

  ours = jax.jit(jax.vmap(apply, (0, None)))(kernels, x)
  np.testing.assert_allclose(ours, jnp.stack([apply(k, x) for k in kernels]), rtol=1e-4, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_each_with_its_own_features(size):
  layer, variables, x = layer_of(size=size)
  xs = jnp.stack([x, 2 * x, -x], 1)
  apply = functools.partial(layer.apply, variables)

  def gradient(x):
    return jax.grad(lambda x: (apply(x) ** 2).sum())(x)

  for function in (apply, gradient):
    one = jax.vmap(function, 1)
    assert calls(one, xs) == calls(function, x)
    alone = jnp.stack([function(x), function(2 * x), function(-x)])
    np.testing.assert_allclose(jax.jit(one)(xs), alone, rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_gradients_of_each_example(size, compiled):
  layer, variables, x = layer_of(size=size, shape=(3, 24, 16, 32))
  direction = jax.tree.map(jnp.cos, variables)

  def gradient(v, x):
    return jax.grad(lambda v: (layer.apply(v, x[None]) ** 2).sum())(v)

  def along(v, x):
    return jnp.vdot(ravel_pytree(gradient(v, x))[0], ravel_pytree(direction)[0])

  for function in (gradient, jax.grad(along)):
    each = jax.vmap(function, (None, 0))
    ours = (jax.jit(each) if compiled else each)(variables, x)
    alone = [function(variables, example) for example in x]
    ours = ravel_pytree(ours)[0]
    alone = ravel_pytree(jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))[0]
    assert np.linalg.norm(ours - alone) <= 1e-5 * np.linalg.norm(alone)


@needs_onednn
@pytest.mark.usefixtures('eight_devices')
@pytest.mark.parametrize('kind', ['automatic', 'explicit', 'shard_map'])
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_not_divided_among_devices(kind, size):
  layer, variables, x = layer_of(size=size, shape=(8, 17, 16, 32))
  axis = AxisType.Explicit if kind == 'explicit' else AxisType.Auto
  mesh = jax.make_mesh((8,), ('data',), axis_types=(axis,))
  apply = layer.apply
  if kind == 'shard_map':
    spec = PartitionSpec('data')
    apply = jax.shard_map(apply, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  assert calls(apply, variables, placed) == 0
  np.testing.assert_allclose(
    jax.jit(apply)(variables, placed), layer.apply(variables, x), rtol=1e-4, atol=1e-4
  )

  def gradients(apply, variables, x):
    return jax.grad(lambda *inputs: (apply(*inputs) ** 2).sum(), (0, 1))(variables, x)

  if kind == 'explicit':  # JAX's own gradients of convolutions fail there
    return
  ours = functools.partial(gradients, apply)
  assert calls(ours, variables, placed) == 0
  ours, theirs = jax.jit(ours)(variables, placed), gradients(layer.apply, variables, x)
  for our, their in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-4 * np.abs(their).max())


@needs_onednn
def test_on_a_mesh_of_one_device():
  layer, variables, x = layer_of()
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
  placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  assert calls(functools.partial(layer.apply, variables), placed) == 1


@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_few_places_are_left_to_xla(size):
  layer, variables, x = layer_of(size=size, shape=(1, 15, 17, 32))
  assert calls(layer.apply, variables, x) == 0


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_other_types_are_left_to_xla(size, dtype):
  layer, variables, x = layer_of(size=size, dtype=dtype)
  assert calls(layer.apply, variables, x) == 0


@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_a_program_that_may_be_kept_calls_nothing(size, tmp_path):
  layer, variables, x = layer_of(size=size)
  jax.config.update(CACHE, str(tmp_path))
  gradients = jax.grad(lambda *inputs: (layer.apply(*inputs) ** 2).sum(), (0, 1))
  assert calls(gradients, variables, x) == 0


@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_a_program_for_several_platforms_calls_nothing(size):
  layer, variables, x = layer_of(size=size)
  traced = jax.jit(layer.apply).trace(variables, x)
  assert CALL not in traced.lower(lowering_platforms=('cpu', 'cuda')).as_text()


@pytest.mark.parametrize('size', [(3, 3), (1, 1)])
def test_an_exported_program_calls_nothing(size):
  layer, variables, x = layer_of(size=size)
  exported = jax.export.export(jax.jit(functools.partial(layer.apply, variables)))(x)
  assert CALL not in exported.mlir_module()
  assert exported.serialize()


@pytest.mark.parametrize('version', ['0.8.2', '0.11.0', '1.0', '0.12.0.1'])
def test_a_release_that_it_was_not_tried_with(monkeypatch, version):
  monkeypatch.setattr('jaxlib.__version__', version)
  assert not onednn.is_found.__wrapped__()


def test_a_processor_without_it(monkeypatch):
  monkeypatch.setattr('platform.machine', lambda: 'aarch64')
  assert not onednn.is_found.__wrapped__()


def test_a_call_that_xla_does_not_know(monkeypatch):
  monkeypatch.setattr(onednn_calls, 'TARGET', '__onednn$unknown_')
  assert not onednn.is_found.__wrapped__()


@needs_onednn
def test_found_where_arrays_may_not_be_moved():
  with jax.transfer_guard('disallow'):
    assert onednn.is_found.__wrapped__()


def test_no_cpu(monkeypatch):
  def none(backend):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(jax, 'local_devices', none)
  assert not onednn.is_found.__wrapped__()


@needs_onednn
def test_an_answer_that_is_wrong(monkeypatch):
  monkeypatch.setattr(onednn, '_by_hand', lambda *inputs, **how: np.zeros((2, 5, 4, 6)))
  assert not onednn.is_found.__wrapped__()


@needs_onednn
@pytest.mark.parametrize('transposed', ['transpose_first', 'transpose_second'])
def test_a_product_that_is_wrong(monkeypatch, transposed):
  right = onednn.Product.__call__

  def call(product, first, second):
    result = right(product, first, second)
    return -result if getattr(product, transposed) else result

  monkeypatch.setattr(onednn.Product, '__call__', call)
  assert not onednn.is_found.__wrapped__()
