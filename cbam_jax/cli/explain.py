"""Shows what networks see in pictures, a panel each and a page of all; or scores it on boxes."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from cbam_jax.cli.network import add_network_arguments, load_network
from cbam_jax.cli.pictures import find_pictures, read_picture
from cbam_jax.data.boxes import read_coco, read_voc
from cbam_jax.errors import RunError, UserError, check_choice, near
from cbam_jax.explain.score import compare, summarise
from cbam_jax.explain.scoring import score_networks
from cbam_jax.explain.views import METHODS, View, view
from cbam_jax.files import whole_file
from cbam_jax.interop.pretrained import Pretrained
from cbam_jax.models.description import describe
from cbam_jax.models.registry import ATTENTIONS

METHOD_NAMES = {
  'grad_cam': 'Grad-CAM',
  'grad_cam_plus_plus': 'Grad-CAM++',
  'eigen_cam': 'Eigen-CAM',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument('images', nargs='*', metavar='IMAGE', help='files, folders or patterns')
  parser.add_argument('--out', metavar='DIR', help='where the panels and report.html go')
  parser.add_argument(
    '--class', dest='chosen', metavar='NAME|NUMBER', help='a class to look for beside the likeliest'
  )
  parser.add_argument(
    '--compare',
    metavar='NAMES',
    help=f'networks side by side, such as none,se,cbam ({", ".join(ATTENTIONS)}): each takes the '
    "place of '{attention}' in --weights or --workdir",
  )
  parser.add_argument('--stage', metavar='NAME', help='where the class maps are taken; the last')
  parser.add_argument(
    '--method', default='grad_cam', metavar='NAME', help=f'{", ".join(METHODS)}; default: grad_cam'
  )
  scoring = parser.add_argument_group('a score instead of pictures')
  scoring.add_argument(
    '--score', action='store_true', help='the pointing game, and the energy inside the boxes'
  )
  scoring.add_argument('--boxes', metavar='FILE|DIR', help='a COCO JSON, or a folder of VOC XMLs')
  scoring.add_argument('--images-dir', metavar='DIR', help='where their pictures are')
  scoring.add_argument('--json', action='store_true', help='print JSON')
  add_network_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
  """Draws, or scores."""
  check_choice('--method', arguments.method, METHODS)
  if arguments.score:
    if arguments.boxes is None or arguments.images_dir is None or arguments.images:
      raise UserError('--score takes --boxes and --images-dir, and no further pictures.')
    _score(arguments, _networks(arguments))
    return
  if not arguments.images or arguments.out is None:
    raise UserError('name pictures, and a folder for what is drawn with --out DIR.')
  paths = find_pictures(arguments.images)
  _draw(arguments, paths, _networks(arguments))


def _networks(arguments: argparse.Namespace) -> dict[str, Pretrained]:
  """The networks by what they are called."""
  if arguments.compare is None:
    network = load_network(arguments)
    return {_title(network): network}
  names = arguments.compare.split(',')
  for name in names:
    check_choice('a network to compare', name, ATTENTIONS)
  if '{attention}' not in (arguments.weights or arguments.workdir):
    raise UserError(
      f'--compare={arguments.compare} needs a place for each in --weights or --workdir, such as '
      "--weights='runs/resnet50_{attention}'."
    )
  networks = [load_network(arguments, name) for name in names]
  if len({network.preprocessing for network in networks}) > 1:
    raise UserError(
      'the networks take different parts of a picture; set the same for all with --image-size, '
      '--resized-side, --interpolation, --mean and --std.'
    )
  return {_title(network): network for network in networks}


def _title(network: Pretrained) -> str:
  described = describe(network.model)
  plain = described['attention'] == 'none'
  return described['model'] if plain else f'{described["model"]} + {described["attention"]}'


def _views(
  arguments: argparse.Namespace, networks: dict[str, Pretrained], images: list[np.ndarray]
) -> list[list[View]]:
  """What each network makes of each image, image by image."""
  by_network = [
    view(
      network,
      title,
      images,
      chosen=_class_number(network, arguments.chosen),
      stage=arguments.stage,
      method=arguments.method,
    )
    for title, network in networks.items()
  ]
  return [list(views) for views in zip(*by_network, strict=True)]


def _class_number(network: Pretrained, chosen: str | None) -> int | None:
  if chosen is None:
    return None
  if network.classes is not None and chosen in network.classes:
    return network.classes.index(chosen)
  if chosen.isdecimal():
    return int(chosen)
  raise UserError(
    f'--class is {chosen!r}; give a number, or one of the names of the classes'
    f'{" (--class-names tells them)" if network.classes is None else ""}.'
    f'{near(chosen, network.classes or ())}'
  )


def _draw(
  arguments: argparse.Namespace, paths: list[Path], networks: dict[str, Pretrained]
) -> None:
  from cbam_jax.explain.figures import draw_panel
  from cbam_jax.explain.report import Entry, write_report

  preprocessing = next(iter(networks.values())).preprocessing
  pictures = [read_picture(path, preprocessing) for path in paths]
  for picture in pictures:
    if picture.error:
      print(f'{picture.path} cannot be read: {picture.error}', file=sys.stderr)
  seen = {picture.path: picture.seen for picture in pictures if picture.seen is not None}
  if seen:
    out = Path(arguments.out).expanduser()
    entries = [
      Entry(str(path), image, views)
      for (path, image), views in zip(
        seen.items(), _views(arguments, networks, list(seen.values())), strict=True
      )
    ]
    for panel, entry in zip(_panel_names(list(seen)), entries, strict=True):
      with whole_file(out / panel) as partial:
        draw_panel(partial, entry.title, entry.image, entry.views)
    stage = arguments.stage or 'the last stage'
    with whole_file(out / 'report.html') as partial:
      write_report(partial, entries, method=METHOD_NAMES[arguments.method], stage=stage)
    print(f'{out / "report.html"} shows {len(entries)} pictures; a panel of each is beside it')
  if unread := len(paths) - len(seen):
    raise RunError(f'{unread} of {len(paths)} pictures could not be read; they are named above.')


def _panel_names(paths: list[Path]) -> list[str]:
  """A name for each panel, numbered where two pictures are called the same."""
  stems = [path.stem for path in paths]
  return [
    f'{stem}.png' if stems.count(stem) == 1 else f'{stem}-{i}.png' for i, stem in enumerate(stems)
  ]


def _score(arguments: argparse.Namespace, networks: dict[str, Pretrained]) -> None:
  boxes = Path(arguments.boxes).expanduser()
  read = read_voc if boxes.is_dir() else read_coco
  boxed = read(boxes, arguments.images_dir)
  by_network = dict(
    zip(
      networks,
      score_networks(
        list(networks.values()), boxed, stage=arguments.stage, method=arguments.method
      ),
      strict=True,
    )
  )
  summaries = {title: summarise(scores) for title, scores in by_network.items()}
  pairs = {
    f'{second} - {first}': compare(by_network[first], by_network[second])
    for first, second in itertools.combinations(by_network, 2)
  }
  if arguments.json:
    everything = {
      'networks': {title: dataclasses.asdict(s) for title, s in summaries.items()},
      'differences': {title: dataclasses.asdict(c) for title, c in pairs.items()},
    }
    print(json.dumps(everything, indent=2))
    return
  print(f'{METHOD_NAMES[arguments.method]}, {next(iter(summaries.values())).count} class maps')
  print(f'{"":<36}{"pointing game":<28}energy in the boxes')
  rows = [(title, s.pointing, s.energy) for title, s in summaries.items()]
  rows += [(title, c.pointing, c.energy) for title, c in pairs.items()]
  for title, pointing, energy in rows:
    print(f'{title:<36}{pointing!s:<28}{energy}')
  print('in brackets: 95 % confidence intervals')
