import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import summary
from tests.models.networks import make


def shapes(model, side=32):
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, side, side, 3)), train=False)
  )
  return jax.tree.map(jnp.shape, variables['params'])


def test_basic_block_projects_only_where_shapes_change():
  # A projection in every block would pass a test of shapes: ResNet-18 would have 12,043,816.
  params = shapes(make('resnet34'))
  with_shortcut = [
    (stage, block)
    for stage, blocks in params.items()
    for block, parts in blocks.items()
    if 'shortcut' in parts
  ]
  assert with_shortcut == [('stage2', 'block1'), ('stage3', 'block1'), ('stage4', 'block1')]


def test_bottleneck_projects_in_every_first_block():
  params = shapes(make('resnet50'))
  assert [len(params[f'stage{i}']) for i in (1, 2, 3, 4)] == [3, 4, 6, 3]
  for stage in (f'stage{i}' for i in (1, 2, 3, 4)):
    assert [b for b in params[stage] if 'shortcut' in params[stage][b]] == ['block1']


@pytest.mark.parametrize(
  ('name', 'inner', 'kernel'),
  [
    ('resnet50', 64, (3, 3, 64, 64)),
    ('wide_resnet50_2', 128, (3, 3, 128, 128)),
    ('resnext50_32x4d', 128, (3, 3, 4, 128)),
  ],
)
def test_widths_of_bottlenecks(name, inner, kernel):
  block = shapes(make(name))['stage1']['block1']
  assert block['conv1']['kernel'] == (1, 1, 64, inner)
  assert block['conv2']['kernel'] == kernel
  assert block['conv3']['kernel'] == (1, 1, inner, 256)
  assert block['shortcut']['conv']['kernel'] == (1, 1, 64, 256)


@pytest.mark.parametrize('name', ['wide_resnet18_1.5', 'wide_resnet18_2.0'])
def test_stem_of_the_wide_ones_stays_at_64(name):
  params = shapes(make(name))
  assert params['stem']['conv']['kernel'] == (7, 7, 3, 64)
  width = int(64 * float(name.split('_')[-1]))
  assert params['stage1']['block1']['conv1']['kernel'] == (3, 3, 64, width)


@pytest.mark.parametrize(('stem', 'kernel', 'side'), [('imagenet', 7, 8), ('cifar', 3, 32)])
def test_stems(stem, kernel, side):
  model = make('resnet18', stem=stem)
  assert shapes(model)['stem']['conv']['kernel'] == (kernel, kernel, 3, 64)
  assert summary(model, image_size=32).stages[1].output_shape == (side, side, 64)


def test_stride_in_1x1():
  v1, v15 = (make('resnet50', stride_in_1x1=first, num_classes=1000) for first in (True, False))
  assert shapes(v1) == shapes(v15)
  cost1, cost15 = summary(v1), summary(v15)
  assert f'{cost1.multiply_adds / 1e9:.3f} {cost15.multiply_adds / 1e9:.3f}' == '3.858 4.089'
  # In the 3x3, the first 1x1 of stage 2 (256 to 128) runs at 56x56 instead of 28x28.
  difference = cost15.stages[2].multiply_adds - cost1.stages[2].multiply_adds
  assert difference == 256 * 128 * (56 * 56 - 28 * 28)
  assert [stage.output_shape for stage in cost1.stages] == [
    stage.output_shape for stage in cost15.stages
  ]


def test_basic_blocks_have_no_1x1_to_step_in():
  v1, v15 = (make('resnet18', stride_in_1x1=first) for first in (True, False))
  assert summary(v1) == summary(v15)


def test_initial_values():
  """Kaiming fan out for convolutions, fan in for the classifier; scales 1, biases 0."""
  model = make('resnet18', 'cbam', num_classes=100, stage_sizes=(1,))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    *where, last = (part.key for part in path)
    if last == 'bias':
      np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    elif last == 'scale':
      initial = 0 if 'spatial' in where else 1
      np.testing.assert_array_equal(leaf, np.full(leaf.shape, initial))
    elif 'mlp' not in where:
      *positions, inputs, outputs = leaf.shape
      fan = inputs if where == ['head'] else np.prod(positions) * outputs
      # Five standard errors of a standard deviation.
      tolerance = 5 / np.sqrt(2 * leaf.size)
      np.testing.assert_allclose(np.std(leaf), np.sqrt(2 / fan), rtol=tolerance)
