"""Several processes as one run: who they are, and that they never disagree."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cbam_jax.errors import UserError
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.distributed import agreed, from_first, joined
from cbam_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
  ('given', 'named'),
  [
    ({'coordinator': '127.0.0.1:1'}, '--num-processes and --process-id must be given too'),
    ({'num_processes': 2, 'process_id': 0}, '--coordinator must be given too'),
    ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2}, '--process-id is 2 of'),
    ({'coordinator': 'a:1', 'num_processes': 0, 'process_id': 0}, '--num-processes=0; number'),
    ({'coordinator': 'a', 'num_processes': 2, 'process_id': 0}, "--coordinator is 'a'; give HOST"),
  ],
)
def test_what_does_not_fit_is_refused(given, named):
  with pytest.raises(UserError, match=named), joined(**given):
    pass


def test_a_process_alone_agrees_with_itself():
  assert agreed('') == ''
  assert agreed('no') == 'no'
  assert from_first(7) == 7
  with joined():
    assert jax.process_count() == 1


def small_state() -> TrainState:
  return TrainState(
    step=jnp.int32(5),
    params={'a': jnp.arange(8.0)},
    batch_stats={},
    opt_state=(),
    average=None,
    bad_steps=jnp.int32(0),
  )


ONE_OF_TWO = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.distributed import agreed, from_first, joined
from cbam_jax.training.sharding import make_mesh
from cbam_jax.training.state import TrainState
from cbam_jax.training.stored import CheckpointError, restore

port, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def like(mesh):
  def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
  one = array((), jnp.int32)
  return TrainState(step=one, params={'a': array((8,), jnp.float32, 'fsdp')}, batch_stats={},
                    opt_state=(), average=None, bad_steps=one)

with joined(f'127.0.0.1:{port}', 2, number):
  answers = {
    'agreed': [agreed(''), agreed(['', 'nine'][number]), agreed(['one', 'two'][number])],
    'first': from_first(5 + number),
  }
  template = like(make_mesh(2))
  try:
    # Whole for the first process, damaged for the second.
    restore(folder / f'seen_by_{number}', template)
  except CheckpointError as error:
    answers['damaged'] = error.reason
  said = []
  with Checkpoints(folder / 'checkpoints', 3, said.append) as checkpoints:
    state, step = checkpoints.restore_newest(template)
    checkpoints.save(state, 9, {'top1': 0.5})
  answers['restored'] = step, [float(x) for x in state.params['a'].addressable_data(0)]
  answers['said'] = said
  print(json.dumps(answers))
"""


def test_processes_agree_on_what_went_wrong_and_on_what_is_restored(tmp_path):
  folder = tmp_path / 'checkpoints'
  with Checkpoints(folder, 3) as checkpoints:
    for step in (5, 6, 7):
      checkpoints.save(small_state(), step, {'top1': 0.1})
  shutil.copytree(folder / '7', tmp_path / 'seen_by_0')
  shutil.copytree(folder / '7', tmp_path / 'seen_by_1')
  (tmp_path / 'seen_by_1' / 'check' / 'metadata').write_text('{')
  (folder / '7' / 'state' / 'manifest.ocdbt').unlink()
  (folder / '6' / 'metrics' / 'metrics').write_text('')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  environment = os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', ONE_OF_TWO, port, str(number), str(tmp_path)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert [process.returncode for process in processes] == [0, 0], outputs
  first, second = (json.loads(printed.splitlines()[-1]) for printed, _ in outputs)
  for answers in (first, second):
    assert answers['agreed'] == ['', 'nine', 'one']
    assert answers['first'] == 5
    assert answers['damaged'].startswith('Expecting property name')
  assert first['restored'] == [5, [0, 1, 2, 3]]
  assert second['restored'] == [5, [4, 5, 6, 7]]
  assert [line.split(' (')[0] for line in first['said']] == [
    'checkpoint 6 is damaged',
    'checkpoint 7 is damaged',
  ]
  assert second['said'] == first['said'][1:]
  assert sorted(path.name for path in folder.iterdir()) == ['5', '9']
  assert sorted(path.name for path in (tmp_path / 'damaged').iterdir()) == ['6', '7']
