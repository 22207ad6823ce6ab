"""Converts a network between PyTorch state dicts and folders of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cbam_jax.cli.network import LAYOUTS, add_network_arguments, load_network
from cbam_jax.errors import UserError, require
from cbam_jax.files import whole_file
from cbam_jax.interop import to_torch
from cbam_jax.interop.pretrained import FORMATS, save_pretrained

TORCH_SUFFIX = '.pth'
SAFETENSORS_SUFFIX = '.safetensors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  add_network_arguments(parser, positional=True)
  parser.add_argument(
    'out',
    metavar='OUT',
    help='a .pth or .safetensors file, for PyTorch; or a folder, for from_pretrained',
  )
  parser.add_argument(
    '--to-layout', metavar='NAME', help=f'whose names a file gets: {", ".join(LAYOUTS)}'
  )
  parser.add_argument(
    '--format', choices=list(FORMATS), help='of the arrays in a folder; default: orbax'
  )


def run(arguments: argparse.Namespace) -> None:
  """Reads the one and writes the other."""
  out = Path(arguments.out).expanduser()
  is_file = out.suffix in (TORCH_SUFFIX, SAFETENSORS_SUFFIX)
  if is_file and arguments.format is not None:
    raise UserError(f'{out} is a file, and --format is of a folder; leave out one of them.')
  if not is_file and (arguments.to_layout is not None or out.suffix in ('.pt', '.bin', '.tar')):
    raise UserError(
      f'{out} is taken for a folder, which holds names of this package; PyTorch files end in '
      f'{TORCH_SUFFIX} or {SAFETENSORS_SUFFIX}.'
    )
  network = load_network(arguments)
  if is_file:
    write_state_dict(out, to_torch(network.model, network.variables, arguments.to_layout))
  else:
    save_pretrained(
      out,
      network.model,
      network.variables,
      preprocessing=network.preprocessing,
      classes=network.classes,
      format=arguments.format or 'orbax',
    )
  print(f'{out} is written')


def write_state_dict(path: Path, state_dict: dict[str, np.ndarray]) -> None:
  """Writes a PyTorch state dict as `.pth` or `.safetensors`.

  Raises:
    MissingExtraError: If the package that writes it is not installed.
    RunError: If the file cannot be written.
  """
  if path.suffix == SAFETENSORS_SUFFIX:
    safetensors = require('safetensors.numpy', 'torch')
    with whole_file(path) as partial:
      partial.write_bytes(safetensors.save(state_dict, metadata={'format': 'pt'}))
    return
  torch = require('torch', 'torch')
  with whole_file(path) as partial:
    torch.save({name: _to_tensor(torch, array) for name, array in state_dict.items()}, partial)


def _to_tensor(torch: Any, array: np.ndarray) -> Any:
  if array.dtype == jnp.bfloat16:  # a type of JAX's package, which from_numpy does not know
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(array)
