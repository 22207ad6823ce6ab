"""The Pallas kernels against NumPy, interpreted; that they lower; and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cbam_jax.attention import kernels
from cbam_jax.training.sharding import make_mesh
from tests.marks import first

# Positions and channels that fill a tile, several of them, and part of one.
SHAPES = [(2, 49, 96), (2, 300, 128), (3, 64, 24)]
TYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(params=['tpu', 'gpu'])
def kind(request, monkeypatch):
  """Of which platform the kernels are that the test interprets."""
  monkeypatch.setattr(
    kernels, '_on_each_platform', lambda **kinds: kinds[request.param](interpret=True)
  )


def integers(shape, dtype=jnp.float32, least=-40, most=40):
  """Whole numbers, which round nowhere and are often equal."""
  return jnp.asarray(np.random.default_rng(0).integers(least, most, shape), dtype)


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.usefixtures('kind')
def test_over_positions(shape, dtype):
  x, sign = integers(shape, dtype), integers((shape[0], 1, shape[2]), least=-1, most=2)
  mean, square, peak, position = jax.jit(kernels.over_positions)(x, sign)
  values = np.asarray(x, np.float32)
  np.testing.assert_allclose(mean, values.mean(1), rtol=1e-6, atol=1e-5)
  np.testing.assert_allclose(square, np.square(values).mean(1), rtol=1e-6)
  values = values * np.asarray(sign)
  np.testing.assert_array_equal(peak, values.max(1))
  np.testing.assert_array_equal(position, values.argmax(1))


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.usefixtures('kind')
def test_over_channels(shape, dtype):
  x = integers(shape, dtype)
  scale, offset = (integers((1, 1, shape[2]), least=low, most=3) for low in (-2, -3))
  mean, peak, position = jax.jit(kernels.over_channels)(x, scale, offset)
  values = np.asarray(x, np.float32) * np.asarray(scale) + np.asarray(offset)
  np.testing.assert_allclose(mean, values.mean(2), rtol=1e-6, atol=1e-5)
  np.testing.assert_array_equal(peak, values.max(2))
  np.testing.assert_array_equal(position, values.argmax(2))


@pytest.mark.parametrize('dtype', TYPES)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.usefixtures('kind')
def test_gradient_sums(shape, dtype):
  x, dy = integers(shape, dtype), integers(shape, dtype, least=-5, most=6)[::-1]
  d_mean, d_peak = (integers(shape[:2], least=-k, most=k) for k in (4, 5))
  channel = integers(shape[:2], jnp.int32, least=0, most=shape[2])
  with_x, alone = jax.jit(kernels.gradient_sums)(x, dy, d_mean, d_peak, channel)
  here = np.arange(shape[2]) == np.asarray(channel)[..., None]
  d_mean, d_peak = (np.asarray(v)[..., None] for v in (d_mean, d_peak))
  expected = np.asarray(dy, np.float32) + d_mean + here * d_peak
  np.testing.assert_array_equal(alone, expected.sum(1))
  np.testing.assert_array_equal(with_x, (expected * np.asarray(x, np.float32)).sum(1))


def both(x, vector):
  return kernels.over_positions(x, vector), kernels.over_channels(x, vector, vector)


def gradient_sums(x):
  one = jnp.ones(x.shape[:2])
  return kernels.gradient_sums(x, x, one, one, one.astype(jnp.int32))


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('dtype', TYPES)
# The last features of a block at each stage of ResNet-50, for images of 224.
@pytest.mark.parametrize('shape', [(2, 3136, 256), (2, 784, 512), (2, 196, 1024), (2, 49, 2048)])
def test_they_lower_for_accelerators(shape, dtype, platform):
  x = jax.ShapeDtypeStruct(shape, dtype)
  vector = jax.ShapeDtypeStruct((1, 1, shape[2]), jnp.float32)
  run = jax.jit(lambda x, vector: (both(x, vector), gradient_sums(x)))
  lowered = run.trace(x, vector).lower(lowering_platforms=(platform,)).as_text()
  name = {'tpu': 'tpu_custom_call', 'cuda': '__gpu$xla.gpu.triton'}[platform]
  assert lowered.count(f'stablehlo.custom_call @{name}') == 3


# A GPU's last tile sticks out of 49 and of 3125 positions, whatever the channels are.
@pytest.mark.parametrize('shape', first(2, [(2, 49, 96), (2, 64, 16), (2, 49, 64), (2, 3125, 16)]))
def test_a_gpu_touches_no_position_outside(shape, monkeypatch):
  # Interpretation pads a tile where a GPU would read and write what lies beside it.
  masks = []

  def look(kind, function):
    def called(*args, mask, **options):
      masks.append((kind, mask.shape))
      return function(*args, mask=mask, **options)

    monkeypatch.setattr(kernels.triton, kind, called)

  look('load', kernels.triton.load)
  look('store', kernels.triton.store)
  monkeypatch.setattr(kernels, '_on_each_platform', lambda tpu, gpu: gpu(interpret=True))
  vector = jnp.ones((1, 1, shape[2]))
  kernels.over_channels(jnp.ones(shape), vector, vector)
  sticks_out = shape[1] % kernels.GPU_CHANNELS[0] > 0
  assert [kind for kind, _ in masks] == ['load', *['store'] * 3] * sticks_out
  masks.clear()
  kernels.over_positions(jnp.ones(shape), vector)
  assert [kind for kind, _ in masks] == ['load'] * (shape[1] % kernels.GPU_POSITIONS[0] > 0)
  masks.clear()
  gradient_sums(jnp.ones(shape))
  assert [kind for kind, _ in masks] == ['load'] * 5 * (shape[1] % kernels.GPU_GRADIENT[0] > 0)


def test_each_device_takes_its_own_examples():
  mesh = make_mesh(1)
  split = NamedSharding(mesh, PartitionSpec('data'))
  x, one = jax.device_put(integers((16, 49, 32)), split), jnp.ones((1, 1, 32))
  compiled = jax.jit(both).lower(x, one).compile()
  assert 'all-gather' not in compiled.as_text()
  (_, _, peak, _), (_, _, channel) = compiled(x, one)
  assert peak.sharding.is_equivalent_to(split, 2)
  np.testing.assert_array_equal(peak, np.max(x, 1))
  np.testing.assert_array_equal(channel, np.argmax(x, 2))
  compiled = jax.jit(gradient_sums).lower(x).compile()
  assert 'all-gather' not in compiled.as_text()
  (with_x, alone), expected = compiled(x), gradient_sums(np.asarray(x))
  assert alone.sharding.is_equivalent_to(split, 2)
  np.testing.assert_array_equal((with_x, alone), expected)


def test_vmap():
  x, one = integers((3, 2, 49, 32)), jnp.ones((1, 1, 32))

  @jax.jit
  def run(x):
    return both(x, one), gradient_sums(x)

  jax.tree.map(
    np.testing.assert_array_equal,
    jax.jit(jax.vmap(run))(x),
    jax.tree.map(lambda *each: jnp.stack(each), *(run(some) for some in x)),
  )


def test_what_is_not_a_number_stays_where_a_maximum_lets_go_of_it():
  """As Triton's does: of two sums, which have kept it, the first says so."""
  sums = jnp.array([[1.0, jnp.nan], [2.0, 3.0]]), jnp.ones((2, 2))
  peaks, places = jnp.array([[1.0, 5.0], [2.0, 4.0]]), jnp.array([[0, 0], [1, 1]])
  total, ones, peak, place = kernels._joined((*sums, peaks, places), axis=0, size=2)
  np.testing.assert_array_equal(total, [[3.0, jnp.nan]])
  np.testing.assert_array_equal(ones, [[2.0, 2.0]])
  np.testing.assert_array_equal(peak, [[2.0, jnp.nan]])
  np.testing.assert_array_equal(place, [[1, 0]])


@pytest.mark.parametrize('pools', [kernels.over_positions, kernels.over_channels])
def test_what_is_not_a_number_stays(pools):
  x = integers((1, 4, 8)).at[0, 1, 2].set(jnp.nan)
  vectors = [jnp.ones((1, 1, 8))] * (2 if pools is kernels.over_channels else 1)
  mean, *_, peak, _ = pools(x, *vectors)
  for found in (mean, peak):
    assert np.isnan(found).sum() == 1
