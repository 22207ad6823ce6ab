"""What a network is evaluated on: images made to fit it, labels that mean its classes."""

import shutil
import types

import jax
import numpy as np
import PIL.Image
import pytest

from cbam_jax import create_model
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError
from cbam_jax.interop.pretrained import Pretrained
from cbam_jax.training.evaluation import _check_classes, evaluate, evaluate_network


def with_classes(names):
  """What has a test set with classes of these names."""
  return types.SimpleNamespace(test_source=types.SimpleNamespace(classes=names))


@pytest.mark.parametrize(
  ('network', 'data_set'),
  [
    (None, ['cat', 'dog']),
    (['cat', 'dog'], None),
    (['cat', 'dog'], ['cat', 'dog']),
    (['cat', 'dog', 'class 2'], ['cat', 'dog']),
    (['sea  cat', 'dog'], ['sea  cat', 'dog']),
    (['sea cat', 'dog'], ['sea  cat', 'dog']),
    (['cat', 'dog'], ['n02121808', 'n02084071']),
  ],
)
def test_names_that_agree_or_tell_nothing_pass(network, data_set):
  _check_classes(network, with_classes(data_set))


@pytest.mark.parametrize('data_set', [['dog', 'cat'], ['ant', 'cat', 'dog']])
def test_names_in_other_places_are_refused(data_set):
  with pytest.raises(UserError, match=f"class 0 is 'cat' to the network and '{data_set[0]}'"):
    _check_classes(['cat', 'dog'], with_classes(data_set))


def test_images_are_made_to_fit_the_network(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(4):  # in colour, and of several sizes
    path = tmp_path / 'test' / f'class{i % 2}' / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), dtype=np.uint8)).save(path)
  model = create_model('tiny', num_classes=2)
  variables = model.init(jax.random.key(0), np.zeros((1, 6, 6, 1), np.float32), train=False)
  grey = Pretrained(model, variables, Preprocessing(6, None, mean=(0.3,), std=(0.2,)), None)
  metrics = evaluate_network(grey, 'folder', str(tmp_path))
  assert (metrics['count'], metrics['unread']) == (4, 0)


def test_a_run_is_not_evaluated_on_its_classes_in_other_places(tiny_config, train, tmp_path):
  rng = np.random.default_rng(0)
  pictures = tmp_path / 'pictures'
  for i in range(60):
    split, label = ('test', 'train')[i % 5 > 0], 'abc'[i % 3]
    path = pictures / split / label / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).save(path)
  tiny_config.data.name, tiny_config.data.dir = 'folder', str(pictures)
  tiny_config.data.mean = tiny_config.data.std = (0.3,) * 3
  tiny_config.epochs = 1
  train(tiny_config, tmp_path / 'run')
  assert evaluate(str(tmp_path / 'run'))['count'] == 12
  shutil.rmtree(pictures / 'train')
  shutil.rmtree(pictures / 'test' / 'a')
  with pytest.raises(UserError, match="class 0 is 'a' to the network and 'b' in the data"):
    evaluate(str(tmp_path / 'run'))
