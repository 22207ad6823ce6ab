"""A network and a data set small enough for whole runs of them to be quick."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from rich.console import Console

from cbam_jax.data.sources import ArraySource
from cbam_jax.models import registry
from cbam_jax.models.base import Classifier
from cbam_jax.training import experiment, loop
from cbam_jax.training.config import default_config


class TinyNet(Classifier):
  """A convolution, a batch norm and the attention."""

  @nn.compact
  def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Every stage's output; see `Classifier.features`."""
    x = self.conv(8, (3, 3), name='conv')(self.prepare(images))
    x = nn.relu(self.norm(name='norm')(x, train=train))
    if self.attention is not None:
      x = self.attention(name='attention')(x, train=train)
    return {'stage1': x}


def tiny_source(split: str) -> ArraySource:
  """Noisy images of three classes: rows, columns or squares, dark and bright by turns."""
  size, seed = {'train': (70, 1), 'test': (20, 2)}[split]
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, size)
  row, column = np.indices((6, 6))
  patterns = np.stack([row, column, row + column]) % 2
  images = rng.integers(0, 160, (size, 6, 6)) + 60 * patterns[labels]
  return ArraySource(images.astype(np.uint8)[..., None], labels)


@pytest.fixture(autouse=True, scope='module')
def _tiny() -> Iterator[None]:
  """Makes the network and the data set available by the name 'tiny'."""
  real = experiment.open_source

  def open_source(name, split, *args):
    return tiny_source(split) if name == 'tiny' else real(name, split, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.MODELS, 'tiny', TinyNet)
    patch.setattr(experiment, 'open_source', open_source)
    yield


def make_tiny_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.epochs = 3
  config.batch_size = 16
  config.eval_batch_size = 16
  config.log_every_steps = 2
  config.model.name = 'tiny'
  config.model.attention = 'none'
  config.model.num_classes = 3
  config.data.name = 'tiny'
  config.data.image_size = 6
  config.data.resized_side = None
  config.data.augmentation = 'none'
  config.data.mean = (0.3,)
  config.data.std = (0.2,)
  config.optimizer.learning_rate = 0.3
  config.optimizer.step_epochs = 2
  return config


@pytest.fixture
def tiny_config() -> ml_collections.ConfigDict:
  """Three epochs of four steps; 20 test examples in batches of 16."""
  return make_tiny_config()


@pytest.fixture(scope='session')
def train() -> Callable[..., dict[str, float]]:
  """`cbam_jax.training.loop.train` without its output."""
  return lambda config, workdir: loop.train(config, str(workdir), Console(file=io.StringIO()))


@pytest.fixture(scope='module')
def _finished(train, tmp_path_factory) -> tuple[Path, dict[str, float]]:
  folder = tmp_path_factory.mktemp('finished')
  return folder, train(make_tiny_config(), folder)


@pytest.fixture
def finished(_finished, tmp_path) -> tuple[Path, dict[str, float]]:
  """A copy of the folder of a finished run of `tiny_config`, and what `train` returned."""
  folder, result = _finished
  return shutil.copytree(folder, tmp_path / 'finished'), result
