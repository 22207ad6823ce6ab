import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.random_variables import random_features, random_variables
from tests.marks import first
from tests.models.networks import make


@pytest.mark.slow
def test_computing_again_changes_nothing(x64):
  images, weights = random_features((3, 14, 14, 3)), random_features((3, 5), seed=2)
  plain, remat = (
    make(
      'resnet18',
      'cbam',
      stem='cifar',
      stage_sizes=(1,),
      dtype=jnp.float64,
      param_dtype=jnp.float64,
      remat=remat,
    )
    for remat in (False, True)
  )
  variables = random_variables(plain, images, train=False)

  def run(model):
    def loss(params):
      logits, updates = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      return jnp.sum(logits * weights), updates

    return jax.jit(jax.grad(loss, has_aux=True))(variables['params'])

  def compare(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.max(np.abs(a)))

  jax.tree.map(compare, run(plain), run(remat))


@pytest.mark.parametrize('attention', first(1, ['cbam', 'bam']))
@pytest.mark.parametrize('name', ['resnet50', 'mobilenet_v1', 'vgg16'])
def test_variables_are_the_same(name, attention):
  images = jnp.ones((2, 64, 64, 3))
  plain, remat = (
    jax.eval_shape(
      lambda remat=remat: make(name, attention, remat=remat).init(
        jax.random.key(0), images, train=False
      )
    )
    for remat in (False, True)
  )
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, remat)
