import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import UserError, summary
from cbam_jax.models.vgg import adaptive_mean_pool
from tests.layers.random_variables import random_features
from tests.marks import first
from tests.models.networks import make


@pytest.mark.parametrize('sides', first(3, [(10, 9), (3, 5), (7, 7), (14, 7), (1, 1), (8, 20)]))
def test_adaptive_mean_pool(sides):
  x = random_features((2, *sides, 3), dtype=np.float32)
  y = adaptive_mean_pool(x, 7)
  expected = np.zeros((2, 7, 7, 3))
  h, w = sides
  for i in range(7):
    for j in range(7):
      rows = slice(int(np.floor(i * h / 7)), int(np.ceil((i + 1) * h / 7)))
      columns = slice(int(np.floor(j * w / 7)), int(np.ceil((j + 1) * w / 7)))
      expected[:, i, j] = np.asarray(x)[:, rows, columns].mean((1, 2))
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_adaptive_mean_pool_is_float32_at_the_least():
  assert adaptive_mean_pool(jnp.ones((1, 8, 8, 2), jnp.bfloat16), 7).dtype == jnp.float32


@pytest.mark.parametrize('side', [32, 64, 224, 256])
def test_any_size_of_image_meets_the_dense_layers(side):
  model = make('vgg16')
  logits, variables = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), jnp.ones((1, side, side, 3)), train=False)
  )
  assert logits.shape == (1, 5)
  assert variables['params']['fc1']['kernel'].shape == (7 * 7 * 512, 4096)


@pytest.mark.parametrize('side', [1, 8, 15, 16, 31])
def test_images_too_small_for_five_pools(side):
  # They would leave nothing to average, whose mean is not a number.
  with pytest.raises(UserError, match='arger'):
    jax.eval_shape(
      lambda: make('vgg16').init(jax.random.key(0), jnp.ones((1, side, side, 3)), train=False)
    )


def test_both_stems_are_the_same():
  assert summary(make('vgg16', stem='cifar')) == summary(make('vgg16', stem='imagenet'))


def test_rows():
  stages = summary(make('vgg16', num_classes=1000)).stages
  assert [stage.name for stage in stages] == [
    *(f'stage{i}' for i in range(1, 6)),
    'fc1',
    'fc2',
    'head',
  ]
  assert [stage.params for stage in stages[-3:]] == [102_764_544, 16_781_312, 4_097_000]
