"""The fused end of a block against its definition, `relu(shortcut + CBAM(norm(x)))`."""

import functools
import sys
import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from cbam_jax import CBAM, attention
from cbam_jax.attention import cbam, fused
from cbam_jax.attention.fused import channel_pools, spatial_pools
from cbam_jax.attention.reductions import affine_maximum
from cbam_jax.errors import UserError
from cbam_jax.layers import BatchNorm
from cbam_jax.models import ResNet
from cbam_jax.models.base import finish_block
from tests.attention.comparison import assert_close
from tests.layers.random_variables import random_variables
from tests.marks import first, first_rows


def no_convolution(x, norm=None, *, train=False):
  return x if norm is None else norm(x, train=train)


class Ending(nn.Module):
  """A block's last norm, attention and sum."""

  implementation: str
  group_size: int | None = None
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, shortcut, *, train):
    norm = BatchNorm(
      group_size=self.group_size, dtype=self.dtype, param_dtype=self.param_dtype, name='norm'
    )
    attention = functools.partial(
      CBAM,
      reduction=4,
      implementation=self.implementation,
      group_size=self.group_size,
      param_dtype=self.param_dtype,
    )
    return finish_block(x, no_convolution, norm, attention, shortcut, train=train)

  @property
  def param_dtype(self):
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


class Finished(nn.Module):
  """A block's last norm, attention and sum, fused without being asked whether they can be."""

  attention: CBAM

  @nn.compact
  def __call__(self, x):
    return self.attention.finish_block(x, BatchNorm(name='norm'), x, train=False)


def inputs(shape, dtype):
  x, shortcut = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (1, 2))
  return x, shortcut


def outputs(ending, x, shortcut, train):
  """The output, and the gradients of a sum of its entries with weights, by every input."""
  variables = random_variables(ending, x, shortcut, train=False)
  # Every other channel is turned over, where the least element becomes the greatest.
  scale = variables['params']['norm']['scale']
  variables['params']['norm']['scale'] = scale * (-1) ** jnp.arange(len(scale))
  weights = jnp.round(8 * jax.random.normal(jax.random.key(4), x.shape, jnp.float32)).astype(
    x.dtype
  )

  def total(params, x, shortcut):
    y, updated = ending.apply(
      {'params': params, 'batch_stats': variables['batch_stats']},
      x,
      shortcut,
      train=train,
      mutable=['batch_stats'],
    )
    return jnp.sum(y * weights), (y, updated)

  gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
  return gradient(variables['params'], x, shortcut)


@pytest.mark.parametrize(
  ('implementation', 'shape', 'group_size', 'train'),
  [
    ('auto', (4, 6, 5, 8), None, True),
    ('auto', (4, 6, 5, 8), None, False),
    ('auto', (4, 6, 5, 8), 2, True),
    ('auto', (4, 17, 1, 6), None, True),
    ('pallas', (4, 6, 5, 8), None, True),
    pytest.param('auto', (4, 7, 8), None, True, marks=pytest.mark.slow),
    pytest.param('auto', (2, 3, 4, 5, 8), None, True, marks=pytest.mark.slow),
    pytest.param('pallas', (4, 6, 5, 8), 2, False, marks=pytest.mark.slow),
  ],
  ids=['2d', '2d-eval', '2d-groups', '2d-no-blocks', 'pallas', '1d', '3d', 'pallas-groups-eval'],
)
def test_equals_the_definition(x64, implementation, shape, group_size, train):
  x, shortcut = inputs(shape, jnp.float64)
  fused = outputs(Ending(implementation, group_size), x, shortcut, train)
  plain = outputs(Ending('plain', group_size), x, shortcut, train)
  assert_close(fused, plain, 1e-12)


@pytest.mark.parametrize('implementation', first(1, ['xla', 'pallas']))
def test_equals_the_definition_in_float32(implementation):
  x, shortcut = inputs((4, 14, 14, 32), jnp.float32)
  fused_gradients, (fused, _) = outputs(Ending(implementation), x, shortcut, True)
  plain_gradients, (plain, _) = outputs(Ending('plain'), x, shortcut, True)
  assert_close(fused, plain, 1e-5)
  assert_close(fused_gradients, plain_gradients, 1e-4)


@pytest.mark.parametrize('implementation', ['xla', 'pallas'])
def test_bfloat16_within_its_rounding(x64, implementation):
  x, shortcut = (v.astype(jnp.bfloat16) for v in inputs((4, 14, 14, 32), jnp.float32))
  ending = Ending(implementation, dtype=jnp.bfloat16)
  gradients, (fused, _) = outputs(ending, x, shortcut, True)
  exact = outputs(Ending('plain'), x.astype(jnp.float64), shortcut.astype(jnp.float64), True)
  assert fused.dtype == gradients[1].dtype == jnp.bfloat16
  assert_close(fused, exact[1][0], 2**-7)
  assert_close(gradients[1:], exact[0][1:], 2**-5)


@pytest.mark.slow
def test_jit_changes_no_gradient(x64):
  x, shortcut = inputs((3, 6, 6, 12), jnp.float64)
  jitted = outputs(Ending('xla'), x, shortcut, True)
  with jax.disable_jit():
    eager = outputs(Ending('xla'), x, shortcut, True)
  assert_close(jitted, eager, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['xla', 'pallas'])
def test_second_derivatives(x64, implementation):
  x, shortcut = inputs((2, 4, 3, 8), jnp.float64)

  def squared_gradient(implementation):
    ending = Ending(implementation)
    variables = random_variables(ending, x, shortcut, train=False)

    def total(x):
      y, _ = ending.apply(variables, x, shortcut, train=True, mutable=['batch_stats'])
      return jnp.sum(jnp.square(y))

    return jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(total)(x)))))(x)

  assert_close(squared_gradient(implementation), squared_gradient('plain'), 1e-10)


# What has a vmapped axis: the features, the shortcut, or parameters of one part.
@pytest.mark.parametrize('mapped', first(1, ['norm', 'x', 'channel', 'spatial', 'shortcut']))
@pytest.mark.parametrize('implementation', first(1, ['xla', 'pallas']))
def test_gradients_of_vmap(implementation, mapped, x64):
  x, shortcut = inputs((2, 4, 3, 8), jnp.float64)
  variables = random_variables(Ending(implementation), x, shortcut, train=False)
  params = variables['params']
  several = {'x': x, 'shortcut': shortcut, 'norm': params['norm'], **params['attention']}[mapped]
  several = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -3 * v]), several)

  def gradients(implementation):
    def total(given, x, shortcut, params):
      place = {'x': x, 'shortcut': shortcut}
      if mapped in ('x', 'shortcut'):
        place[mapped] = given
      elif mapped == 'norm':
        params = {**params, 'norm': given}
      else:
        params = {**params, 'attention': {**params['attention'], mapped: given}}
      y, _ = Ending(implementation).apply(
        {**variables, 'params': params}, **place, train=True, mutable=['batch_stats']
      )
      return jnp.sum(jnp.square(y))

    def summed(*arguments):
      return jnp.sum(jax.vmap(total, (0, None, None, None))(*arguments))

    return jax.jit(jax.grad(summed, argnums=(0, 1, 2, 3)))(several, x, shortcut, params)

  assert_close(gradients(implementation), gradients('plain'), 1e-10)


def test_a_scale_of_zero_takes_the_first_element(x64):
  x, shortcut = inputs((2, 4, 3, 8), jnp.float64)

  def scale_gradient(implementation):
    ending = Ending(implementation)
    variables = random_variables(ending, x, shortcut, train=False)
    norm = variables['params']['norm']
    norm['scale'] = norm['scale'].at[2].set(0.0)

    def total(params):
      y, _ = ending.apply(
        {**variables, 'params': params}, x, shortcut, train=True, mutable=['batch_stats']
      )
      return jnp.sum(jnp.square(y))

    return jax.jit(jax.grad(total))(variables['params'])['norm']

  assert_close(scale_gradient('xla'), scale_gradient('plain'), 1e-10)


def test_a_subclass_is_called():
  class Louder(CBAM):
    def __call__(self, x, *, train):
      return 100 * super().__call__(x, train=train)

  networks = [ResNet(stage_sizes=(1,), attention=a, num_classes=3) for a in (Louder, CBAM)]
  images = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
  variables = random_variables(networks[1], images, train=False)
  louder, usual = (
    jax.jit(functools.partial(network.apply, train=False))(variables, images)
    for network in networks
  )
  assert not np.allclose(louder, usual)


def test_under_a_negative_scale_the_least_element_is_the_maximum():
  x = jnp.array([[[1.0, 1.0, 1.0], [-3.0, -3.0, -3.0], [2.0, 2.0, 2.0]]])
  sign = jnp.array([[[1.0, -1.0, 0.0]]])
  mean, square, extreme = channel_pools(x, sign)
  np.testing.assert_allclose(mean, np.zeros((1, 3)))
  np.testing.assert_allclose(square, np.full((1, 3), 14 / 3), rtol=1e-6)
  np.testing.assert_array_equal(extreme, [[2.0, -3.0, 1.0]])
  d_x = jax.grad(lambda x: jnp.sum(channel_pools(x, sign)[2]))(x)
  np.testing.assert_array_equal(d_x, [[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])


def test_maxima_by_hand():
  x = jnp.array([[[1.0, -2.0, 3.0], [5.0, 5.0, 1.0]]])
  scale, offset = jnp.array([[[1.0, -2.0, 1.0]]]), jnp.array([[[0.0, 0.0, -1.0]]])
  peak, mean, _ = spatial_pools(x, scale, offset)
  np.testing.assert_allclose(peak, [[4.0, 5.0]])
  np.testing.assert_allclose(mean, [[7 / 3, -5 / 3]], rtol=1e-6)
  d_x = jax.grad(lambda x: jnp.sum(spatial_pools(x, scale, offset)[0]))(x)
  np.testing.assert_array_equal(d_x, [[[0.0, -2.0, 0.0], [1.0, 0.0, 0.0]]])


@pytest.mark.parametrize('axis', [1, 2])
@pytest.mark.parametrize('size', first(2, [12, 7, 1, 16]))
def test_ties_go_to_the_first(axis, size):
  shape = (2, size, 3) if axis == 1 else (2, 3, size)
  x = jnp.round(jax.random.normal(jax.random.key(size), shape))
  one = jnp.ones((1, 1, shape[2]))
  peak, position = jax.jit(affine_maximum, static_argnums=3)(x, one, jnp.zeros_like(one), axis)
  np.testing.assert_array_equal(peak, np.max(x, axis))
  np.testing.assert_array_equal(position, np.argmax(x, axis))


@pytest.mark.parametrize(
  'fields',
  [{'order': 'parallel'}, {'pools': ('avg',)}, {'spatial_pool': 'conv1x1'}, {'dtype': 'float32'}],
)
def test_other_choices_are_not_fused(fields):
  assert not CBAM(**fields).fusible
  with pytest.raises(UserError, match="Leave implementation='auto'"):
    CBAM(**fields, implementation='xla')


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.usefixtures('eight_devices')
def test_gradients_in_a_shard_map(train, x64):
  """What varies over the devices meets what does not: the norm's map at inference."""
  ending = Ending('xla')
  x, shortcut = inputs((8, 3, 5, 8), jnp.float64)
  variables = random_variables(ending, x, shortcut, train=False)
  stats = variables['batch_stats']

  def total(params, x, shortcut):
    y, _ = ending.apply(
      {'params': params, 'batch_stats': stats}, x, shortcut, train=train, mutable=['batch_stats']
    )
    return jnp.sum(y**2)

  def on_each_device(params, x, shortcut):
    return jax.lax.psum(total(params, x, shortcut), 'data')

  everywhere, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec('data')
  mapped = jax.shard_map(
    on_each_device,
    mesh=jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)),
    in_specs=(everywhere, split, split),
    out_specs=everywhere,
  )

  def by_parts(params, x, shortcut):
    parts = (v.reshape(4, 2, *v.shape[1:]) for v in (x, shortcut))
    return sum(total(params, *part) for part in zip(*parts, strict=True))

  arguments = variables['params'], x, shortcut
  gradient, expected = (
    jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (mapped, by_parts)
  )
  assert_close(gradient, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures('eight_devices')
def test_members_on_their_own_devices_share_features(x64):
  """What does not vary over the devices meets what does: the parameters."""
  ending = Ending('xla')
  x, shortcut = inputs((2, 3, 5, 8), jnp.float64)
  members = jax.tree.map(
    lambda v: jnp.stack([v, -2 * v]), random_variables(ending, x, shortcut, train=False)
  )

  def total(variables, x):
    y, _ = ending.apply(variables, x, shortcut, train=True, mutable=['batch_stats'])
    return jnp.sum(y**2)

  def alone(members, x):
    return jax.lax.psum(total(jax.tree.map(lambda v: v[0], members), x), 'member')

  of_each, shared = jax.sharding.PartitionSpec('member'), jax.sharding.PartitionSpec()
  mapped = jax.shard_map(
    alone,
    mesh=jax.make_mesh((2,), ('member',), axis_types=(jax.sharding.AxisType.Auto,)),
    in_specs=(of_each, shared),
    out_specs=shared,
  )

  def summed(members, x):
    return sum(total(jax.tree.map(lambda v, i=i: v[i], members), x) for i in range(2))

  gradient, expected = (jax.jit(jax.grad(f, argnums=(0, 1)))(members, x) for f in (mapped, summed))
  assert_close(gradient, expected, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['plain', 'xla'])
def test_a_gradient_by_no_example(implementation):
  ending = Ending(implementation)
  x, shortcut = inputs((2, 3, 5, 8), jnp.float32)
  variables = random_variables(ending, x, shortcut, train=False)
  none = x[:0]
  gradient = jax.grad(lambda x: jnp.sum(ending.apply(variables, x, none, train=False)))(none)
  assert gradient.shape == none.shape


def test_a_norm_of_another_class_is_called():
  class Positive(BatchNorm):
    def affine(self, x, *, train):
      scale, offset = super().affine(x, train=train)
      return jnp.abs(scale), offset

  def end(norm):
    x, shortcut = inputs((2, 3, 5, 8), jnp.float32)

    class End(nn.Module):
      @nn.compact
      def __call__(self, x, shortcut):
        return finish_block(x, no_convolution, norm(name='norm'), CBAM, shortcut, train=False)

    variables = random_variables(End(), x, shortcut)
    scale = variables['params']['norm']['scale']
    variables['params']['norm']['scale'] = jnp.abs(scale) * (1 if norm is BatchNorm else -1)
    variables['batch_stats']['norm']['mean'] = jnp.zeros(8)
    return End().apply(variables, x, shortcut)

  np.testing.assert_allclose(end(Positive), end(BatchNorm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'group_size', 'message'),
  [((4, 2, 2, 8), 3, 'group_size=3 does not divide'), ((4, 1, 1, 8), 1, r'1 value\(s\)')],
)
def test_statistics_that_cannot_be(shape, group_size, message):
  x = jnp.ones(shape)
  with pytest.raises(UserError, match=message):
    jax.eval_shape(functools.partial(outputs, Ending('xla', group_size), train=True), x, x)


def test_only_the_papers_own_is_fused():
  x = jnp.ones((2, 3, 5, 16))
  with pytest.raises(UserError, match=r"pools=\('avg',\).* add the shortcut"):
    jax.eval_shape(Finished(CBAM(pools=('avg',))).init, jax.random.key(0), x)
  with pytest.raises(UserError, match='CBAM got an input of int32'):
    jax.eval_shape(Finished(CBAM()).init, jax.random.key(0), x.astype(jnp.int32))


def test_the_default_device_may_be_a_name():
  with jax.default_device('cpu'):
    assert not takes_kernels(jnp.ones((8, 4, 3, 32)))


def test_unknown_implementation():
  with pytest.raises(UserError, match='auto, plain, xla, pallas'):
    CBAM(implementation='fast')


def takes_kernels(x):
  """Whether 'auto' does."""
  finished = Finished(CBAM())
  one = jnp.ones((8, 4, 3, x.shape[-1]))
  variables = jax.tree.map(
    lambda v: jnp.ones(v.shape, v.dtype), jax.eval_shape(finished.init, jax.random.key(0), one)
  )
  return 'pallas_call' in str(jax.make_jaxpr(finished.apply)(variables, x))


@pytest.mark.usefixtures('eight_devices')
def test_auto_takes_kernels_on_a_gpu(monkeypatch):
  x = jnp.ones((8, 4, 3, 32))
  monkeypatch.setattr(cbam, '_has_triton', lambda device: False)
  assert not takes_kernels(x)
  monkeypatch.setattr(cbam, '_has_triton', lambda device: True)
  assert takes_kernels(x)
  assert not takes_kernels(x[:0])
  assert not takes_kernels(x[..., :24])
  by_example = jax.sharding.PartitionSpec('data')
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(kind,))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, by_example))
    assert takes_kernels(split) == (kind == jax.sharding.AxisType.Auto)
  found = []
  jax.make_jaxpr(
    jax.shard_map(
      lambda x: found.append(takes_kernels(x)) or x,
      mesh=jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)),
      in_specs=by_example,
      out_specs=by_example,
    )
  )(x)
  assert found == [False]


class Device(NamedTuple):
  platform: str
  compute_capability: str = '9.0'
  version: str = 'PJRT C API\ncuda 13000'

  @property
  def client(self):
    return types.SimpleNamespace(platform_version=self.version)


@pytest.mark.parametrize(
  ('device', 'has'),
  [
    (Device('gpu'), True),
    (Device('gpu', '8.0'), True),
    (Device('gpu', '7.5'), False),
    (Device('gpu', 'gfx90a', 'PJRT C API\nrocm 70000'), False),
    (Device('cpu'), False),
  ],
)
def test_which_devices_have_triton(device, has):
  assert cbam._has_triton(device) is has


def test_a_jax_without_triton(monkeypatch):
  monkeypatch.delattr(pallas, 'triton', raising=False)
  monkeypatch.setitem(sys.modules, 'jax.experimental.pallas.triton', None)
  monkeypatch.delattr(attention, 'kernels', raising=False)
  monkeypatch.delitem(sys.modules, 'cbam_jax.attention.kernels', raising=False)
  fused._kernel.cache_clear()
  assert not cbam._has_triton(Device('gpu'))
  x, shortcut = inputs((2, 3, 16), jnp.float32)
  with pytest.raises(UserError, match=r"Pallas's Triton backend.*'xla'"):
    jax.eval_shape(functools.partial(outputs, Ending('pallas'), train=True), x, shortcut)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason='older compilers store 6 % more')
@pytest.mark.parametrize(
  ('fields', 'side', 'most'),
  first_rows(
    1,
    [
      ({'stage_sizes': (2, 1, 1), 'stem': 'cifar'}, 16, 1.05),
      ({'stage_sizes': (1, 2, 1), 'bottleneck': True}, 96, 1.05),
      ({'stage_sizes': (2,), 'stem': 'cifar'}, 16, 1.11),
      ({'stage_sizes': (3,), 'bottleneck': True}, 64, 1.11),
    ],
  ),
  ids=['basic', 'bottleneck', 'basic, one stage', 'bottleneck, one stage'],
)
def test_stores_no_more_than_the_plain_network(fields, side, most):
  """CBAM's share of the memory of a train step; its definition takes a fifth more, or a third.

  It keeps the last block's output, which counts where a network has one wide stage alone.
  """
  if jax.default_backend() != 'cpu':
    pytest.skip('of small features, a GPU keeps what its convolutions need to work')

  def temporary(attention):
    model = ResNet(**fields, attention=attention, num_classes=10)
    images = jax.ShapeDtypeStruct((4, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, images)

    def loss(params, stats, images):
      logits, _ = model.apply(
        {'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats']
      )
      return jnp.sum(jnp.square(logits))

    gradient = jax.jit(jax.grad(loss))
    compiled = gradient.lower(variables['params'], variables['batch_stats'], images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(CBAM) <= most * temporary(None)
