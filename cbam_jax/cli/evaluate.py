"""Evaluates the best checkpoint of a run on its whole test set."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares what the subcommand takes."""
  parser.add_argument('--workdir', required=True, metavar='DIR', help='the folder of the run')
  parser.add_argument('--json', action='store_true', help='print JSON')


def run(arguments: argparse.Namespace) -> None:
  """Prints the metrics."""
  from cbam_jax.training import evaluate
  from cbam_jax.training.compilation_cache import keep_compiled_programs

  keep_compiled_programs()
  metrics = evaluate(arguments.workdir)
  if arguments.json:
    print(json.dumps(metrics))
    return
  print(
    f'step {metrics["step"]}: top-1 {100 * metrics["top1"]:.2f} %, '
    f'top-5 {100 * metrics["top5"]:.2f} %, loss {metrics["loss"]:.4f}, '
    f'{metrics["count"]} test images'
  )
