"""Sets that tensorflow-datasets has prepared, read without TensorFlow."""

from __future__ import annotations

from typing import Any

from cbam_jax.data.records import Record
from cbam_jax.errors import UserError, near, require

# ImageNet's test images have no labels, so that all evaluate on its validation split.
UNLABELLED_TESTS = ('imagenet2012',)


class TfdsSource:
  """A prepared tensorflow-datasets set; images stay encoded.

  Attributes:
    num_classes: How many classes there are.
    classes: Their names.

  Raises:
    UserError: If the set is unknown, not of labelled images, or not prepared under `data_dir` as
      ArrayRecord.
  """

  def __init__(self, name: str, split: str, data_dir: str | None):
    tfds = require('tensorflow_datasets', 'train')
    builder = find_builder(name, data_dir)
    available = [s for s in _splits(builder.name, split) if s in builder.info.splits]
    if not available:
      raise UserError(
        f'{name} has no {split} split prepared under {str(builder.data_dir)!r}; prepare it with '
        f'`cbam-jax prepare {name} --data-dir DIR`, or name where it is in --config.data.dir.'
      )
    self.num_classes = builder.info.features['label'].num_classes
    self.classes = builder.info.features['label'].names
    check_format(name, builder)
    # The folder's own builder reads a format that was added to the first one, too.
    self._records = tfds.builder_from_directory(builder.data_dir).as_data_source(
      split=available[0], decoders={'image': tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    record = self._records[index]
    return {'image': record['image'], 'label': int(record['label'])}


def _splits(name: str, split: str) -> tuple[str, ...]:
  """What tensorflow-datasets may call a split, the preferred name first."""
  if split == 'train':
    return ('train',)
  return ('validation',) if name in UNLABELLED_TESTS else ('test', 'validation')


def find_builder(name: str, data_dir: str | None) -> Any:
  """The builder of a set of labelled images, whether that is prepared under `data_dir` or not.

  Raises:
    UserError: If there is no set of that name, or it has other examples.
  """
  tfds = require('tensorflow_datasets', 'train')
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    dataset = name.split('/')[0].split(':')[0]
    # The community's sets are listed over the network, and with TensorFlow.
    known = set(tfds.list_builders(with_community_datasets=False))
    raise UserError(
      f'tensorflow-datasets has no set {dataset!r}, nor is one of that name prepared under '
      f'{data_dir!r}.{near(dataset, known)} All of them: '
      'https://www.tensorflow.org/datasets/catalog.'
    ) from error
  except (AssertionError, ImportError, ValueError) as error:
    raise UserError(
      f'{name!r} is no version or variant of a tensorflow-datasets set: {error}'
    ) from error
  except Exception as error:  # a damaged folder makes it raise nearly anything
    raise UserError(
      f'{name} under {data_dir!r} cannot be opened ({error}); prepare it anew with '
      f'`cbam-jax prepare {name} --data-dir DIR`.'
    ) from error
  if missing := {'image', 'label'} - set(builder.info.features or {}):
    raise UserError(
      f'the examples of {name} have no {" and no ".join(sorted(missing))}; choose a set for '
      'image classification.'
    )
  if not isinstance(builder.info.features['label'], tfds.features.ClassLabel):
    raise UserError(
      f'the labels of {name} are {builder.info.features["label"]}, not one class an image; choose '
      'a set for image classification.'
    )
  return builder


def check_format(name: str, builder: Any) -> None:
  """Raises `UserError` unless a prepared set is there as ArrayRecord."""
  tfds = require('tensorflow_datasets', 'train')
  info = tfds.builder_from_directory(builder.data_dir).info
  if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
    raise UserError(
      f'{name} is prepared, but not as ArrayRecord. This adds it, where '
      "pip install 'cbam-jax[prepare]' was run:\n"
      f'tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record'
    )
