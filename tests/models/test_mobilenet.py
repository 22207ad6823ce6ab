import jax
import jax.numpy as jnp
import pytest

from cbam_jax import summary
from tests.models.networks import make


def shapes(model):
  variables = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False)
  )
  return jax.tree.map(jnp.shape, variables['params'])


@pytest.mark.parametrize(
  ('width', 'channels'),
  [
    (1.0, [32, 64, 128, 256, 512, 1024]),
    (0.7, [22, 44, 89, 179, 358, 716]),
    (0.5, [16, 32, 64, 128, 256, 512]),
  ],
)
def test_width(width, channels):
  params = shapes(make('mobilenet_v1', width=width))
  pointwise = [params[f'stage{i}']['block1']['pointwise'] for i in range(1, 6)]
  found = [part['conv']['kernel'][-1] for part in (params['stem'], *pointwise)]
  assert found == channels
  assert params['head']['kernel'] == (channels[-1], 5)


def test_hidden_sizes_of_the_narrow_one():
  # Rounded, not truncated: 22 / 16 is 1, 44 / 16 is 3, 89 / 16 is 6, 179 / 16 is 11.
  params = shapes(make('mobilenet_v1', 'cbam', width=0.7))
  pointwise = [params[f'stage{i}']['block1']['pointwise'] for i in range(1, 6)]
  hidden = [
    part['attention']['channel']['mlp']['fc1']['kernel'][-1]
    for part in (params['stem'], *pointwise)
  ]
  assert hidden == [1, 3, 6, 11, 22, 45]


def test_depthwise_convolutions_are_depthwise():
  params = shapes(make('mobilenet_v1'))
  assert params['stage1']['block1']['depthwise']['conv']['kernel'] == (3, 3, 1, 32)
  assert params['stage4']['block2']['depthwise']['conv']['kernel'] == (3, 3, 1, 512)


@pytest.mark.parametrize(('stem', 'side'), [('imagenet', 16), ('cifar', 32)])
def test_stem(stem, side):
  stages = summary(make('mobilenet_v1', stem=stem), image_size=32).stages
  assert [stage.output_shape[0] for stage in stages[1:-1]] == [
    side,
    side // 2,
    side // 4,
    side // 8,
    side // 16,
  ]
