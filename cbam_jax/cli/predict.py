"""Classifies pictures: the classes that a network finds most probable, of each."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cbam_jax.cli.network import add_network_arguments, load_network
from cbam_jax.cli.pictures import find_pictures
from cbam_jax.errors import RunError, UserError
from cbam_jax.explain.reading import read_picture, shown
from cbam_jax.explain.views import class_name
from cbam_jax.interop.pretrained import Pretrained
from cbam_jax.layers import compiler_options, in_parts

BATCH_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or patterns')
  parser.add_argument('--top', type=int, default=5, metavar='K', help='classes to show; default: 5')
  parser.add_argument('--json', action='store_true', help='print a line of JSON for each picture')
  add_network_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
  """Prints the predictions.

  Raises:
    RunError: At the end, if some pictures could not be read.
  """
  if arguments.top < 1:
    raise UserError(f'--top is {arguments.top}; it must be at least 1.')
  paths = find_pictures(arguments.images)
  network = load_network(arguments)
  unread = 0
  for entry in predictions(network, paths, arguments.top):
    unread += 'error' in entry
    print(json.dumps(entry) if arguments.json else _table(entry), flush=True)
  if unread:
    raise RunError(f'{unread} of {len(paths)} pictures could not be read; they are named above.')


def predictions(network: Pretrained, paths: list[Any], top: int) -> Iterator[dict[str, Any]]:
  """For each picture its 'image' and 'predictions', the most probable first; or an 'error'."""

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def probabilities(variables: Any, images: jax.Array) -> jax.Array:
    def classify(images: jax.Array) -> jax.Array:
      seen = network.preprocessing.normalize(images)
      logits: Any = network.model.apply(variables, seen, train=False)
      return jax.nn.softmax(logits)

    return in_parts(classify, images)

  for start in range(0, len(paths), BATCH_SIZE):
    pictures = [read_picture(p, network.preprocessing) for p in paths[start : start + BATCH_SIZE]]
    seen = [picture.seen for picture in pictures if picture.seen is not None]
    rows: Iterator[np.ndarray] = iter(())
    if seen:
      # Filled up, so that one shape is compiled.
      size = BATCH_SIZE if len(paths) > 1 else 1
      batch = np.stack(seen + [np.zeros_like(seen[0])] * (size - len(seen)))
      rows = iter(np.asarray(probabilities(network.variables, batch)))
    for picture in pictures:
      if picture.error:
        yield {'image': shown(picture.path), 'error': picture.error}
      else:
        yield {'image': shown(picture.path), 'predictions': _best(next(rows), network, top)}


def _best(probabilities: np.ndarray, network: Pretrained, top: int) -> list[dict[str, Any]]:
  order = np.argsort(-probabilities, kind='stable')[:top]
  return [
    {
      'class': int(index),
      'name': class_name(network, int(index)),
      'probability': float(probabilities[index]),
    }
    for index in order
  ]


def _table(entry: dict[str, Any]) -> str:
  if 'error' in entry:
    return f'{entry["image"]}\n  cannot be read: {entry["error"]}'
  rows = (
    f'  {100 * row["probability"]:6.2f} %  {row["class"]:>4}  {row["name"]}'
    for row in entry['predictions']
  )
  return '\n'.join([entry['image'], *rows])
