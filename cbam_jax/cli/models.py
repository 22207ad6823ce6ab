"""Lists the networks with their parameters and multiply-adds."""

from __future__ import annotations

import argparse
import dataclasses
import json

from cbam_jax.models import create_model, list_models, summary
from cbam_jax.models.registry import ATTENTIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument('names', nargs='*', metavar='NAME', help='networks; all without any')
  parser.add_argument(
    '--attention',
    action='append',
    metavar='NAME',
    help=f'{", ".join(ATTENTIONS)}; may be repeated; all without any',
  )
  parser.add_argument('--image-size', type=int, default=224, metavar='PIXELS')
  parser.add_argument('--stages', action='store_true', help='show a row for each stage')
  parser.add_argument('--json', action='store_true', help='print JSON, stages included')


def run(arguments: argparse.Namespace) -> None:
  """Prints the table, or JSON."""
  models = {
    (name, attention): create_model(name, attention=attention)
    for name in arguments.names or list_models()
    for attention in arguments.attention or ATTENTIONS
  }
  rows = (
    (name, attention, summary(model, arguments.image_size))
    for (name, attention), model in models.items()
  )
  if arguments.json:
    entries = [
      {'name': name, 'attention': attention, **dataclasses.asdict(counts)}
      for name, attention, counts in rows
    ]
    print(json.dumps(entries, indent=2))
    return
  for i, (name, attention, counts) in enumerate(rows):
    if i == 0:
      print(f'{"network":<20}{"attention":<12}{"params (M)":>12}{"multiply-adds (G)":>20}')
    params, multiply_adds = counts.params / 1e6, counts.multiply_adds / 1e9
    print(f'{name:<20}{attention:<12}{params:>12.2f}{multiply_adds:>20.3f}', flush=True)
    if arguments.stages:
      print(f'\n{counts}\n')
