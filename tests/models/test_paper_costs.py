"""Parameters and multiply-adds, to the digits that the papers print."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from cbam_jax import CBAM, create_model, list_models, summary

# Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, tables 4 and 5: network,
# attention, parameters in millions, GFLOPs (multiply-adds, one image of 224).
TABLE_4 = [
  ('resnet18', 'none', 11.69, 1.814),
  ('resnet18', 'se', 11.78, 1.814),
  ('resnet18', 'cbam', 11.78, 1.815),
  ('resnet34', 'none', 21.80, 3.664),
  ('resnet34', 'se', 21.96, 3.664),
  ('resnet34', 'cbam', 21.96, 3.665),
  ('resnet50', 'none', 25.56, 3.858),
  ('resnet50', 'se', 28.09, 3.860),
  ('resnet50', 'cbam', 28.09, 3.864),
  ('resnet101', 'none', 44.55, 7.570),
  ('resnet101', 'se', 49.33, 7.575),
  ('resnet101', 'cbam', 49.33, 7.581),
  ('wide_resnet18_1.5', 'none', 25.88, 3.866),
  ('wide_resnet18_1.5', 'se', 26.07, 3.867),
  ('wide_resnet18_1.5', 'cbam', 26.08, 3.868),
  ('wide_resnet18_2.0', 'none', 45.62, 6.696),
  ('wide_resnet18_2.0', 'se', 45.97, 6.696),
  ('wide_resnet18_2.0', 'cbam', 45.97, 6.697),
  ('resnext50_32x4d', 'none', 25.03, 3.768),
  ('resnext50_32x4d', 'se', 27.56, 3.771),
  ('resnext50_32x4d', 'cbam', 27.56, 3.774),
  ('resnext101_32x4d', 'none', 44.18, 7.508),
  ('resnext101_32x4d', 'se', 48.96, 7.512),
  ('resnext101_32x4d', 'cbam', 48.96, 7.519),
]
TABLE_5 = [
  ('mobilenet_v1 width 0.7', 'none', 2.30, 0.283),
  ('mobilenet_v1 width 0.7', 'se', 2.71, 0.283),
  ('mobilenet_v1 width 0.7', 'cbam', 2.71, 0.289),
  ('mobilenet_v1 width 1.0', 'none', 4.23, 0.569),
  ('mobilenet_v1 width 1.0', 'se', 5.07, 0.570),
  ('mobilenet_v1 width 1.0', 'cbam', 5.07, 0.576),
]
# Park et al., BAM: Bottleneck Attention Module, BMVC 2018; it prints some of the GFLOPs otherwise.
BAM_PARAMS = [('resnet50', 25.92), ('resnet18', 11.71), ('mobilenet_v1 width 1.0', 4.32)]

# Table 2: fields of CBAM in ResNet-50, parameters in millions, GFLOPs. Two printed GFLOPs cannot
# be right: 3.860 for the channel gate with both pools is that of one pool, and 3.862 for the 1x1
# convolution with k = 3 is less than the 1x1 convolutions alone take.
TABLE_2 = [
  ({'order': 'channel_only', 'pools': ('avg',)}, 28.09, 3.860),
  ({'order': 'channel_only'}, 28.09, 3.863),
  ({'spatial_pool': 'conv1x1', 'spatial_kernel': 3}, 28.10, 3.869),
  ({'spatial_pool': 'conv1x1', 'spatial_kernel': 7}, 28.10, 3.869),
  ({'spatial_kernel': 3}, 28.09, 3.863),
  ({'spatial_kernel': 7}, 28.09, 3.864),
]

# From the implementations that everyone uses: torchvision's documentation for plain networks, the
# CBAM authors' code for the rest.
EXACT = [
  ('resnet18', 'none', 11_689_512),
  ('resnet34', 'none', 21_797_672),
  ('resnet50', 'none', 25_557_032),
  ('resnet101', 'none', 44_549_160),
  ('resnet152', 'none', 60_192_808),
  ('wide_resnet50_2', 'none', 68_883_240),
  ('resnext50_32x4d', 'none', 25_028_904),
  ('vgg16', 'none', 138_357_544),
  ('resnet18', 'cbam', 11_779_392),
  ('resnet50', 'cbam', 28_089_624),
]


def costs(name, attention):
  """What the network of the paper costs: bottlenecks take the stage's step in their first 1x1."""
  name, *width = name.split(' width ')
  fields = {'width': float(*width)} if width else {'stride_in_1x1': True}
  return summary(create_model(name, attention=attention, **fields))


def printed(cost, digits, unit):
  return f'{cost / unit:.{digits}f}'


@pytest.mark.parametrize(
  ('name', 'attention', 'params', 'gflops'),
  [
    pytest.param(*row, marks=pytest.mark.slow if '101' in row[0] else ())
    for row in TABLE_4 + TABLE_5
  ],
)
def test_tables_4_and_5(name, attention, params, gflops):
  cost = costs(name, attention)
  assert printed(cost.params, 2, 1e6) == f'{params:.2f}'
  assert printed(cost.multiply_adds, 3, 1e9) == f'{gflops:.3f}'


@pytest.mark.parametrize(
  ('fields', 'params', 'gflops'),
  [pytest.param(*row, marks=pytest.mark.slow if i % 3 else ()) for i, row in enumerate(TABLE_2)],
)
def test_table_2(fields, params, gflops):
  cost = costs('resnet50', functools.partial(CBAM, **fields))
  assert printed(cost.params, 2, 1e6) == f'{params:.2f}'
  assert printed(cost.multiply_adds, 3, 1e9) == f'{gflops:.3f}'


@pytest.mark.parametrize(('name', 'params'), BAM_PARAMS)
def test_bam(name, params):
  cost = costs(name, 'bam')
  assert printed(cost.params, 2, 1e6) == f'{params:.2f}'
  if name == 'resnet50':
    assert printed(cost.multiply_adds, 2, 1e9) == '3.94'


@pytest.mark.parametrize(('name', 'attention', 'params'), EXACT)
def test_exact_parameters(name, attention, params):
  model = create_model(name, attention=attention)
  images = jnp.ones((1, 32, 32, 3))
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  assert sum(leaf.size for leaf in jax.tree.leaves(variables['params'])) == params


def test_every_network_is_pinned():
  pinned = {row[0].split(' width ')[0] for row in TABLE_4 + TABLE_5 + EXACT}
  assert pinned == set(list_models())


def test_tables_are_the_papers(pytestconfig):
  path = pytestconfig.rootpath.parent / 'shared' / 'paper' / 'tables.json'
  if not path.is_file():
    pytest.skip(f'no {path} to compare with')
  tables = json.loads(path.read_text())
  for ours, name in ((TABLE_4, 'table4_imagenet'), (TABLE_5, 'table5_imagenet_mobilenet')):
    assert ours == [tuple(row[:4]) for row in tables[name]]
  theirs = [row[1:3] for row in tables['table2_spatial_attention_resnet50']['rows']]
  ours = [list(row[1:]) for row in TABLE_2]
  differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
  assert differ == [1, 2]  # Explained above.
