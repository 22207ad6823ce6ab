import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import UserError
from cbam_jax.layers import BatchNorm
from tests.layers.random_variables import random_features, random_variables

# Two channels of four values each; worked by hand below.
VALUES = np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 4.0], [7.0, 4.0]])


def train_step(norm, variables, x):
  return norm.apply(variables, x, train=True, mutable=['batch_stats'])


def test_hand_worked_case(x64):
  # Means 4 and 2. Biased variances (9 + 1 + 1 + 9) / 4 = 5 and 16 / 4 = 4; unbiased 20/3 and 16/3.
  norm = BatchNorm(momentum=0.9, epsilon=0.0, param_dtype=jnp.float64)
  variables = {
    'params': {'scale': jnp.array([2.0, 3.0]), 'bias': jnp.array([0.5, -1.0])},
    'batch_stats': {'mean': jnp.array([1.0, -1.0]), 'var': jnp.array([2.0, 10.0])},
  }
  y, updates = train_step(norm, variables, jnp.asarray(VALUES))

  root = 2 / np.sqrt(5)
  expected = [[-3 * root + 0.5, -4], [-root + 0.5, -4], [root + 0.5, 2], [3 * root + 0.5, 2]]
  np.testing.assert_allclose(y, expected, rtol=1e-14)
  stats = updates['batch_stats']
  np.testing.assert_allclose(stats['mean'], [0.9 * 1 + 0.1 * 4, 0.9 * -1 + 0.1 * 2], rtol=1e-14)
  np.testing.assert_allclose(
    stats['var'], [0.9 * 2 + 0.1 * 20 / 3, 0.9 * 10 + 0.1 * 16 / 3], rtol=1e-14
  )

  y = norm.apply(variables, jnp.asarray(VALUES), train=False)
  np.testing.assert_allclose(y[:, 0], 2 * (VALUES[:, 0] - 1) / np.sqrt(2) + 0.5, rtol=1e-14)
  np.testing.assert_allclose(y[:, 1], 3 * (VALUES[:, 1] + 1) / np.sqrt(10) - 1, rtol=1e-14)


def test_epsilon_is_added_to_the_variance(x64):
  norm = BatchNorm(epsilon=4.0, param_dtype=jnp.float64)
  x = jnp.asarray(VALUES)
  variables = norm.init(jax.random.key(0), x, train=True)
  y, _ = train_step(norm, variables, x)
  np.testing.assert_allclose(y[:, 0], (VALUES[:, 0] - 4) / 3, rtol=1e-14)


@pytest.mark.parametrize('shape', [(6, 5), (6, 4, 5), (6, 4, 3, 5), (6, 4, 3, 2, 5)])
def test_any_number_of_spatial_axes(shape, x64):
  norm = BatchNorm(param_dtype=jnp.float64)
  x = random_features(shape)
  variables = random_variables(norm, x, train=True)
  y, updates = train_step(norm, variables, x)

  flat = np.asarray(x).reshape(-1, 5)
  params, stats = variables['params'], variables['batch_stats']
  standard = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
  expected = standard * np.asarray(params['scale']) + np.asarray(params['bias'])
  np.testing.assert_allclose(y, expected.reshape(shape), rtol=1e-10, atol=1e-12)
  var = 0.9 * np.asarray(stats['var']) + 0.1 * flat.var(0, ddof=1)
  np.testing.assert_allclose(updates['batch_stats']['var'], var, rtol=1e-12)


@pytest.mark.parametrize('group_size', [1, 2, 3, 6])
def test_groups_are_normalised_apart(group_size, x64):
  x = random_features((6, 4, 3, 5))
  whole, grouped = (
    BatchNorm(group_size=size, param_dtype=jnp.float64) for size in (None, group_size)
  )
  variables = random_variables(whole, x, train=True)
  y, updates = train_step(grouped, variables, x)

  apart = [train_step(whole, variables, part) for part in jnp.split(x, 6 // group_size)]
  np.testing.assert_allclose(y, jnp.concatenate([part for part, _ in apart]), rtol=1e-12)
  for name in ('mean', 'var'):
    mean = np.mean([part['batch_stats'][name] for _, part in apart], axis=0)
    np.testing.assert_allclose(updates['batch_stats'][name], mean, rtol=1e-12)


@pytest.mark.parametrize('group_size', [None, 2])
def test_moments_say_what_the_features_would(group_size, x64):
  x = random_features((6, 4, 3, 5))
  norm = BatchNorm(group_size=group_size, param_dtype=jnp.float64)
  variables = random_variables(norm, x, train=True)

  def affine(x, moments):
    given = moments and (jnp.mean(x, (1, 2)), jnp.mean(jnp.square(x), (1, 2)))
    return norm.apply(
      variables, x, train=True, moments=given or None, method='affine', mutable=['batch_stats']
    )

  def check(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=1e-12, atol=1e-14)

  jax.tree.map(check, affine(x, True), affine(x, False))
  gradients = [jax.grad(lambda x, m=m: jnp.sum(affine(x, m)[0][0] ** 2))(x) for m in (True, False)]
  check(*gradients)


def test_sign_is_that_of_the_scale():
  norm = BatchNorm()
  variables = norm.init(jax.random.key(0), jnp.ones((2, 3)), train=False)
  variables['params']['scale'] = jnp.array([2.0, -0.5, 0.0])
  np.testing.assert_array_equal(norm.apply(variables, 3, method='sign'), [1, -1, 0])


def test_what_it_computes_can_be_captured():
  """Every method that flax may be asked to note returns arrays, under `jit` too."""
  norm = BatchNorm()
  x = random_features((2, 4, 3), dtype=np.float32)
  variables = norm.init(jax.random.key(0), x, train=False)

  @jax.jit
  def captured(x):
    return norm.apply(
      variables, x, train=True, mutable=['batch_stats'], capture_intermediates=lambda *_: True
    )

  captured(x)


def test_groups_do_not_matter_in_evaluation():
  x = random_features((5, 4, 4, 3), dtype=np.float32)
  variables = random_variables(BatchNorm(), x, train=False)
  y = BatchNorm(group_size=2).apply(variables, x, train=False)
  np.testing.assert_array_equal(y, BatchNorm().apply(variables, x, train=False))


def test_init_leaves_the_running_statistics_alone():
  x = random_features((4, 3), dtype=np.float32)
  for train in (True, False):
    variables = BatchNorm().init(jax.random.key(0), x, train=train)
    np.testing.assert_array_equal(variables['params']['scale'], np.ones(3))
    np.testing.assert_array_equal(variables['params']['bias'], np.zeros(3))
    np.testing.assert_array_equal(variables['batch_stats']['mean'], np.zeros(3))
    np.testing.assert_array_equal(variables['batch_stats']['var'], np.ones(3))


def test_bfloat16_features_keep_float32_statistics():
  # At 256 a bfloat16 steps by 2: sums and means in that type would be far off.
  x = jnp.asarray(256 + 8 * random_features((64, 8, 3), dtype=np.float32), jnp.bfloat16)
  variables = BatchNorm().init(jax.random.key(0), x, train=True)
  y, updates = train_step(BatchNorm(), variables, x)
  exact = np.asarray(x, np.float64)
  assert y.dtype == jnp.bfloat16
  assert updates['batch_stats']['mean'].dtype == jnp.float32
  np.testing.assert_allclose(updates['batch_stats']['mean'], 0.1 * exact.mean((0, 1)), rtol=1e-6)
  assert BatchNorm(dtype=jnp.float32).apply(variables, x, train=False).dtype == jnp.float32


def test_derivative_is_that_of_the_definition(x64):
  norm = BatchNorm(param_dtype=jnp.float64)
  x, cotangent = random_features((4, 3, 2)), random_features((4, 3, 2), seed=2)
  variables = random_variables(norm, x, train=True)

  @jax.jit
  def loss(x):
    return jnp.sum(train_step(norm, variables, x)[0] * cotangent)

  gradient, step = jax.grad(loss)(x), 1e-6
  for index in [(0, 0, 0), (1, 2, 1), (3, 1, 0)]:
    nudge = jnp.zeros_like(x).at[index].set(step)
    slope = (loss(x + nudge) - loss(x - nudge)) / (2 * step)
    np.testing.assert_allclose(gradient[index], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('group_size', [4, 7])
def test_group_size_that_does_not_divide_the_batch(group_size):
  x = jnp.ones((6, 4, 3))
  norm = BatchNorm(group_size=group_size)
  variables = norm.init(jax.random.key(0), x, train=True)
  with pytest.raises(UserError, match=f'group_size={group_size} .* batch of 6; choose a divisor'):
    train_step(norm, variables, x)


@pytest.mark.parametrize(('shape', 'group_size'), [((1, 1, 1, 3), None), ((4, 1, 1, 3), 1)])
def test_one_value_a_channel_has_no_variance(shape, group_size):
  norm = BatchNorm(group_size=group_size)
  variables = norm.init(jax.random.key(0), jnp.ones(shape), train=True)
  with pytest.raises(UserError, match=r'1 value\(s\) a channel .* Use a larger batch'):
    train_step(norm, variables, jnp.ones(shape))
  assert norm.apply(variables, jnp.ones(shape), train=False).shape == shape


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'group_size': 0}, 'group_size is 0; it must be an integer of at least 1'),
    ({'group_size': 2.0}, 'group_size is 2.0; it must be an integer'),
    ({'epsilon': -1.0}, 'epsilon is -1.0; it must be a number of at least 0'),
    ({'epsilon': 'a'}, "epsilon is 'a'; it must be a number"),
    ({'momentum': 1.5}, "a batch norm's momentum is 1.5; .* from 0 to 1"),
    ({'dtype': jnp.int32}, "BatchNorm has dtype 'int32'; .* floating point"),
  ],
)
def test_fields_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    BatchNorm(**fields)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('x', [np.ones(3), np.float32(1), np.ones((2, 3), np.int32)])
def test_inputs_that_cannot_be(x, train):
  with pytest.raises(UserError, match=r'BatchNorm got an input of .* floating point'):
    BatchNorm().init(jax.random.key(0), x, train=train)


def test_an_empty_batch_has_no_statistics():
  norm = BatchNorm()
  variables = norm.init(jax.random.key(0), jnp.ones((2, 3)), train=True)
  with pytest.raises(UserError, match=r'0 value\(s\) a channel'):
    train_step(norm, variables, jnp.ones((0, 3)))
