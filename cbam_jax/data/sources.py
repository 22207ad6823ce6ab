"""Where examples come from: anything with a length and random access."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cbam_jax.data.folder import FolderSource
from cbam_jax.data.prepared import TfdsSource
from cbam_jax.data.records import Record, Source
from cbam_jax.data.synthetic import SyntheticSource
from cbam_jax.errors import UserError, check_choice, require

SPLITS = ('train', 'test')


class ArraySource:
  """Examples held in memory.

  Attributes:
    images: uint8 (n, H, W, C).
    labels: Integers (n,).
    num_classes: One more than the highest label.
    classes: Names of the classes; None if they have none.
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None = None):
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
      raise UserError(
        f'images are {images.dtype} {images.shape} and labels {labels.shape}; give uint8 images '
        '(n, H, W, C) and one label for each.'
      )
    self.images = images
    self.labels = labels
    self.num_classes = int(np.max(labels, initial=-1)) + 1
    self.classes = classes

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Record:
    return {'image': self.images[index], 'label': int(self.labels[index])}


def digits(split: str) -> ArraySource:
  """The handwritten digits that scikit-learn ships: 1,797 scans of 8x8 in ten classes.

  A fixed fifth of each class (360 images) is the test set.
  """
  require('sklearn', 'train')
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  scans, labels = load_digits(return_X_y=True)
  # The 17 grey levels 0 to 16, spread over a byte.
  images = np.round(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
  train_images, test_images, train_labels, test_labels = parts
  names = [str(digit) for digit in range(10)]
  if split == 'train':
    return ArraySource(train_images, train_labels, names)
  return ArraySource(test_images, test_labels, names)


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a set of examples.

  Args:
    name: 'digits'; 'folder' for pictures in one folder a class; 'tfds:NAME' for any set of
      tensorflow-datasets, such as 'tfds:imagenet2012'; or 'synthetic' for noise of 224x224 in 1000
      classes, 'synthetic:32,10' for noise of 32x32 in 10.
    split: 'train' or 'test'.
    data_dir: Where the pictures are, or where tensorflow-datasets looks; None for its default,
      ~/tensorflow_datasets.

  Raises:
    UserError: On an unknown name or split, or a set that is not there.
  """
  check_choice('the split', split, SPLITS)
  if name == 'digits':
    return digits(split)
  if name.startswith('tfds:'):
    return TfdsSource(name.removeprefix('tfds:'), split, data_dir)
  if name == 'folder':
    if data_dir is None:
      raise UserError("the data set is 'folder'; name its root with --config.data.dir=DIR.")
    return FolderSource(data_dir, split)
  if name == 'synthetic':
    return SyntheticSource(split)
  if match := re.fullmatch(r'synthetic:(\d+),(\d+)', name):
    return SyntheticSource(split, int(match[1]), int(match[2]))
  raise UserError(
    f"the data set is {name!r}; allowed: 'digits', 'folder' for pictures of your own, "
    "'tfds:NAME' for a set of tensorflow-datasets, such as 'tfds:imagenet2012', or 'synthetic' "
    "for noise ('synthetic:SIDE,CLASSES' for noise of another size)."
  )
