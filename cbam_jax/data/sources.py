"""Where examples come from: anything with a length and random access."""

from __future__ import annotations

import numpy as np

from cbam_jax.data.folder import FolderSource
from cbam_jax.data.records import Record, Source
from cbam_jax.errors import UserError, check_choice, near, require

SPLITS = ('train', 'test')


class ArraySource:
  """Examples held in memory.

  Attributes:
    images: uint8 (n, H, W, C).
    labels: Integers (n,).
    num_classes: One more than the highest label.
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
      raise UserError(
        f'images are {images.dtype} {images.shape} and labels {labels.shape}; give uint8 images '
        '(n, H, W, C) and one label for each.'
      )
    self.images = images
    self.labels = labels
    self.num_classes = int(np.max(labels, initial=-1)) + 1

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
  if split == 'train':
    return ArraySource(train_images, train_labels)
  return ArraySource(test_images, test_labels)


# tensorflow-datasets calls the set that ImageNet is evaluated on its validation split.
TFDS_SPLITS = {'train': ('train',), 'test': ('validation', 'test')}


class TfdsSource:
  """A prepared tensorflow-datasets set, read without TensorFlow; images stay encoded.

  Raises:
    UserError: If the set is unknown, not of labelled images, or not prepared under `data_dir` as
      ArrayRecord.
  """

  def __init__(self, name: str, split: str, data_dir: str | None):
    tfds = require('tensorflow_datasets', 'train')
    try:
      builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
      dataset = name.split('/')[0].split(':')[0]
      # The community's sets are listed over the network, and with TensorFlow.
      known = set(tfds.list_builders(with_community_datasets=False))
      raise UserError(
        f'tensorflow-datasets has no set {dataset!r}, nor is one of that name prepared under '
        f'data.dir={data_dir!r}.{near(dataset, known)} All of them: '
        'https://www.tensorflow.org/datasets/catalog.'
      ) from error
    except (AssertionError, ImportError, ValueError) as error:
      raise UserError(
        f'{name!r} is no version or variant of a tensorflow-datasets set: {error}'
      ) from error
    available = [s for s in TFDS_SPLITS[split] if s in builder.info.splits]
    if not available:
      raise UserError(
        f'{name} has no {split} split prepared under {builder.data_dir!r}; prepare it there as '
        'ArrayRecord (tfds build --file_format=array_record), or name another --config.data.dir.'
      )
    if missing := {'image', 'label'} - set(builder.info.features):
      raise UserError(
        f'the examples of {name} have no {" and no ".join(sorted(missing))}; choose a set for '
        'image classification.'
      )
    self.num_classes = builder.info.features['label'].num_classes
    try:
      self._records = builder.as_data_source(
        split=available[0], decoders={'image': tfds.decode.SkipDecoding()}
      )
    except NotImplementedError as error:
      raise UserError(
        f'{name} is prepared under {builder.data_dir!r}, but not as ArrayRecord; prepare it '
        'elsewhere (tfds build --file_format=array_record) and name that --config.data.dir.'
      ) from error

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    record = self._records[index]
    return {'image': record['image'], 'label': int(record['label'])}


def open_source(name: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a set of examples.

  Args:
    name: 'digits'; 'folder' for pictures in one folder a class; or 'tfds:NAME' for any set of
      tensorflow-datasets, such as 'tfds:imagenet2012'.
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
  raise UserError(
    f"the data set is {name!r}; allowed: 'digits', 'folder' for pictures of your own, or "
    "'tfds:NAME' for a set of tensorflow-datasets, such as 'tfds:imagenet2012'."
  )
