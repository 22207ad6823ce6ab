"""The experiments of configs/: that they are the paper's, and can be run."""

import importlib.resources
import io
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cbam_jax import list_models
from cbam_jax.cli.train import load_config
from cbam_jax.data import train_batches
from cbam_jax.errors import UserError
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


def test_the_modern_recipe_of_imagenet():
  config = load_config(f'{IMAGENET}:resnet101,se,modern')
  assert (config.model.name, config.model.attention) == ('resnet101', 'se')
  assert config.dtype == 'bfloat16'
  assert config.optimizer.learning_rate / config.batch_size == pytest.approx(0.1 / 256)
  assert config.optimizer.schedule == 'cosine'
  assert config.optimizer.warmup_epochs > 0
  assert config.optimizer.decay == 'kernels'
  assert config.label_smoothing == 0.1
  assert config.average_decay > 0.999
  assert config.data.mixing == 'mixup_or_cutmix'
  assert config.data.augmentation == 'crop_flip_randaugment'
  validate(config)
  assert load_config(f'{IMAGENET}:resnet50,cbam,paper') == load_config(IMAGENET)


# ---- every file, on miniatures of its data ---------------------------------------------------


def picture(side: int, level: int, suffix: str, mode: str = 'RGB') -> io.BytesIO:
  file = io.BytesIO()
  pixels = np.random.default_rng(level).integers(0, 256, (side, side, 3), np.uint8)
  Image.fromarray(pixels).convert(mode).save(file, suffix)
  file.seek(0)
  return file


def prepare(name: str, folder: Path) -> str:
  """Prepares a miniature of a tensorflow-datasets set by its own builder."""
  tfds = pytest.importorskip('tensorflow_datasets')
  make = {
    'imagenet2012': lambda i: {'image': picture(40, i, 'JPEG'), 'file_name': f'{i}.JPEG'},
    'cifar10': lambda i: {'image': picture(32, i, 'PNG'), 'id': str(i)},
    'fashion_mnist': lambda i: {'image': picture(28, i, 'PNG', 'L')},
  }[name]
  sizes = {'train': 16, 'validation' if name == 'imagenet2012' else 'test': 8}
  builder = tfds.builder(name, data_dir=folder, file_format='array_record')
  with pytest.MonkeyPatch.context() as patch:
    splits = {
      split: [(str(i), {'label': i % 10, **make(i)}) for i in range(size)]
      for split, size in sizes.items()
    }
    patch.setattr(type(builder), '_split_generators', lambda self, downloads: splits)
    # The backport that tensorflow-datasets asks for, in an environment that does without it.
    patch.setitem(sys.modules, 'importlib_resources', importlib.resources)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
  return str(folder)


def lay_out(folder: Path) -> str:
  """Three classes of one's own pictures, of several sizes and kinds of file."""
  for split, count in (('train', 6), ('test', 3)):
    for name in ('cat', 'dog', 'owl'):
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        suffix, mode = (('jpeg', 'RGB'), ('png', 'L'))[i % 2]
        file = folder / split / name / f'{i}.{suffix}'
        file.write_bytes(picture(36 + 3 * i, i, suffix, mode).getvalue())
  return str(folder)


@pytest.mark.parametrize(
  ('file', 'data'),
  [
    pytest.param('digits', None, marks=pytest.mark.slow),
    pytest.param('imagenet:resnet18,cbam,modern', 'imagenet2012', marks=pytest.mark.slow),
    pytest.param('finetune', 'pictures', marks=pytest.mark.slow),
    pytest.param('imagenet:resnet18,cbam', 'imagenet2012', marks=pytest.mark.slow),
    pytest.param('cifar10', 'cifar10', marks=pytest.mark.slow),
    pytest.param('fashion_mnist', 'fashion_mnist', marks=pytest.mark.slow),
    pytest.param('folder', 'pictures', marks=pytest.mark.slow),
  ],
)
def test_every_file_takes_a_step_on_its_data(tmp_path, file, data):
  overrides = [
    '--config.batch_size=16',
    '--config.eval_batch_size=8',
    '--config.data.workers=0',
    '--config.model.fields.width=0.125',
    '--config.model.fields.stage_sizes=(1,)',
  ]
  if file.startswith('imagenet'):
    overrides += ['--config.model.group_size=8']
  if file.startswith('imagenet') or data == 'pictures':
    overrides += ['--config.data.image_size=32', '--config.data.resized_side=36']
  if data:
    folder = lay_out(tmp_path) if data == 'pictures' else prepare(data, tmp_path)
    overrides += [f'--config.data.dir={folder}']
  experiment = Experiment(load_config(file, overrides))
  state = experiment.new_state()
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, experiment.abstract_state)
  (batch,) = train_batches(
    experiment.train_source,
    experiment.train_transform,
    experiment.config.batch_size,
    seed=0,
    start_step=0,
    stop_step=1,
  )
  before = jax.device_get(state.params)
  state, metrics = experiment.train_step(state, batch)
  assert int(state.bad_steps) == 0
  assert float(metrics['count']) == 16
  # Without a warm-up the first step moves the network; with one its rate is 0.
  moved = any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, before, state.params))))
  assert moved == (experiment.config.optimizer.warmup_epochs == 0)
  tested = {None: 360, 'pictures': 9}.get(data, 8)
  assert experiment.evaluate(state.variables)['count'] == tested
  if data == 'pictures':
    assert experiment.config.model.num_classes == 3


def test_a_folder_needs_its_name():
  with pytest.raises(UserError, match=r'name its root with --config.data.dir=DIR'):
    Experiment(load_config('folder'))


def test_pictures_that_cannot_be_read_are_passed_over_at_the_start(tmp_path):
  folder = Path(lay_out(tmp_path))
  first, *others = sorted((folder / 'test').rglob('*.*'))
  first.write_bytes(b'no picture')
  config = load_config('folder', [f'--config.data.dir={folder}', '--config.batch_size=16'])
  assert len(Experiment(config).test_source) == 9
  for file in others:
    file.write_bytes(b'no picture')
  with pytest.raises(UserError, match='none of the first 9 test images of folder can be read'):
    _ = Experiment(config).test_source


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
