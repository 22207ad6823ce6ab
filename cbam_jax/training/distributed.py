"""Several processes as one run: who they are, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from cbam_jax.errors import RunError, UserError

# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30

# Bytes of a message that the processes tell each other.
LONGEST_FAILURE = 300


@contextlib.contextmanager
def joined(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
  """A context in which this process is one of a run's; nothing may touch a device before it.

  With nothing given, a TPU pod, Slurm, Open MPI and Kubernetes are found from the environment,
  and without any of these the process is alone.

  Args:
    coordinator: 'HOST:PORT' of the first process, the same on all.
    num_processes: How many there are.
    process_id: This one's number, from 0.

  Raises:
    UserError: If only some of the three are given, or they do not fit each other.
  """
  given = {
    '--coordinator': coordinator,
    '--num-processes': num_processes,
    '--process-id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise UserError(
      f'{" and ".join(missing)} must be given too: processes need all of {", ".join(given)}, or '
      'none of them where the cluster tells.'
    )
  if num_processes is not None and process_id is not None:
    if num_processes < 1 or not 0 <= process_id < num_processes:
      raise UserError(
        f'--process-id is {process_id} of --num-processes={num_processes}; number the processes '
        'from 0 to one less than their count.'
      )
    host, _, port = str(coordinator).rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise UserError(
        f'--coordinator is {coordinator!r}; give HOST:PORT of the first process, such as '
        '10.0.0.1:1234.'
      )
  try:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    alone = 'coordinator_address' in str(error)
    already = 'must be called before' in str(error)
    if not missing or not (alone or already):
      raise RunError(
        f'the processes could not be joined ({error}); check that all were started, that each has '
        'its own number, and that the first one can be reached from the others.'
      ) from error
    # JAX found no cluster around this process, or the caller has set up its devices already.
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1:
      raise
    # The ordinary way out would wait for the others at a barrier, for minutes; they end as soon
    # as they miss this process.
    if not isinstance(error, (UserError, RunError)):
      traceback.print_exc()
    print(f'process {jax.process_index()}: {error}', file=sys.stderr)  # noqa: T201
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def agreed(failure: str) -> str:
  """What went wrong on the first process on which something did; empty if all is well on all.

  All processes must call it, and all get the same answer.
  """
  if jax.process_count() == 1:
    return failure
  text = np.zeros(LONGEST_FAILURE, np.uint8)
  encoded = failure.encode()[:LONGEST_FAILURE]
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  everyone = multihost_utils.process_allgather(text)
  return next(
    (bytes(row).rstrip(b'\0').decode(errors='replace') for row in everyone if any(row)), ''
  )


def from_first(number: int) -> int:
  """The first process's `number`, on all."""
  if jax.process_count() == 1:
    return number
  # The guard that the loop keeps is against transfers by mistake.
  with jax.transfer_guard('allow'):
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait_for_all(reason: str) -> None:
  """Returns once all processes have come here; `reason` names the place."""
  multihost_utils.sync_global_devices(reason)
