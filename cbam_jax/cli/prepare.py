"""Prepares a set of tensorflow-datasets as ArrayRecord, once: prepare imagenet2012 ..."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from cbam_jax.errors import RunError, UserError, require

# What image-net.org gives to those who register.
IMAGENET_FILES = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument('name', metavar='NAME', help='a set, such as imagenet2012')
  parser.add_argument('--data-dir', metavar='DIR', required=True, help='where the result goes')
  parser.add_argument(
    '--manual-dir', metavar='DIR', help='where the files are that a person has to fetch'
  )


def run(arguments: argparse.Namespace) -> None:
  """Prepares the set unless it is there, and says how to train on it."""
  tfds = require('tensorflow_datasets', 'prepare')
  if importlib.util.find_spec('tensorflow') is None:
    raise UserError(
      'tensorflow cannot be imported. Training does without it, preparing does not: '
      "pip install 'cbam-jax[prepare]'."
    )
  from cbam_jax.data.prepared import check_format, find_builder

  name, data_dir = arguments.name, str(Path(arguments.data_dir).expanduser().absolute())
  builder = find_builder(name, data_dir)
  if builder.is_prepared():
    check_format(name, builder)
  else:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    _prepare(builder, _manual_dir(builder, arguments.manual_dir))
  sizes = ' and '.join(
    f'{split.num_examples:,} {split.name}' for split in builder.info.splits.values()
  )
  print(f'{builder.data_dir} holds {sizes} examples. To train on them, add')
  print(f'  --config.data.name=tfds:{name} --config.data.dir={data_dir}')


def _manual_dir(builder: Any, manual_dir: str | None) -> Path | None:
  """Where the files are that a person has to fetch, if the set has any.

  Raises:
    UserError: If they are not there.
  """
  if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    return None
  instructions = ' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
  if manual_dir is None:
    raise UserError(f'name the folder of the fetched files in --manual-dir. {instructions}')
  folder = Path(manual_dir).expanduser().absolute()
  if not folder.is_dir():
    raise UserError(f'--manual-dir is {manual_dir!r}, which is no folder. {instructions}')
  # Its builder would take one file alone, and leave out a split without an error.
  needed = IMAGENET_FILES if builder.name == 'imagenet2012' else ()
  if missing := [file for file in needed if not (folder / file).is_file()]:
    raise UserError(f'{folder} has no {" and no ".join(missing)}. {instructions}')
  return folder


def _prepare(builder: Any, manual_dir: Path | None) -> None:
  """Runs the builder, which shows its progress."""
  tfds = require('tensorflow_datasets', 'prepare')
  options = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
  try:
    builder.download_and_prepare(download_config=options)
  except Exception as error:  # of nearly any kind: a builder is somebody else's code
    raise RunError(
      f'{builder.name} cannot be prepared: {type(error).__name__}: {error}. What is there is '
      'whole: mend the cause and run the same command again.'
    ) from error
