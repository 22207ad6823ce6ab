"""Whoever runs a network on a CPU takes a few images at a time, and finds the same."""

import jax
import numpy as np
import pytest

from cbam_jax.cli import predict
from cbam_jax.cli.config_file import load_config
from cbam_jax.data.boxes import BoxedImage
from cbam_jax.explain import scoring, views
from cbam_jax.layers import parts
from cbam_jax.training.experiment import Experiment
from tests.cli.trained import network, picture, write_pictures

pytestmark = pytest.mark.skipif(
  jax.default_backend() != 'cpu', reason='a batch is whole but on a CPU'
)

BATCH_SIZE = 2 * jax.device_count()


@pytest.fixture
def twice(monkeypatch):
  """Runs something whole and then an image of each device at a time, and gives both results."""
  loops = []
  loop = parts.lax.map

  def counted(function, rows):
    loops.append(len(rows))
    return loop(function, rows)

  monkeypatch.setattr(parts.lax, 'map', counted)
  for module in (scoring, views, predict):
    monkeypatch.setattr(module, 'BATCH_SIZE', BATCH_SIZE)

  def run(function):
    whole = function()
    assert not loops
    with monkeypatch.context() as context:
      context.setattr(parts, '_PIXELS_A_CORE', 1)
      in_parts = function()
    assert loops
    return whole, in_parts

  return run


def assert_alike(whole, in_parts):
  def alike(a, b):
    if isinstance(a, (str, type(None))):
      assert a == b
    else:
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  assert jax.tree.structure(whole) == jax.tree.structure(in_parts)
  jax.tree.map(alike, whole, in_parts)


def test_evaluation(twice):
  variables = Experiment(load_config('digits')).new_state().variables

  def evaluate():
    return Experiment(load_config('digits')).evaluate(variables)

  assert_alike(*twice(evaluate))


def test_predict(twice, tmp_path):
  paths = sorted(write_pictures(tmp_path, 3).iterdir())
  assert_alike(*twice(lambda: list(predict.predictions(network(), paths, 3))))


@pytest.mark.parametrize('method', ['grad_cam', 'eigen_cam'])
@pytest.mark.parametrize('chosen', [None, 1])
def test_views(twice, method, chosen):
  images = np.stack([picture(seed, 32, 32) for seed in range(3)])

  def look():
    return list(views.view(network(), 'a network', images, method=method, chosen=chosen))

  whole, in_parts = twice(look)
  assert len(whole) == 3
  for one, other in zip(whole, in_parts, strict=True):
    assert_alike(one.top, other.top)
    assert_alike(list(one.class_maps), list(other.class_maps))
    assert_alike(one.attention, other.attention)


def test_the_pointing_game(twice, tmp_path):
  paths = sorted(write_pictures(tmp_path, 3).glob('[0-9].jpg'))
  boxed = [BoxedImage(path, np.array([[5.0, 5.0, 30.0, 30.0]]), ('cat',)) for path in paths]

  def score():
    (scores,) = scoring.score_networks([network()], boxed)
    return [(score.hit, score.energy) for score in scores]

  whole, in_parts = twice(score)
  assert len(whole) == 3
  assert_alike(whole, in_parts)
