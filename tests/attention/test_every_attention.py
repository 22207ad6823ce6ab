"""What every attention module has in common: its types, its errors, and what it never does."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbam_jax import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation, UserError
from tests.layers.random_variables import random_features, random_variables

ALL = [CBAM, ChannelAttention, SpatialAttention, BAM, SqueezeExcitation]
ONE_GATE = [ChannelAttention, SpatialAttention, SqueezeExcitation, BAM]
ONE_GATE += [functools.partial(CBAM, order='parallel')]


def small(make, **fields):
  """The module made with a reduction that suits a few channels, where it has one."""
  if 'reduction' in inspect.signature(make).parameters:
    fields['reduction'] = 2
  return make(**fields)


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('train', [False, True])
def test_bfloat16_features(make, train):
  module = small(make)
  x = random_features((4, 6, 6, 8), dtype=jnp.bfloat16)
  variables = random_variables(module, x, train=train)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}

  y, updates = module.apply(variables, x, train=train, mutable=['batch_stats'])
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
  exact, _ = module.apply(variables, x.astype(jnp.float32), train=train, mutable=['batch_stats'])
  assert exact.dtype == jnp.float32
  # A bfloat16 has 8 bits: rounding once is an error of 2^-9 at the most, twice (CBAM) of 2^-8 and
  # what the rounded features do to the second gate.
  np.testing.assert_allclose(y.astype(np.float32), exact, rtol=2**-6)


@pytest.mark.parametrize('make', ONE_GATE)
def test_gates_are_float32_under_bfloat16(make):
  # Rounding is the only difference: the result is the float32 one rounded at the end.
  module = small(make)
  x = random_features((4, 6, 6, 8), dtype=jnp.bfloat16)
  variables = random_variables(module, x, train=False)
  y = module.apply(variables, x, train=False)
  exact = module.apply(variables, x.astype(jnp.float32), train=False)
  np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('make', [ChannelAttention, SpatialAttention])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_logits_are_float32_at_the_least(make, dtype, x64):
  module = small(make)
  x = random_features((2, 5, 5, 8), dtype=dtype)
  arguments = {'train': False} if make is SpatialAttention else {}
  variables = random_variables(module, x, train=False)
  logits = module.apply(variables, x, method='logits', **arguments)
  assert logits.dtype == jnp.promote_types(dtype, jnp.float32)


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('given', [jnp.bfloat16, jnp.float32])
def test_dtype_is_that_of_the_output(make, given):
  x = random_features((2, 5, 5, 8), dtype=given)
  module = small(make)
  variables = random_variables(module, x, train=False)
  for asked in (jnp.bfloat16, jnp.float32):
    y = small(make, dtype=asked)
    assert jax.eval_shape(lambda v, x, y=y: y.apply(v, x, train=False), variables, x).dtype == asked


@pytest.mark.parametrize('make', ALL)
def test_float64(make, x64):
  x = random_features((2, 5, 5, 8))
  module = small(make, param_dtype=jnp.float64)
  variables = random_variables(module, x, train=False)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float64')}
  assert jax.eval_shape(lambda v: module.apply(v, x, train=False), variables).dtype == jnp.float64


# A batch norm takes out what these biases of BAM add.
WITHOUT_GRADIENT = {'channel/fc1', 'spatial/reduce', 'spatial/conv1', 'spatial/conv2'}


@pytest.mark.parametrize('make', [CBAM, functools.partial(CBAM, order='parallel'), BAM])
def test_every_parameter_has_a_gradient(make, x64):
  module = small(make, param_dtype=jnp.float64)
  x, weights = random_features((4, 6, 6, 8)), random_features((4, 6, 6, 8), seed=2)
  variables = random_variables(module, x, train=True)

  @jax.jit
  @jax.grad
  def gradient(params):
    y, _ = module.apply({**variables, 'params': params}, x, train=True, mutable=['batch_stats'])
    return jnp.sum(y * weights)

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables['params'])):
    *where, last = (part.key for part in path)
    assert np.all(np.isfinite(leaf))
    vanishes = last == 'bias' and '/'.join(where) in WITHOUT_GRADIENT
    assert (np.linalg.norm(leaf) < 1e-10) == vanishes, path


@functools.cache
def compiled(make):
  """The module in evaluation as a jitted function of a seed for its variables, and features."""
  module = small(make)
  x = jnp.zeros((3, 5, 4, 8))
  draw = functools.partial(random_variables, module, x, train=False)
  apply = jax.jit(functools.partial(module.apply, train=False))
  return lambda seed, x: apply(draw(seed=seed), x)


features = st.builds(
  lambda seed, scale: scale * random_features((3, 5, 4, 8), seed, np.float32),
  st.integers(0, 1000),
  st.sampled_from([1e-3, 1.0, 30.0]),
)


@pytest.mark.parametrize('make', [CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation])
@settings(max_examples=10)
@given(x=features, seed=st.integers(0, 1000))
def test_gates_only_weaken(make, x, seed):
  y = np.asarray(compiled(make)(seed, x))
  assert np.all(np.abs(y) <= np.abs(x))
  assert np.all(np.sign(y) * np.sign(x) >= 0)


@pytest.mark.parametrize('make', ALL)
@settings(max_examples=10)
@given(x=features, seed=st.integers(0, 1000), order=st.permutations(range(3)))
def test_examples_do_not_meet_in_evaluation(make, x, seed, order):
  order = np.array(order)
  y = compiled(make)(seed, x)
  np.testing.assert_allclose(compiled(make)(seed, x[order]), y[order], rtol=1e-5, atol=1e-7)
  alone = compiled(make)(seed, x.at[1:].set(0))
  np.testing.assert_allclose(alone[0], y[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('make', [ChannelAttention, SqueezeExcitation])
@settings(max_examples=10)
@given(x=features, seed=st.integers(0, 1000), shift=st.tuples(st.integers(0, 4), st.integers(0, 3)))
def test_channel_gates_ignore_where_things_are(make, x, seed, shift):
  y = compiled(make)(seed, jnp.roll(x, shift, (1, 2)))
  expected = jnp.roll(compiled(make)(seed, x), shift, (1, 2))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('shape', [(1, 1, 8), (1, 1, 1, 1), (1, 2, 1, 1, 8)])
def test_smallest_features(make, shape):
  module = small(make)
  x = random_features(shape, dtype=np.float32)
  variables = random_variables(module, x, train=False)
  y = jax.jit(functools.partial(module.apply, train=False))(variables, x)
  assert y.shape == shape
  assert np.all(np.isfinite(y))


@pytest.mark.parametrize('make', ALL)
def test_names_can_be_given(make):
  assert make(name='gate').name == 'gate'


@pytest.mark.parametrize('make', ALL)
def test_equal_fields_make_equal_modules(make):
  # A module is a static argument of jit: unequal ones would compile again.
  assert make() == make()
  assert hash(make()) == hash(make())


# Each message names the value, says what is allowed, and what to do.
@pytest.mark.parametrize(
  ('make', 'parts'),
  [
    (lambda: ChannelAttention(pools=('avg', 'maxx')), ["'maxx'", 'avg, max, lse, lp', "'max'?"]),
    (lambda: CBAM(pools=('av',)), ["'av'", 'avg, max, lse, lp', "'avg'?"]),
    (lambda: CBAM(pools=('median',)), ["'median'", 'allowed: avg, max, lse, lp']),
    (lambda: CBAM(pools=()), ['pools is ()', 'one or more of avg, max, lse, lp', 'for example']),
    (lambda: CBAM(pools='avg'), ["pools is 'avg'", 'a sequence', "('avg', 'max')"]),
    (lambda: CBAM(pools=None), ['pools is None', 'a sequence', "('avg', 'max')"]),
    (lambda: CBAM(order='chanel_first'), ["'chanel_first'", 'parallel', "'channel_first'"]),
    (lambda: CBAM(order='both'), ["'both'", 'channel_first, spatial_first, parallel']),
    (lambda: CBAM(order=None), ['None', 'channel_first, spatial_first, parallel']),
    (lambda: SpatialAttention(pool='conv1x'), ["'conv1x'", 'channel, conv1x1', "'conv1x1'?"]),
    (lambda: CBAM(spatial_pool='channels'), ["'channels'", 'channel, conv1x1', "'channel'?"]),
    (lambda: SpatialAttention(kernel_size=4), ['is 4', 'odd', '3 and 7']),
    (lambda: CBAM(spatial_kernel=6), ['is 6', 'odd', '3 and 7']),
    (lambda: CBAM(spatial_kernel=0), ['is 0', 'positive', '3 and 7']),
    (lambda: CBAM(spatial_kernel=-3), ['is -3', 'positive', '3 and 7']),
    (lambda: CBAM(spatial_kernel=7.0), ['is 7.0', 'integer', '3 and 7']),
    (lambda: CBAM(spatial_kernel=(7, 7)), ['is (7, 7)', 'integer', '3 and 7']),
    (lambda: BAM(combine='add'), ["'add'", 'product, sum']),
    (lambda: BAM(combine='prod'), ["'prod'", 'product, sum', "'product'?"]),
  ]
  + [
    (functools.partial(make, reduction=value), [f'reduction={value!r}', 'at least 1', 'uses 16'])
    for make in (CBAM, ChannelAttention, SqueezeExcitation, BAM)
    for value in (0, -16, 0.5, float('nan'), '16', None)
  ],
)
def test_bad_fields_are_refused_when_the_module_is_made(make, parts):
  with pytest.raises(UserError) as error:
    make()
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize(
  ('x', 'parts'),
  [
    (np.ones((4, 8), np.float32), ['rank 2', '(4, 8)', 'rank 3 or 4 or 5', 'x[None]']),
    (np.ones(8, np.float32), ['rank 1', '(8,)', 'x[None]']),
    (np.ones((1, 2, 2, 2, 2, 8), np.float32), ['rank 6', '(N, *spatial, C)']),
    (np.ones((2, 4, 4, 8), np.uint8), ['uint8', 'floating point', 'astype(jnp.float32) / 255']),
    (np.ones((2, 4, 4, 8), np.int32), ['int32', 'floating point', 'astype']),
    (np.ones((2, 4, 4, 8), bool), ['bool', 'floating point', 'astype']),
    (np.ones((2, 4, 4, 8), np.complex64), ['complex64', 'floating point']),
    (np.ones((2, 0, 4, 8), np.float32), ['(2, 0, 4, 8)', 'at least 1', 'larger inputs']),
    (np.ones((2, 4, 4, 0), np.float32), ['(2, 4, 4, 0)', 'at least 1']),
  ],
  ids=['rank2', 'rank1', 'rank6', 'uint8', 'int32', 'bool', 'complex', 'no_extent', 'no_channels'],
)
def test_bad_features_are_refused(make, x, parts):
  with pytest.raises(UserError) as error:
    jax.eval_shape(lambda: make().init(jax.random.key(0), x, train=False))
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize('make', ALL)
def test_an_empty_batch_is_no_mistake(make):
  x = jnp.ones((2, 4, 4, 8))
  module = small(make)
  variables = random_variables(module, x, train=False)
  assert module.apply(variables, x[:0], train=False).shape == (0, 4, 4, 8)
