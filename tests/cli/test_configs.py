"""The experiments of configs/: that they are the paper's, and can be run."""

from pathlib import Path

import jax
import pytest

from cbam_jax import list_models
from cbam_jax.cli.train import load_config
from cbam_jax.models.registry import ATTENTIONS
from cbam_jax.training.config import validate
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.optimizer import learning_rate_schedule

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
IMAGENET = str(CONFIGS / 'imagenet.py')
DIGITS = str(CONFIGS / 'digits.py')


def test_imagenet_is_the_papers_recipe():
  config = load_config(IMAGENET)
  assert (config.model.name, config.model.attention) == ('resnet50', 'cbam')
  assert config.model.num_classes == 1000
  assert config.model.stem == 'imagenet'
  assert config.batch_size == 256
  assert config.epochs == 90
  assert config.label_smoothing == 0
  assert config.dtype == 'float32'
  # Each of the paper's four devices normalised its own 64 examples.
  assert config.model.group_size == 64

  optimizer = config.optimizer
  assert optimizer.momentum == 0.9
  assert optimizer.nesterov is False
  assert optimizer.weight_decay == 1e-4
  assert optimizer.warmup_epochs == 0
  schedule = learning_rate_schedule(
    optimizer.schedule,
    optimizer.learning_rate,
    steps_per_epoch=5004,
    epochs=config.epochs,
    step_epochs=optimizer.step_epochs,
  )
  epochs = {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001}
  for epoch, rate in epochs.items():
    assert float(schedule(epoch * 5004)) == pytest.approx(rate)

  data = config.data
  assert data.name == 'tfds:imagenet2012'
  assert data.augmentation == 'crop_flip'
  assert (data.image_size, data.resized_side) == (224, 256)
  assert data.mean == (0.485, 0.456, 0.406)
  assert data.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('network', list_models())
def test_every_variant_of_imagenet_can_be_run(monkeypatch, network, attention):
  config = load_config(f'{IMAGENET}:{network},{attention}')
  assert config.model.name == network
  assert config.model.attention == attention
  for devices in (1, 2, 4, 8):
    monkeypatch.setattr(jax, 'device_count', lambda devices=devices: devices)
    validate(config)


@pytest.mark.parametrize('devices', [1, 2, 4, 8])
def test_digits_can_be_run(monkeypatch, devices):
  config = load_config(DIGITS)
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  validate(config)


def test_digits_fit_their_network():
  experiment = Experiment(load_config(DIGITS))
  assert experiment.steps_per_epoch == 22
  assert experiment.total_steps == 880
  # The whole test set is one batch.
  assert experiment.config.eval_batch_size == len(experiment.test_source)
  kernel = experiment.abstract_state.params['stem']['conv']['kernel']
  assert kernel.shape == (3, 3, 1, 64)
  pixels = experiment.train_source.images / 255
  assert experiment.config.data.mean[0] == pytest.approx(pixels.mean(), abs=0.02)
  assert experiment.config.data.std[0] == pytest.approx(pixels.std(), abs=0.02)
