"""Whoever runs a network compiles it with `compiler_options`."""

import jax
import numpy as np
import pytest

from cbam_jax.cli import predict
from cbam_jax.cli.config_file import load_config
from cbam_jax.explain import scoring, views
from cbam_jax.training import experiment
from tests.cli.trained import network, picture, write_pictures

IMAGES = np.stack([picture(height=32, width=32)])


@pytest.fixture(autouse=True)
def _unheard_of(monkeypatch):
  for module in (experiment, predict, scoring, views):
    monkeypatch.setattr(module, 'compiler_options', lambda: {'xla_unheard_of': '1'})


def refused():
  return pytest.raises(jax.errors.JaxRuntimeError, match='xla_unheard_of')


def test_training():
  run = experiment.Experiment(load_config('digits'))
  state = run.new_state()
  with refused():
    run.evaluate(state.variables)
  batch = {'image': np.zeros((64, 8, 8, 1), np.uint8), 'label': np.zeros(64, np.int32)}
  with refused():
    run.train_step(state, batch | {'mask': np.ones(64, bool)})


def test_predict(tmp_path):
  with refused():
    list(predict.predictions(network(), list(write_pictures(tmp_path).iterdir()), 1))


def test_explain():
  with refused():
    list(views.view(network(), 'a network', IMAGES))


def test_the_pointing_game():
  seen = network()
  with refused():
    scoring._compiled(seen, 'stage2', 'grad_cam')(seen.variables, IMAGES, np.zeros(1, np.int32))
