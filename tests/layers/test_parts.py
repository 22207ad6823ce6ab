"""A batch a few examples at a time is the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbam_jax
from cbam_jax import UserError, in_parts
from cbam_jax.layers import parts
from cbam_jax.training.sharding import make_mesh, split_over_devices
from tests.layers.random_variables import random_variables

# So many examples of 224x224 are four on each device at once.
AT_ONCE = 4 * jax.device_count()


def means(images, *others):
  """A tree of what each example gives, and how many there were."""
  means.calls.append(images.shape[0])
  spatial = tuple(range(1, images.ndim - 1))
  return {'mean': images.mean(spatial), 'others': [other * 2 for other in others]}


@pytest.fixture(autouse=True)
def _counted(monkeypatch):
  means.calls = []
  # A core for each device, or fewer.
  monkeypatch.setattr(parts, '_cores', lambda: 1)


def on_a_cpu(test):
  return pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a batch is whole but on a CPU')(
    test
  )


def taken(count, *spatial):
  """How many examples the function is called with, of a batch of `count`."""
  images = jax.ShapeDtypeStruct((count, *(spatial or (224, 224)), 3), jnp.float32)
  result = jax.eval_shape(functools.partial(in_parts, means), images)
  assert result['mean'].shape == (count, 3)
  (calls,) = set(means.calls)
  return calls


@on_a_cpu
@pytest.mark.parametrize(
  ('shape', 'at_once'),
  [
    ((4 * AT_ONCE,), AT_ONCE),
    ((AT_ONCE,), AT_ONCE),
    ((jax.device_count() * 9,), jax.device_count() * 3),  # 4 do not divide 9, but 3 do
    ((jax.device_count() * 6,), jax.device_count() * 3),
    ((jax.device_count() * 7,), jax.device_count() * 7),  # no divisor but 1
    ((4 * AT_ONCE, 112, 112), 4 * AT_ONCE),
    ((16 * AT_ONCE, 112, 112), 4 * AT_ONCE),
    ((AT_ONCE, 2000, 1000), jax.device_count()),
    ((4 * AT_ONCE, 50_000), AT_ONCE),
    ((4 * AT_ONCE, 50, 40, 25), AT_ONCE),
    ((1,), 1),
    ((4 * AT_ONCE, 0, 224), 4 * AT_ONCE),
  ],
)
def test_a_part_has_so_many_examples(shape, at_once):
  assert taken(*shape) == at_once


@on_a_cpu
@pytest.mark.usefixtures('eight_devices')
def test_a_batch_that_the_devices_have_not_alike_is_whole():
  assert taken(4 * AT_ONCE + 1) == 4 * AT_ONCE + 1


@on_a_cpu
def test_more_cores_take_more(monkeypatch):
  monkeypatch.setattr(parts, '_cores', lambda: 8 * jax.device_count())
  assert taken(16 * AT_ONCE) == 4 * AT_ONCE


@pytest.fixture
def _small(monkeypatch):
  """Parts of four 8x8 images a device."""
  monkeypatch.setattr(parts, '_PIXELS_A_CORE', 2 * 64)


def assert_taken(at_once):
  if jax.default_backend() == 'cpu':
    assert set(means.calls) == {at_once}


@pytest.mark.usefixtures('_small')
def test_rows_stay_in_their_order():
  count = 3 * AT_ONCE
  images = np.random.default_rng(0).standard_normal((count, 8, 8, 3)).astype(np.float32)
  labels, nothing = np.arange(count), np.zeros((count, 0))
  keys = jax.random.split(jax.random.key(0), count)
  results = in_parts(means, images, labels, images, nothing)
  np.testing.assert_allclose(results['mean'], images.mean((1, 2)), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(results['others'][0], 2 * labels)
  np.testing.assert_array_equal(results['others'][1], 2 * images)
  assert results['others'][2].shape == (count, 0)
  assert_taken(AT_ONCE)

  def noise(images, keys):
    del images
    return jax.vmap(jax.random.normal)(keys)

  np.testing.assert_array_equal(in_parts(noise, images, keys), noise(images, keys))


@pytest.mark.usefixtures('_small')
def test_a_network_gives_the_same():
  model = cbam_jax.create_model(
    'resnet18', attention='cbam', stem='cifar', stage_sizes=(1, 1), num_classes=5
  )
  images = jax.random.normal(jax.random.key(0), (2 * AT_ONCE, 8, 8, 3))
  variables = random_variables(model, images[:1], train=False)
  classify = functools.partial(model.apply, variables, train=False)
  by_parts = jax.jit(functools.partial(in_parts, classify))(images)
  np.testing.assert_allclose(by_parts, jax.jit(classify)(images), rtol=1e-4, atol=1e-5)


@on_a_cpu
@pytest.mark.usefixtures('_small', 'eight_devices')
def test_devices_keep_their_examples_to_themselves():
  sharding = split_over_devices(make_mesh(2))
  images = jax.device_put(jnp.ones((3 * AT_ONCE, 8, 8, 3)), sharding)
  step = jax.jit(functools.partial(in_parts, means), in_shardings=sharding, out_shardings=sharding)
  text = step.lower(images).compile().as_text()
  assert_taken(AT_ONCE)
  assert 'while' in text
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert collective not in text


@on_a_cpu
@pytest.mark.usefixtures('_small', 'eight_devices')
@pytest.mark.parametrize('kind', ['explicit', 'shard_map'])
def test_meshes_tell_the_devices(kind):
  types = jax.sharding.AxisType
  axis_type = types.Explicit if kind == 'explicit' else types.Auto
  mesh = jax.make_mesh((2,), ('data',), axis_types=(axis_type,))  # of the eight
  spec = jax.sharding.PartitionSpec('data')
  images = np.random.default_rng(0).standard_normal((16, 8, 8, 3)).astype(np.float32)
  compute = functools.partial(in_parts, means)
  if kind == 'shard_map':
    compute = jax.shard_map(compute, mesh=mesh, in_specs=spec, out_specs=spec)
  with jax.set_mesh(mesh):
    results = jax.jit(compute)(jax.device_put(images, jax.sharding.NamedSharding(mesh, spec)))
  assert_taken(8 if kind == 'explicit' else 4)
  np.testing.assert_allclose(results['mean'], images.mean((1, 2)), rtol=1e-5, atol=1e-6)


@on_a_cpu
@pytest.mark.usefixtures('_small')
def test_the_memory_is_that_of_a_part():
  def squares(images):
    x = jnp.sort(jnp.concatenate([images] * 8, -1), -1)  # not fused with what reads it
    return x.sum((1, 2))

  images = jax.ShapeDtypeStruct((8 * AT_ONCE, 8, 8, 3), jnp.float32)

  def temporary(function):
    return jax.jit(function).lower(images).compile().memory_analysis().temp_size_in_bytes

  assert temporary(functools.partial(in_parts, squares)) < 0.3 * temporary(squares)


def test_a_gpu_takes_the_batch_whole(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert taken(4 * AT_ONCE) == 4 * AT_ONCE


def test_a_batch_of_any_size_is_whole():
  n = jax.export.symbolic_shape('n')[0]
  images = jax.ShapeDtypeStruct((n, 224, 224, 3), jnp.float32)
  exported = jax.export.export(jax.jit(functools.partial(in_parts, means)))(images)
  assert exported.out_avals[0].shape == (n, 3)


@pytest.mark.parametrize('count', [2, 4 * AT_ONCE])
def test_what_is_not_of_each_example_is_refused(count):
  images = jax.ShapeDtypeStruct((count, 224, 224, 3), jnp.float32)
  fewer = jax.ShapeDtypeStruct((count - 1,), jnp.float32)
  with pytest.raises(UserError, match=rf'\({count - 1},\).*for each of the images'):
    jax.eval_shape(functools.partial(in_parts, means), images, fewer)
  with pytest.raises(UserError, match=r'shape \(\) for .* a row for each'):
    jax.eval_shape(functools.partial(in_parts, jnp.sum), images)
  with pytest.raises(UserError, match='a row for each of the images'):
    in_parts(means, jnp.zeros(()))
