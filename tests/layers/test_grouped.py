"""Convolutions of groups, as a CPU computes them, against XLA's own."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.layers import Conv, any_platform, grouped
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first, first_rows

SPATIAL = (9, 8, 5)


def results(conv, variables, x):
  """The features and their gradients by kernel and input."""

  def both(variables, x):
    y, back = jax.vjp(conv.apply, variables, x)
    return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  return jax.jit(both)(variables, x)


@pytest.mark.parametrize(
  ('axes', 'size', 'strides', 'dilation'),
  first_rows(1, [(2, 3, 2, 1), (2, 3, 1, 1), (1, 5, 3, 2), (3, 1, 2, 1)]),
)
@pytest.mark.parametrize(
  ('groups', 'channels', 'features'),
  [
    pytest.param(6, 6, 6, id='depthwise'),
    pytest.param(6, 6, 12, id='two features a channel'),
    pytest.param(6, 24, 12, id='two blocks of three groups'),
    pytest.param(2, 40, 6, id='groups wider than a block'),
  ],
)
def test_against_xla(groups, channels, features, axes, size, strides, dilation, x64):
  conv = Conv(features, (size,) * axes, strides, dilation, groups=groups, param_dtype=jnp.float64)
  x = random_features((2, *SPATIAL[:axes], channels))
  variables = random_variables(conv, x)
  with any_platform():
    expected = results(conv, variables, x)
  assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
  jax.tree.map(assert_allclose, results(conv, variables, x), expected)


@pytest.mark.parametrize('groups', [2, 8])
def test_forward_mode_and_vmap(groups, x64):
  conv = Conv(8, (3, 3), groups=groups, param_dtype=jnp.float64)
  x = random_features((3, 1, 9, 5, 8))
  variables = random_variables(conv, x[0])

  def pushed():
    apply = jax.vmap(functools.partial(conv.apply, variables))
    return jax.jit(lambda x: jax.jvp(apply, (x,), (jnp.sin(x),)))(x)

  with any_platform():
    expected = pushed()
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), pushed(), expected
  )


@pytest.mark.parametrize('groups', [4, 32])
def test_bfloat16_sums_in_float32(groups):
  x = jax.random.normal(jax.random.key(0), (2, 9, 9, 32), jnp.bfloat16)
  conv = Conv(32, (5, 5), groups=groups, dtype=jnp.bfloat16)
  variables = random_variables(conv, x)
  y = conv.apply(variables, x)
  assert y.dtype == jnp.bfloat16
  exact = conv.clone(dtype=jnp.float32).apply(
    jax.tree.map(lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), variables),
    x.astype(jnp.float32),
  )
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)


def test_bfloat16_gradients_sum_in_float32():
  x = jax.random.normal(jax.random.key(0), (2, 9, 9, 32), jnp.bfloat16)
  conv = Conv(32, (5, 5), groups=32)
  variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), random_variables(conv, x))

  def gradient(variables, x):
    cotangent = jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16).astype(x.dtype)
    return jax.vjp(conv.apply, variables, x)[1](cotangent)

  exact = gradient(*jax.tree.map(lambda v: v.astype(jnp.float32), (variables, x)))
  actual = gradient(variables, x)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(actual))
  actual = jax.tree.map(lambda v: v.astype(jnp.float32), actual)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2**-8, atol=1e-3), actual, exact)


@pytest.mark.parametrize('groups', [4, 16])
def test_no_convolution_of_groups_is_compiled(groups):
  conv = Conv(16, (3, 3), groups=groups)
  x = jnp.ones((2, 8, 8, 16))
  variables = random_variables(conv, x)

  def compiled():
    gradient = jax.grad(lambda v, x: jnp.sum(conv.apply(v, x) ** 2))
    return jax.jit(gradient).lower(variables, x).compile().as_text()

  assert 'group_count' not in compiled()
  with any_platform():
    assert 'group_count' in compiled()


def test_each_device_with_a_kernel_of_its_own(x64):
  conv = Conv(4, (3, 3), groups=4, param_dtype=jnp.float64)
  x = random_features((2, 12, 12, 4))
  variables = random_variables(conv, x)
  both = jax.tree.map(lambda v: jnp.stack([v, -v]), variables)

  def gradient(variables, x):
    return jax.grad(lambda v: jnp.sum(jnp.cos(conv.apply(v, x))))(variables)

  def of_each(variables, x):
    return jax.lax.map(lambda v: gradient(v, x), variables)

  spec = jax.sharding.PartitionSpec
  mesh = jax.make_mesh((2,), ('member',), axis_types=(jax.sharding.AxisType.Auto,))
  shared = jax.shard_map(
    of_each, mesh=mesh, in_specs=(spec('member'), spec()), out_specs=spec('member')
  )
  assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
  jax.tree.map(assert_allclose, jax.jit(shared)(both, x), jax.jit(of_each)(both, x))


def test_a_depthwise_gradient_stores_no_copy_for_each_tap():
  # Dilated, which the form of tests/layers/test_gradients.py is not for.
  conv = Conv(8, (5, 5), dilation=2, groups=8)
  x = jnp.ones((2, 32, 32, 8))
  variables = random_variables(conv, x)
  _, back = jax.vjp(conv.apply, variables, x)
  stored = sum(v.nbytes for v in jax.tree.leaves(back) if hasattr(v, 'nbytes'))
  assert stored < 2 * x.nbytes


@pytest.mark.parametrize('strides', [1, 2])
def test_a_depthwise_gradient_read_twice_stores_no_array_for_each_tap(strides):
  conv = Conv(8, (5, 5), strides, groups=8)
  x = jnp.ones((2, 32, 32, 8))
  variables = random_variables(conv, x)

  def gradients(x):
    d_x = jax.grad(lambda x: jnp.sum(conv.apply(variables, x) ** 2))(x)
    return d_x * 2, jnp.sum(d_x * x, (1, 2))

  memory = jax.jit(gradients).lower(x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 6 * x.nbytes


@pytest.mark.parametrize('groups', [2, 6])
def test_images_of_any_size(groups):
  conv, x = Conv(6, (3, 3), 2, groups=groups), jnp.ones((1, 9, 12, 6))
  variables = random_variables(conv, x)
  height, width = jax.export.symbolic_shape('h, w')
  symbolic = jax.ShapeDtypeStruct((1, height, width, 6), jnp.float32)

  def pushed(variables, x):
    return jax.jvp(functools.partial(conv.apply, variables), (x,), (2 * x,))

  exported = jax.export.export(jax.jit(pushed), platforms=('cpu', 'cuda'))(variables, symbolic)
  with any_platform():
    expected = pushed(variables, x)
  for a, b in zip(exported.call(variables, x), expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize('shape', first(1, [(0, 8, 8, 6), (2, 0, 8, 6), (2, 16, 0, 6)]))
@pytest.mark.parametrize(
  ('features', 'size', 'groups'), first_rows(2, [(6, 5, 6), (32, 3, 1), (6, 3, 2), (6, 1, 1)])
)
def test_no_features_at_all(shape, features, size, groups):
  conv = Conv(features, (size, size), 2, groups=groups)
  variables = conv.init(jax.random.key(0), jnp.ones((1, 16, 16, 6)))
  gradient = jax.grad(lambda v: conv.apply(v, jnp.ones(shape)).sum())(variables)
  np.testing.assert_array_equal(gradient['params']['kernel'], 0)


def test_many_groups_are_left_to_xla():
  conv = Conv(2 * 67, (3, 3), groups=67)
  x = jnp.ones((1, 4, 4, 67))
  variables = random_variables(conv, x)
  assert str(jax.make_jaxpr(conv.apply)(variables, x)).count('conv_general_dilated[') == 1


def test_many_taps_are_not_compiled_apart():
  conv, x = Conv(4, (9, 9), groups=4), jnp.ones((1, 9, 9, 4))
  variables = random_variables(conv, x)
  text = str(jax.make_jaxpr(conv.apply)(variables, x))
  assert text.count(' mul ') < grouped.MOST_TAPS < 9 * 9
  with any_platform():
    expected = conv.apply(variables, x)
  np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
