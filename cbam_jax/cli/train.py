"""Trains a network: --config=FILE --workdir=DIR --config.key=value ..."""

from __future__ import annotations

import argparse

from cbam_jax.cli.config_file import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE[:ARGUMENTS]',
    help='a file with get_config(), or one that comes with this package, such as digits or '
    'imagenet:resnet50,cbam',
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
  from cbam_jax.training.compilation_cache import keep_compiled_programs
  from cbam_jax.training.distributed import joined

  with joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
    keep_compiled_programs()
    train(load_config(arguments.config, arguments.overrides), arguments.workdir)
