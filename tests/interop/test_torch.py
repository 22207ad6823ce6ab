"""Names, forms and errors of the conversion; its values are in tests/test_golden.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from cbam_jax import BAM, CBAM, ChannelAttention, UserError, create_model
from cbam_jax.interop import from_torch, to_torch
from cbam_jax.interop.forms import FLATTENED, FLATTENED_AS_CONV
from tests.interop.variables import assert_same, random_variables, without_biases
from tests.marks import first_rows


@pytest.fixture
def cbam():
  """A CBAM alone and its variables."""
  module = CBAM(reduction=4)
  return module, random_variables(module, (1, 4, 4, 16))


# ------------------------------------------------------------------------------ names and forms


def test_names_of_the_authors_cbam(cbam):
  assert list(to_torch(*cbam)) == [
    'ChannelGate.mlp.1.weight',
    'ChannelGate.mlp.1.bias',
    'ChannelGate.mlp.3.weight',
    'ChannelGate.mlp.3.bias',
    'SpatialGate.spatial.conv.weight',
    'SpatialGate.spatial.bn.weight',
    'SpatialGate.spatial.bn.bias',
    'SpatialGate.spatial.bn.running_mean',
    'SpatialGate.spatial.bn.running_var',
    'SpatialGate.spatial.bn.num_batches_tracked',
  ]


def test_forms_of_the_authors_cbam(cbam):
  module, variables = cbam
  state_dict = to_torch(module, variables)
  params = variables['params']
  fc1 = params['channel']['mlp']['fc1']['kernel']
  conv = params['spatial']['conv']['kernel']
  np.testing.assert_array_equal(state_dict['ChannelGate.mlp.1.weight'], fc1.T)
  np.testing.assert_array_equal(
    state_dict['SpatialGate.spatial.conv.weight'], np.moveaxis(conv, (2, 3), (1, 0))
  )


def test_forms_of_timms_cbam(cbam):
  module, variables = cbam
  variables = without_biases(variables)
  state_dict = to_torch(module, variables, 'timm')
  official = to_torch(module, variables)
  assert not [name for name in state_dict if 'fc' in name and 'bias' in name]
  np.testing.assert_array_equal(
    state_dict['channel.fc1.weight'], official['ChannelGate.mlp.1.weight'][..., None, None]
  )
  np.testing.assert_array_equal(
    state_dict['spatial.conv.conv.weight'],
    official['SpatialGate.spatial.conv.weight'][:, ::-1],
  )


def test_forms_of_vgg16s_first_dense_layer():
  kernel = np.arange(7 * 7 * 2 * 3).reshape(7, 7, 2, 3)
  weight = FLATTENED.to_torch(kernel.reshape(98, 3))
  np.testing.assert_array_equal(weight, kernel.transpose(3, 2, 0, 1).reshape(3, 98))
  np.testing.assert_array_equal(
    FLATTENED_AS_CONV.to_torch(kernel.reshape(98, 3)), weight.reshape(3, 2, 7, 7)
  )


def test_arrays_out_are_what_torch_takes(cbam):
  module, variables = cbam
  state_dict = to_torch(module, without_biases(variables), 'timm')
  for name, array in state_dict.items():
    assert array.flags.c_contiguous, name
    assert array.flags.writeable, name
    assert array.flags.owndata, name
    assert array.dtype == (np.int64 if name.endswith('tracked') else np.float32)
    if name.endswith('tracked'):
      assert array.shape == ()
      assert array == 0


def test_gradients_come_as_parameters_alone(cbam):
  module, variables = cbam
  gradients = to_torch(module, freeze({'params': variables['params']}))
  complete = to_torch(module, variables)
  parameters = [k for k in complete if k.rpartition('.')[2] in ('weight', 'bias')]
  assert list(gradients) == parameters
  for name in parameters:
    np.testing.assert_array_equal(gradients[name], complete[name])


# ------------------------------------------------------------------------- what state dicts hold


@pytest.mark.parametrize(
  'wrap',
  [
    lambda d: {f'module.{k}': v for k, v in d.items()},
    lambda d: {f'_orig_mod.module.{k}': v for k, v in d.items()},
    lambda d: {'epoch': 3, 'arch': 'resnet50', 'state_dict': d, 'optimizer': {'lr': 0.1}},
    lambda d: {'model': {f'module.{k}': v for k, v in d.items()}},
    lambda d: {k: v for k, v in d.items() if not k.endswith('tracked')},
    lambda d: {k: jnp.asarray(v) for k, v in d.items() if not k.endswith('tracked')},
    lambda d: {k: v.astype(np.float64) for k, v in d.items()},
    lambda d: dict(reversed(d.items())),
  ],
)
def test_state_dicts_as_they_are_found(cbam, wrap):
  module, variables = cbam
  assert_same(from_torch(module, wrap(to_torch(module, variables))), variables)


def test_variables_share_no_memory_with_the_state_dict(cbam):
  module, variables = cbam
  state_dict = to_torch(module, variables)
  converted = from_torch(module, state_dict)
  for array in state_dict.values():
    array[...] = -1
  assert_same(converted, variables)


def test_types_are_the_models(cbam):
  _, variables = cbam
  module = CBAM(reduction=4, param_dtype=jnp.bfloat16)
  converted = from_torch(module, to_torch(module, variables))
  assert {a.dtype for a in jax.tree.leaves(converted['params'])} == {np.dtype(jnp.bfloat16)}
  assert {a.dtype for a in jax.tree.leaves(converted['batch_stats'])} == {np.dtype(np.float32)}
  state_dict = to_torch(module, converted)
  assert state_dict['ChannelGate.mlp.1.weight'].dtype == jnp.bfloat16
  assert_same(from_torch(module, state_dict), converted)


def test_float64_stays_float64(cbam, x64):
  module = CBAM(reduction=4, param_dtype=jnp.float64)
  variables = random_variables(module, (1, 4, 4, 16), np.float64)
  variables = jax.tree.map(lambda a: a + 1e-12, variables)
  assert_same(from_torch(module, to_torch(module, variables)), variables)


@pytest.mark.parametrize('convert', ['parameters', 'numpy'])
def test_tensors_of_torch(cbam, convert):
  torch = pytest.importorskip('torch')
  module, variables = cbam
  state_dict = {k: torch.from_numpy(v) for k, v in to_torch(module, variables).items()}
  if convert == 'parameters':
    state_dict = {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state_dict.items()}
  assert_same(from_torch(module, state_dict), variables)


def test_bfloat16_tensors_of_torch(cbam):
  torch = pytest.importorskip('torch')
  module, variables = cbam
  variables = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(np.float32), variables)
  state_dict = {
    k: torch.from_numpy(v).to(torch.bfloat16) for k, v in to_torch(module, variables).items()
  }
  assert_same(from_torch(module, state_dict), variables)


# -------------------------------------------------------------------------------- biases in timm


def test_timms_weights_leave_biases_at_zero(cbam):
  module, variables = cbam
  unbiased = CBAM(reduction=4, use_bias=False)
  state_dict = to_torch(unbiased, random_variables(unbiased, (1, 4, 4, 16)), 'timm')
  mlp = from_torch(module, state_dict)['params']['channel']['mlp']
  np.testing.assert_array_equal(mlp['fc1']['bias'], np.zeros(4))
  np.testing.assert_array_equal(mlp['fc2']['bias'], np.zeros(16))


def test_timms_form_refuses_biases(cbam):
  module, variables = cbam
  with pytest.raises(UserError, match=r'not 0.*\(2\): params/channel/mlp/fc1/bias, params/channel'):
    to_torch(module, variables, 'timm')
  channel = ChannelAttention(reduction=4)
  with pytest.raises(UserError, match='use_bias=False'):
    to_torch(channel, random_variables(channel, (1, 4, 4, 16)), 'timm')


def test_timms_form_leaves_out_gradients_of_biases(cbam):
  module, variables = cbam
  gradients = to_torch(module, {'params': variables['params']}, 'timm')
  assert list(gradients) == [
    'channel.fc1.weight',
    'channel.fc2.weight',
    'spatial.conv.conv.weight',
    'spatial.conv.bn.weight',
    'spatial.conv.bn.bias',
  ]


# --------------------------------------------------------------------------------------- errors


def test_one_error_names_everything_in_a_state_dict(cbam):
  module, variables = cbam
  state_dict = to_torch(module, variables)
  del state_dict['ChannelGate.mlp.1.bias'], state_dict['SpatialGate.spatial.bn.running_var']
  state_dict['fc.weight'] = state_dict['fc.bias'] = np.zeros(3, np.float32)
  state_dict['ChannelGate.mlp.3.weight'] = np.zeros((16, 8), np.float32)
  state_dict['ChannelGate.mlp.3.bias'] = np.zeros(16, np.int32)
  with pytest.raises(UserError) as info:
    from_torch(module, state_dict)
  assert str(info.value).splitlines()[:5] == [
    "the state dict, read in the layout 'official', does not fit CBAM:",
    '  missing (2): ChannelGate.mlp.1.bias, SpatialGate.spatial.bn.running_var',
    '  left over (2): fc.weight, fc.bias',
    '  of the wrong shape (1): ChannelGate.mlp.3.weight (16, 8) instead of (16, 4)',
    '  not floating point (1): ChannelGate.mlp.3.bias (int32)',
  ]


def test_one_error_names_everything_in_variables(cbam):
  module, variables = cbam
  del variables['params']['channel']['mlp']['fc1']['bias']
  variables['batch_stats']['spatial']['norm']['mean'] = np.zeros(2)
  variables['params']['head'] = {'bias': np.zeros(3)}
  variables['cache'] = {'index': np.zeros(())}
  with pytest.raises(UserError) as info:
    to_torch(module, variables)
  assert str(info.value).splitlines()[:4] == [
    'the variables do not fit CBAM:',
    '  missing (1): params/channel/mlp/fc1/bias',
    '  left over (2): params/head/bias, cache/index',
    '  of the wrong shape (1): batch_stats/spatial/norm/mean (2,) instead of (1,)',
  ]


@pytest.mark.parametrize(
  ('attention', 'layout'),
  first_rows(2, [('cbam', 'official'), ('se', 'timm'), ('cbam', 'timm'), ('bam', 'official')]),
)
def test_a_forgotten_attention_is_named(attention, layout):
  model = create_model('resnet18', attention=attention, stem='cifar', width=0.25)
  variables = random_variables(model, (1, 8, 8, 3))
  if layout == 'timm' and attention == 'cbam':
    variables = without_biases(variables)
  state_dict = to_torch(model, variables, layout)
  plain = create_model('resnet18', stem='cifar', width=0.25)
  with pytest.raises(UserError, match=f"What is left over looks like attention='{attention}'"):
    from_torch(plain, state_dict)


def test_long_lists_are_cut():
  model = create_model('resnet18', attention='cbam', num_classes=2)
  with pytest.raises(UserError, match=r'missing \(174\): conv1\.weight, .*, \.\.\.') as info:
    from_torch(model, {})
  assert str(info.value).count(',') < 40


def test_weights_of_a_plain_network_name_what_is_missing():
  plain = create_model('resnet18', num_classes=2)
  state_dict = to_torch(plain, random_variables(plain))
  with pytest.raises(UserError, match=r'(?s)missing \(72\): layer1\.0\.cbam\.'):
    from_torch(create_model('resnet18', attention='cbam', num_classes=2), state_dict)


class UserAttention(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    return x * self.param('gain', nn.initializers.ones, (x.shape[-1],)).reshape(1, 1, 1, -1)


def test_attention_without_a_table():
  model = create_model('resnet18', attention=UserAttention, num_classes=2)
  with pytest.raises(UserError, match=r'unmapped \(8\): params/stage1/block1/attention/gain, '):
    to_torch(model, random_variables(model))
  with pytest.raises(UserError, match='unmapped'):
    from_torch(model, {'conv1.weight': np.zeros((64, 3, 7, 7), np.float32)})


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m, v: to_torch(m, v, 'keras'), "layout of CBAM is 'keras'; allowed: official, timm"),
    (lambda m, v: to_torch(BAM(), v, 'timm'), 'layout of BAM .*allowed: official'),
    (lambda m, v: from_torch(nn.Dense(3), {}), 'Dense has no counterpart .*create_model'),
    (lambda m, v: from_torch(m, 'weights.pth'), r'type str; .*load_state_dict\(path\)'),
    (lambda m, v: from_torch(m, {'state_dict': {}, 'model': {}}), 'state_dict and model'),
    (lambda m, v: from_torch(m, {'a.b': 1.0, 'module.a.b': 1.0}), r'a\.b with and without'),
    (lambda m, v: to_torch(m, v['params']), "no mapping with 'params'"),
    (lambda m, v: to_torch(m, None), "no mapping with 'params'"),
    (lambda m, v: to_torch(m, {'params': {}}), r'missing \(7\)'),
    (lambda m, v: from_torch(m, {'ChannelGate.mlp.1.weight': np.zeros(())}), 'wrong shape'),
    (lambda m, v: from_torch(m, {'ChannelGate.mlp.1.weight': None}), 'object'),
  ],
)
def test_misuse_is_told(cbam, call, message):
  with pytest.raises(UserError, match=f'(?s){message}'):
    call(*cbam)
