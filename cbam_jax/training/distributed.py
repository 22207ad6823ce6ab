"""Several processes as one run: who they are, and what happens when one of them dies."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax

from cbam_jax.errors import RunError, UserError

# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 60


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
    if ':' not in str(coordinator):
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
      raise
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
