"""Trains a network: --config=FILE --workdir=DIR --config.key=value ..."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbam_jax.errors import UserError, near, require

if TYPE_CHECKING:
  from ml_collections import ConfigDict


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE[:ARGUMENTS]',
    help='a file with get_config(), such as configs/imagenet.py:resnet50,cbam',
  )
  parser.add_argument(
    '--workdir', required=True, metavar='DIR', help='where the run is kept; resumes if it exists'
  )
  processes = parser.add_argument_group(
    'several processes', 'A TPU pod, Slurm and Open MPI tell by themselves; anything else needs:'
  )
  processes.add_argument('--coordinator', metavar='HOST:PORT', help='of the first process')
  processes.add_argument('--num-processes', type=int, metavar='N', help='how many there are')
  processes.add_argument('--process-id', type=int, metavar='I', help="this one's number, from 0")


def run(arguments: argparse.Namespace) -> None:
  """Trains, or goes on training."""
  from cbam_jax.training import train
  from cbam_jax.training.distributed import joined

  with joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
    train(load_config(arguments.config, arguments.overrides), arguments.workdir)


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The configuration of `file` with overrides applied.

  Args:
    file: A Python file with `get_config()`; what follows a colon is its argument.
    overrides: `--config.key=value`, where the value has the type of the one it replaces.

  Raises:
    UserError: If the file cannot be used, or on an unknown key or a value of the wrong type.
  """
  require('ml_collections', 'train')
  from absl import flags

  path = Path(file.split(':')[0])
  if not path.is_file():
    raise UserError(
      f'there is no configuration file {str(path)!r}; name one that exists, such as '
      'configs/digits.py. What follows a colon is its argument.'
    )
  try:
    config = _parse(file, [])
  except Exception as error:  # the file is the user's own code: it may raise anything
    # The message is a whole traceback, of which the last line says what went wrong.
    reason = (str(error).strip().splitlines() or [repr(error)])[-1]
    raise UserError(f'{file} cannot be loaded: {reason}') from error

  _check_overrides(config, overrides)
  try:
    return _parse(file, overrides)
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f'{error}; give a value of the type of the one that it replaces.') from error


def _parse(file: str, overrides: Sequence[str]) -> ConfigDict:
  from absl import flags
  from ml_collections import config_flags

  arguments = ['cbam-jax', f'--config={file}', *overrides]
  values = flags.FlagValues()
  # Without `sys_argv` it would look for overrides among the arguments of the process.
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=arguments)
  values(arguments)
  return values.config


def _check_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
  known = set(_keys(config.to_dict()))
  for override in overrides:
    name, equals, _ = override.partition('=')
    key = name.removeprefix('--config.')
    if not name.startswith('--config.') or not equals:
      raise UserError(f'cannot use {override!r}; an override is written --config.key=value.')
    if key not in known:
      raise UserError(
        f'the configuration has no key {key!r}.{near(key, known)} All keys: '
        f'{", ".join(sorted(known))}.'
      )


def _keys(tree: dict[str, Any], prefix: str = '') -> Iterator[str]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _keys(value, f'{prefix}{key}.')
    else:
      yield prefix + key
