"""A checkpoint on the disk: what it holds, and whether it is whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

from cbam_jax.errors import RunError, UserError, first_line
from cbam_jax.training.distributed import agreed
from cbam_jax.training.state import TrainState

# The parts of a checkpoint, each a folder in its own: arrays by orbax, the others JSON files.
STATE = 'state'
CHECK = 'check'
METRICS = 'metrics'

OTHER_ARRAYS = 'it holds other arrays than this network and optimizer have'


class CheckpointError(RunError):
  """A checkpoint that cannot be used.

  Attributes:
    reason: Why.
  """

  def __init__(self, checkpoint: Path, reason: str):
    self.reason = reason
    super().__init__(f'checkpoint {checkpoint} cannot be read: {reason}; {remedy([reason])}')


def remedy(reasons: list[str]) -> str:
  """What to do when all checkpoints there are have failed for `reasons`."""
  if all(reason.startswith(OTHER_ARRAYS) for reason in reasons):
    return (
      'use the version of cbam_jax and the configuration that wrote it, or start anew in another '
      '--workdir.'
    )
  return 'restore it from a backup, go on from an older one, or start anew in another --workdir.'


def best_step(directory: Path) -> int:
  """The step of the checkpoint in `directory` with the highest top-1, the latest of equals.

  Raises:
    UserError: If there is no checkpoint with test metrics.
  """
  evaluated = [
    (metrics['top1'], int(path.name))
    for path in directory.glob('*')
    if path.name.isdigit() and (metrics := read_metrics(path))
  ]
  if not evaluated:
    raise UserError(
      f'{directory} holds no evaluated checkpoint; train first (cbam-jax train), or name the '
      'workdir of a run that has saved one.'
    )
  return max(evaluated)[1]


def read_metrics(checkpoint: Path) -> dict[str, Any] | None:
  """The test metrics of a checkpoint; None if there are none, or they are damaged."""
  try:
    metrics = json.loads((checkpoint / METRICS / METRICS).read_bytes())
    return metrics if math.isfinite(metrics['top1']) else None
  except (OSError, ValueError, TypeError, KeyError):
    return None


def restore(checkpoint: Path, like: TrainState) -> TrainState:
  """The state of a checkpoint, with the shapes, types and shardings of `like`.

  All processes of a run must call it, and all get the state or all an error: a file may be
  unreadable to one of them alone.

  Raises:
    CheckpointError: If it is damaged, or of another network or optimizer.
  """
  state, expected, failure = None, 0, ''
  try:
    state, expected = _read(checkpoint, like)
  except Exception as error:  # orbax raises nearly anything on a damaged file
    failure = root_cause(error)
  failure = agreed(failure)
  if not failure:
    whole = int(jax.device_get(fingerprint(state))) == expected
    failure = agreed('' if whole else 'its arrays are not those that were saved')
  if failure or state is None:
    raise CheckpointError(checkpoint, failure)
  return state


def _read(checkpoint: Path, like: TrainState) -> tuple[TrainState, int]:
  """The state as it is on the disk, and what its fingerprint should be."""
  # Not by an orbax checkpointer, which waits for processes that may have failed to read.
  handler = ocp.StandardCheckpointHandler()
  if difference := _difference(handler.metadata(checkpoint / STATE).tree, like):
    raise ValueError(f'{OTHER_ARRAYS} ({difference})')
  check = json.loads((checkpoint / CHECK / 'metadata').read_bytes())
  state = handler.restore(checkpoint / STATE, args=ocp.args.StandardRestore(like))
  return state, check['fingerprint']


def _difference(stored: Any, like: TrainState) -> str:
  """The first few arrays that orbax's description of a stored state and `like` do not share."""
  there, here = (
    {
      '.'.join(map(str, path)): f'{np.dtype(array.dtype).name}{list(array.shape)}'
      for path, array in ocp.tree.to_flat_dict(tree).items()
    }
    for tree in (stored, ocp.tree.serialize_tree(like, keep_empty_nodes=True))
  )
  names = sorted({name for name, _ in there.items() ^ here.items()})
  names.sort(key=lambda name: not name.startswith('params'))  # the others mostly follow from them
  shown = [
    f'{name}: {there.get(name, "none")} there, {here.get(name, "none")} here' for name in names
  ]
  return '; '.join([*shown[:3], f'{len(names)} in all'] if len(names) > 3 else shown)


@jax.jit
def fingerprint(state: TrainState) -> jax.Array:
  """A 32-bit checksum of every array of `state`, the same however it is sharded."""
  total = jnp.zeros((), jnp.uint32)
  for number, array in enumerate(jax.tree.leaves(state)):
    words = array if array.dtype == jnp.int32 else array.astype(jnp.float32)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(-1)
    # Mixed, so that arrays of related numbers differ in all bits; times odd factors, so that
    # their places count.
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words ^= words >> 13
    factors = 2 * lax.iota(jnp.uint32, words.size) + np.uint32(2 * number + 1)
    total += jnp.sum(words * factors, dtype=jnp.uint32)
  return total


def root_cause(error: BaseException) -> str:
  """What an error's first cause says, short enough for a message."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = first_line(error)
  return text if len(text) < 260 else f'{text[:120]} ... {text[-120:]}'  # the reason comes last
