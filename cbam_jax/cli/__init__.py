"""Trains, evaluates, explains and converts CBAM networks; each command has its own --help."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from cbam_jax import __version__
from cbam_jax.cli import convert, evaluate, explain, export, models, predict, prepare, train
from cbam_jax.errors import RunError, UserError, near

COMMANDS = {
  'train': train,
  'evaluate': evaluate,
  'predict': predict,
  'explain': explain,
  'convert': convert,
  'export': export,
  'models': models,
  'prepare': prepare,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `cbam-jax`; returns its exit status, 2 on input that cannot be used.

  Args:
    argv: The arguments after the program's name; None for those of the process.
  """
  parser = argparse.ArgumentParser(prog='cbam-jax', description=__doc__)
  parser.add_argument('--version', action='version', version=f'cbam_jax {__version__}')
  subparsers = parser.add_subparsers(dest='command', required=True)
  for name, module in COMMANDS.items():
    subparser = subparsers.add_parser(name, help=module.__doc__, description=module.__doc__)
    module.add_arguments(subparser)
    subparser.set_defaults(run=module.run, parser=subparser)
  arguments, rest = parser.parse_known_args(argv)
  if rest and arguments.command != 'train':
    known = [option for action in arguments.parser._actions for option in action.option_strings]
    arguments.parser.error(
      f'unrecognized arguments: {" ".join(rest)}.{near(rest[0].partition("=")[0], known)}'
    )
  try:
    if arguments.command == 'train':
      arguments.overrides = rest
    arguments.run(arguments)
  except (UserError, RunError) as error:
    print(f'cbam-jax {arguments.command}: {error}', file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1
  except KeyboardInterrupt:
    print(f'cbam-jax {arguments.command}: interrupted', file=sys.stderr)
    return 128 + signal.SIGINT
  return 0
