"""The other forms of a convolution's gradients against JAX's own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax.layers import Conv, any_platform, gradients, grouped
from cbam_jax.layers.convolution import convolve
from tests.layers.random_variables import random_features, random_variables
from tests.marks import first


# One turn and several, rows that come out even and not, pieces of one column and of more, the last
# of which is not full; a kernel of one row, one higher than the image.
@pytest.mark.parametrize(
  ('size', 'sides', 'strides'),
  [
    ((9, 5), (3, 3), 1),
    ((8, 6), (3, 7), 2),
    ((8, 5), (1, 3), 3),
    ((1, 4), (5, 1), 2),
    ((5, 17), (3, 3), 1),
    ((9, 33), (3, 5), 2),
  ],
)
def test_depthwise_by_rows(size, sides, strides, x64):
  x, kernel = random_features((2, *size, 3)), random_features((*sides, 1, 3))

  @functools.partial(jax.jit, static_argnums=0)
  def both(function):
    y, back = jax.vjp(lambda kernel: function(x, kernel, strides), kernel)
    return y, back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
  by_xla = functools.partial(convolve, groups=3)
  jax.tree.map(assert_allclose, both(grouped.depthwise_by_rows), both(by_xla))


@pytest.mark.parametrize(
  ('size', 'sides', 'strides', 'dilation'),
  [
    ((6,), (3,), 2, 1),
    ((7, 6), (3, 5), 1, 1),
    ((8, 5), (3, 1), 2, 2),
    ((4, 3, 5), (3, 3, 1), 2, 1),
  ],
)
def test_forms_in_order(size, sides, strides, dilation, x64):
  x, kernel = random_features((2, *size, 3)), random_features((*sides, 3, 4))
  by_xla = functools.partial(convolve, strides=strides, dilation=dilation)
  in_order = gradients.in_order(by_xla)
  # In forward mode, the forms themselves.
  for tangents in ((x, 0 * kernel), (0 * x, kernel)):
    ours, theirs = (jax.jvp(form, (x, kernel), tangents) for form in (in_order, by_xla))
    for own, other in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-12)


@pytest.fixture(
  params=[(1, 32, 32), (2, 1, 8), (2, 1, 4), (1, 4, 16)],
  ids=['depthwise', 'in order', 'few channels', 'groups'],
)
def layer(request, x64):
  """A convolution that has gradients in another form, with variables and features."""
  strides, groups, channels = request.param
  conv = Conv(32, (3, 3), strides, groups=groups, param_dtype=jnp.float64)
  x = random_features((2, 16, 5, channels))
  variables = random_variables(conv, x)
  jaxpr = str(jax.make_jaxpr(jax.grad(lambda v: conv.apply(v, x).sum()))(variables))
  assert ('scan' in jaxpr) == (groups == channels)
  return conv, variables, x


DERIVATIVES = {
  'both': lambda f, v, x: jax.grad(f, (0, 1))(v, x),
  'forward over reverse': lambda f, v, x: jax.jvp(lambda v: jax.grad(f)(v, x), (v,), (v,)),
  'for each example': lambda f, v, x: jax.vmap(lambda x: jax.grad(f)(v, x[None]))(x),
  'input': lambda f, v, x: jax.grad(f, 1)(v, x),
  'forward mode': lambda f, v, x: jax.jvp(f, (v, x), (v, jnp.sin(x))),
  'forward, kernel': lambda f, v, x: jax.jvp(lambda v: f(v, x), (v,), (v,)),
  'second': lambda f, v, x: jax.grad(lambda v: jnp.sum(jax.grad(f, 1)(v, x) ** 2))(v),
}


@pytest.mark.parametrize('derive', first(3, DERIVATIVES))
def test_derivatives(derive, layer):
  conv, variables, x = layer
  derive = DERIVATIVES[derive]

  def function(variables, x):
    return jnp.sum(jnp.cos(conv.apply(variables, x)))

  ours = jax.jit(functools.partial(derive, function))(variables, x)
  with any_platform():
    theirs = jax.jit(functools.partial(derive, function))(variables, x)
  assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
  jax.tree.map(assert_allclose, ours, theirs)


def test_examples_on_their_own_devices_stay_there(layer):
  conv, variables, x = layer
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

  def gradient(variables, x):
    return jax.grad(lambda v: jnp.sum(conv.apply(v, x) ** 2))(variables)

  expected = jax.jit(gradient)(variables, x)
  step = jax.jit(gradient).lower(variables, jax.device_put(x, sharding)).compile()
  text = step.as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text
  assert 'all-to-all' not in text
  actual = step(variables, jax.device_put(x, sharding))
  assert_allclose = functools.partial(np.testing.assert_allclose, rtol=1e-10)
  jax.tree.map(assert_allclose, actual, expected)


@pytest.mark.parametrize('kind', first(1, ['explicit', 'shard_map']))
def test_other_ways_to_share_out_examples(kind, layer):
  conv, variables, x = layer
  types = jax.sharding.AxisType
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(types.Explicit if kind == 'explicit' else types.Auto,)
  )
  spec = jax.sharding.PartitionSpec

  def gradient(variables, x):
    return jax.grad(lambda v: jnp.sum(conv.apply(v, x) ** 2))(variables)

  shared = gradient
  if kind == 'shard_map':
    shared = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec())
  expected = jax.jit(gradient)(variables, x)
  with jax.set_mesh(mesh):
    at = functools.partial(jax.sharding.NamedSharding, mesh)
    inputs = jax.device_put(variables, at(spec())), jax.device_put(x, at(spec('data')))
    actual = jax.jit(shared)(*inputs)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), actual, expected)


def test_what_the_taps_read_is_not_stored(layer):
  conv, variables, x = layer
  _, back = jax.vjp(lambda v: conv.apply(v, x), variables)
  # Zeros are no memory once compiled.
  stored = sum(v.nbytes for v in jax.tree.leaves(back) if hasattr(v, 'nbytes') and np.any(v))
  # Padded, the features are less than twice as many.
  assert stored < 2 * x.nbytes


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='a GPU has orders of its own')
@pytest.mark.parametrize(
  ('size', 'changed'),
  [
    ((8, 8), {}),
    ((8, 8), {'strides': 2}),
    ((9, 8), {'dilation': 2}),
    ((8, 8), {'groups': 2}),
    ((8,), {'kernel_size': (3,)}),
    ((4, 4, 4), {'kernel_size': (3, 3, 3)}),
    ((8, 8), {'channels': 3, 'features': 8, 'strides': 2}),
  ],
)
def test_in_a_loop_xla_meets_its_own_order(size, changed):
  fields = {'features': 32, 'kernel_size': (3, 3), 'channels': 32} | changed
  x = random_features((3, 2, *size, fields.pop('channels')), dtype=np.float32)
  conv = Conv(**fields)
  variables = random_variables(conv, x[0])

  def total(variables, x):
    return jnp.sum(jnp.cos(conv.apply(variables, x)))

  @jax.jit
  def gradients_of_each(variables, x):
    return jax.lax.map(lambda x: jax.grad(total, (0, 1))(variables, x), x)

  text = gradients_of_each.lower(variables, x).compile().as_text()
  orders = re.findall(r'dim_labels=(\S+?),? ', text)
  places = '012'[: len(size)]
  assert len(orders) >= 3  # forward, and both gradients
  assert set(orders) == {f'b{places}f_{places}io->b{places}f'}
  each = gradients_of_each(variables, x)
  last = jax.tree.map(lambda v: v[-1], each)
  alone = jax.jit(jax.grad(total, (0, 1)))(variables, x[-1])
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), last, alone)


@pytest.mark.parametrize('strides', [1, 2])
def test_a_tall_gradient_is_the_transpose_of_a_wide_one(strides, x64):
  x = random_features((2, 5, 4, 32))
  conv = Conv(8, (1, 1), strides, param_dtype=jnp.float64)
  variables = random_variables(conv, x)

  def gradient(variables, x):
    return jax.grad(lambda variables: (conv.apply(variables, x) ** 2).sum())(variables)

  compiled = jax.jit(gradient).lower(variables, x).compile()
  if jax.default_backend() == 'cpu':
    assert re.search(r'f64\[8,32\]\S* dot\(', compiled.as_text())
    assert not re.search(r'f64\[32,8\]\S* dot\(', compiled.as_text())
  with any_platform():
    theirs = jax.jit(lambda *inputs: gradient(*inputs))(variables, x)
  ours = compiled(variables, x)
  np.testing.assert_allclose(
    ours['params']['kernel'], theirs['params']['kernel'], rtol=1e-12, atol=1e-12
  )
