"""Evaluates a run, or anyone's weights on a data set: top-1 and top-5 of single central crops."""

from __future__ import annotations

import argparse
import json
from typing import Any

from cbam_jax.cli.network import (
  NETWORK_OPTIONS,
  PICTURE_OPTIONS,
  add_network_arguments,
  load_network,
  told_arguments,
)
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError

DATA_OPTIONS = ('class_names', 'data_dir', 'batch_size', 'workers')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  add_network_arguments(parser)
  data = parser.add_argument_group('the data set')
  data.add_argument(
    '--data',
    metavar='NAME',
    help="imagenet2012 or another set of tensorflow-datasets, folder, or digits; the run's own "
    'without it',
  )
  data.add_argument('--data-dir', metavar='DIR', help='where it is')
  data.add_argument('--batch-size', type=int, metavar='N', help='default: 256')
  data.add_argument('--workers', type=int, metavar='N', help='processes that decode; default: 0')
  parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> None:
  """Prints the metrics."""
  from cbam_jax.training import evaluate, evaluate_network
  from cbam_jax.training.compilation_cache import keep_compiled_programs

  batch_size = 256 if arguments.batch_size is None else arguments.batch_size
  workers = arguments.workers or 0
  if batch_size < 1 or workers < 0:
    raise UserError(
      f'--batch-size is {batch_size} and --workers {workers}; they must be at least 1 and 0.'
    )
  keep_compiled_programs()
  if arguments.data is not None:
    metrics = evaluate_network(
      load_network(arguments),
      arguments.data,
      arguments.data_dir,
      batch_size=batch_size,
      workers=workers,
    )
  elif arguments.workdir is None:
    raise UserError('name the data set to evaluate --weights on, with --data and --data-dir.')
  elif told := told_arguments(arguments, (*NETWORK_OPTIONS, *PICTURE_OPTIONS, *DATA_OPTIONS)):
    raise UserError(
      f'--workdir alone is evaluated on its own data in its own way; with {", ".join(told)}, name '
      'the data set as well, with --data and --data-dir.'
    )
  else:
    metrics = evaluate(arguments.workdir)
  print(json.dumps(metrics) if arguments.json else report(metrics))


def report(metrics: dict[str, Any]) -> str:
  """The metrics of an evaluation as lines of text."""
  count = metrics['count']
  lines = [
    f'{metrics["model"]} + {metrics["attention"]} on {metrics["data"]}'
    + (f', step {metrics["step"]}' if 'step' in metrics else ''),
    str(Preprocessing.from_dict(metrics['preprocessing'])),
  ]
  for name, key in (('top-1', 'top1'), ('top-5', 'top5')):
    low, high = metrics[f'{key}_interval']
    lines.append(
      f'{name} {100 * metrics[key]:6.2f} %   ({100 * low:.2f} to {100 * high:.2f})   '
      f'{round(metrics[key] * count):,} of {count:,} images'
    )
  lines.append(f'loss  {metrics["loss"]:.4f}')
  if metrics['data_classes'] != metrics['classes']:
    lines.append(
      f'the network has {metrics["classes"]:,} classes and the data {metrics["data_classes"]:,}: '
      'they were compared by their places'
    )
  if metrics['unread']:
    lines.append(f'{metrics["unread"]:,} images could not be read, and do not count')
  lines.append('in brackets: 95 % confidence intervals')
  return '\n'.join(lines)
