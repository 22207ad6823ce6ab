"""Shows what networks see in pictures, a panel each and a page of all; or scores it on boxes."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cbam_jax.cli.network import add_network_arguments, load_network
from cbam_jax.cli.pictures import find_pictures
from cbam_jax.data.boxes import read_coco, read_voc
from cbam_jax.errors import SHOWN, RunError, UserError, check_choice, near
from cbam_jax.explain.reading import read_picture, shown
from cbam_jax.explain.score import compare, summarise
from cbam_jax.explain.scoring import score_networks
from cbam_jax.explain.views import METHODS, View, view
from cbam_jax.files import whole_file
from cbam_jax.interop.pretrained import Pretrained
from cbam_jax.models.description import describe
from cbam_jax.models.registry import ATTENTIONS

REPORT = 'report.html'

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
  if arguments.method == 'eigen_cam' and arguments.chosen is not None:
    raise UserError(
      f'--class is {arguments.chosen!r}, but Eigen-CAM knows no classes; leave it out, or choose '
      'another --method.'
    )
  if arguments.score:
    if arguments.boxes is None or arguments.images_dir is None or arguments.images:
      raise UserError('--score takes --boxes and --images-dir, and no further pictures.')
    _score(arguments, _networks(arguments))
    return
  if not arguments.images or arguments.out is None:
    raise UserError('name pictures, and a folder for what is drawn with --out DIR.')
  paths = find_pictures(arguments.images)
  out = Path(arguments.out).expanduser()
  panels = _panel_names(paths)
  _check_targets(paths, [out / name for name in (*panels, REPORT)])
  _draw(arguments, out, dict(zip(paths, panels, strict=True)), _networks(arguments))


def _check_targets(paths: list[Path], targets: list[Path]) -> None:
  """Raises `UserError` if what is drawn would take the place of a picture it is drawn from."""
  pictures = {_identity(path) for path in paths}
  for target in targets:
    if _identity(target) in pictures:
      raise UserError(
        f'{shown(target)} is one of the pictures, and what is drawn would take its place; choose '
        'another --out.'
      )


def _identity(path: Path) -> object:
  """What a file is known by however it is spelt; the path of one that does not exist."""
  try:
    stat = path.stat()
  except OSError:
    return path
  return stat.st_dev, stat.st_ino


def _networks(arguments: argparse.Namespace) -> dict[str, Pretrained]:
  """The networks by what they are called."""
  if arguments.compare is None:
    network = load_network(arguments)
    return {_title(network): network}
  names = arguments.compare.split(',')
  for name in names:
    check_choice('a network to compare', name, ATTENTIONS)
  if len(set(names)) < len(names):
    raise UserError(f'--compare={arguments.compare} has a name twice; give each once.')
  where = arguments.weights or arguments.workdir
  if '{attention}' not in where:
    raise UserError(
      f'--compare={arguments.compare} needs a place for each in --weights or --workdir, such as '
      "--weights='runs/resnet50_{attention}'."
    )
  networks = [load_network(arguments, name) for name in names]
  if len({network.preprocessing for network in networks}) > 1:
    raise UserError(
      'the networks make different things of a picture: '
      + '; '.join(f'{name}: {n.preprocessing}' for name, n in zip(names, networks, strict=True))
      + '. Set the same for all with --image-size, --resized-side, --interpolation, --mean, --std.'
    )
  titles = [_title(network) for network in networks]
  paths = [shown(where.replace('{attention}', name)) for name in names]
  unique = [
    title if titles.count(title) == 1 else f'{title} ({path})'
    for title, path in zip(titles, paths, strict=True)
  ]
  return dict(zip(unique, networks, strict=True))


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


def _some(classes: Sequence[str]) -> str:
  return f': {", ".join(classes[:SHOWN])}{", ..." if len(classes) > SHOWN else ""}'


def _class_number(network: Pretrained, chosen: str | None) -> int | None:
  if chosen is None:
    return None
  if network.classes is not None and chosen in network.classes:
    return network.classes.index(chosen)
  if chosen.isdecimal():
    return int(chosen)
  raise UserError(
    f'--class is {chosen!r}; give a number, or one of the names of the classes'
    f'{_some(network.classes) if network.classes else " (--class-names tells them)"}.'
    f'{near(chosen, network.classes or ())}'
  )


def _draw(
  arguments: argparse.Namespace,
  out: Path,
  panels: dict[Path, str],
  networks: dict[str, Pretrained],
) -> None:
  """Writes the panels, of the names that the pictures' paths map to, and the page."""
  from cbam_jax.explain.figures import draw_panel
  from cbam_jax.explain.report import Entry, write_report

  preprocessing = next(iter(networks.values())).preprocessing
  pictures = [read_picture(path, preprocessing) for path in panels]
  for picture in pictures:
    if picture.error:
      print(f'{shown(picture.path)} cannot be read: {picture.error}', file=sys.stderr)
  seen = {picture.path: picture.seen for picture in pictures if picture.seen is not None}
  if seen:
    entries = [
      Entry(shown(path), image, views)
      for (path, image), views in zip(
        seen.items(), _views(arguments, networks, list(seen.values())), strict=True
      )
    ]
    for path, entry in zip(seen, entries, strict=True):
      with whole_file(out / panels[path]) as partial:
        draw_panel(partial, entry.title, entry.image, entry.views)
    stage = arguments.stage or 'the last stage'
    with whole_file(out / REPORT) as partial:
      write_report(partial, entries, method=METHOD_NAMES[arguments.method], stage=stage)
    pictures_shown = f'{len(entries)} picture{"s" * (len(entries) > 1)}'
    print(f'{shown(out / REPORT)} shows {pictures_shown}; a panel of each is beside it')
  if unread := len(panels) - len(seen):
    raise RunError(f'{unread} of {len(panels)} pictures could not be read; they are named above.')


def _panel_names(paths: list[Path]) -> list[str]:
  """A name for each panel, numbered where two pictures are called the same."""
  # In lower case, because a disk may not tell A.png from a.png.
  count = collections.Counter(path.stem.lower() for path in paths)
  taken = set(count)
  numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
  names = []
  for path in paths:
    name = path.stem
    if count[name.lower()] > 1:
      numbered = (f'{path.stem}-{i}' for i in numbers[name.lower()])
      name = next(name for name in numbered if name.lower() not in taken)
      taken.add(name.lower())
    names.append(f'{name}.png')
  return names


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
  rows = [(title, s.pointing, s.energy) for title, s in summaries.items()]
  rows += [(title, c.pointing, c.energy) for title, c in pairs.items()]
  width = max(36, *(len(title) + 2 for title, *_ in rows))
  print(f'{"":<{width}}{"pointing game":<28}energy in the boxes')
  for title, pointing, energy in rows:
    print(f'{title:<{width}}{pointing!s:<28}{energy}')
  print('in brackets: 95 % confidence intervals')
