"""What `to_torch` writes, `from_torch` reads back bit for bit."""

import itertools

import jax
import pytest

from cbam_jax import (
  BAM,
  CBAM,
  ChannelAttention,
  SpatialAttention,
  SqueezeExcitation,
  create_model,
  list_models,
)
from cbam_jax.interop import from_torch, to_torch
from cbam_jax.interop.tables import tables
from tests.interop.variables import assert_same, random_variables, without_biases
from tests.marks import first_rows

# Every network with every attention; by default, each structure with one.
QUICK = {('resnet18', 'none'), ('resnet18', 'bam'), ('resnet50', 'cbam'), ('mobilenet_v1', 'se')}
SWEEP = [
  pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
  for case in itertools.product(list_models(), ('none', 'se', 'cbam', 'bam'))
]


@pytest.mark.parametrize(('name', 'attention'), SWEEP)
def test_networks_come_back_bit_for_bit(name, attention):
  thin = {} if name == 'vgg16' else {'width': 0.25}
  model = create_model(name, attention=attention, num_classes=10, **thin)
  variables = random_variables(model)
  state_dict = to_torch(model, variables)
  counters = sum(k.endswith('num_batches_tracked') for k in state_dict)
  assert counters == sum(k.endswith('running_mean') for k in state_dict)
  assert len(state_dict) == len(jax.tree.leaves(variables)) + counters
  assert_same(from_torch(model, state_dict), variables)


@pytest.mark.parametrize(
  ('model', 'layout'),
  first_rows(
    3,
    [
      (create_model('resnet18', attention='cbam', num_classes=2), 'timm'),
      (create_model('resnet18', attention=ChannelAttention, num_classes=2), 'official'),
      (create_model('mobilenet_v1', attention='cbam', stage_attention=CBAM, width=0.25), 'timm'),
      (create_model('resnet18', attention='cbam', num_classes=2), 'torchvision'),
      (create_model('resnet18', attention='bam', num_classes=2), 'timm'),
      (create_model('resnet18', attention=SpatialAttention, num_classes=2), 'timm'),
      (create_model('resnet18', attention='cbam', stage_attention=BAM, num_classes=2), 'official'),
    ],
  ),
)
def test_other_layouts_and_slots_come_back(model, layout):
  variables = without_biases(random_variables(model))
  state_dict = to_torch(model, variables, layout)
  assert_same(from_torch(model, state_dict), variables)
  assert_same(from_torch(model, state_dict, layout), variables)


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['torchvision', 'timm'])
def test_vgg_with_attention_in_both_slots(layout):
  model = create_model('vgg16', attention='cbam', stage_attention=CBAM, num_classes=2)
  variables = random_variables(model)
  assert_same(from_torch(model, to_torch(model, variables, layout)), variables)


def test_vgg_of_other_stage_sizes():
  model = create_model('vgg16', stage_sizes=(1, 1, 2, 2, 2), num_classes=2)  # VGG11
  names = [row.torch for row in tables(model)['torchvision']]
  assert names[:8] == [f'features.{i}' for i in (0, 3, 6, 8, 11, 13, 16, 18)]


MODULES = [
  CBAM(reduction=4),
  CBAM(reduction=4, use_bias=False),
  CBAM(reduction=4, order='channel_only'),
  CBAM(reduction=4, order='parallel', spatial_kernel=3),
  CBAM(spatial_pool='conv1x1', order='spatial_only'),
  CBAM(reduction=4, spatial_pool='conv1x1'),
  ChannelAttention(reduction=4, pools=('lse', 'lp')),
  SpatialAttention(),
  SpatialAttention(pool='conv1x1', kernel_size=3),
  BAM(reduction=4),
  SqueezeExcitation(reduction=4),
]


@pytest.mark.parametrize('module', MODULES)
@pytest.mark.parametrize('axes', [1, 2, 3])
def test_modules_alone_tell_their_channels_and_axes(module, axes):
  variables = without_biases(random_variables(module, (1, *(4,) * axes, 20)))
  for layout in tables(module):
    state_dict = to_torch(module, variables, layout)
    assert_same(from_torch(module, state_dict), variables)


def test_images_of_other_than_three_channels():
  model = create_model('resnet18', stem='cifar', num_classes=2)
  variables = random_variables(model, (1, 32, 32, 1))
  state_dict = to_torch(model, variables)
  assert state_dict['conv1.weight'].shape == (64, 1, 3, 3)
  assert_same(from_torch(model, state_dict), variables)
