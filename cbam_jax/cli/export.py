"""Writes a network as a file that runs without this package: StableHLO or ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

from cbam_jax.cli.network import add_network_arguments, load_network
from cbam_jax.interop.export import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  add_network_arguments(parser)
  parser.add_argument('--out', required=True, metavar='FILE', help='the file to write')
  parser.add_argument(
    '--format', choices=list(FORMATS), default='stablehlo', help='default: stablehlo'
  )
  parser.add_argument(
    '--pixels', action='store_true', help='let it take uint8 pixels, and normalise them itself'
  )
  parser.add_argument(
    '--tolerance',
    type=float,
    metavar='X',
    help="difference from the network's own logits that passes, over the largest; default: 1e-4, "
    'more for bfloat16',
  )


def run(arguments: argparse.Namespace) -> None:
  """Writes the file and prints what it takes, and how far its logits are off."""
  network = load_network(arguments)
  out, preprocessing = Path(arguments.out).expanduser(), network.preprocessing
  size, channels = preprocessing.image_size, preprocessing.channels
  difference = FORMATS[arguments.format](
    network.model,
    network.variables,
    out,
    image_size=size,
    channels=channels,
    normalize=preprocessing.normalize if arguments.pixels else None,
    tolerance=arguments.tolerance,
  )
  taken = 'uint8 pixels' if arguments.pixels else 'float32 images'
  print(f'{out} is written, {out.stat().st_size / 1e6:.1f} MB')
  print(f'{taken} (b, {size}, {size}, {channels}) to logits (b, {network.model.num_classes})')
  print(preprocessing)
  print(f"logits differ from the network's own by up to {difference:.1e} of the largest")
