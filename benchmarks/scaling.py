"""What one training step costs each device, on 1 to 256 devices, read from the compiled program.

Every row is compiled in a process of its own for that many simulated host devices, and not run.
The batch of a device stays the same (weak scaling). Compiled for a CPU, a program has the
collectives that the partitioner puts into it for any device; only a sum of which each device keeps
a part stays an all-reduce here, where a GPU's or TPU's compiler makes a reduce-scatter of it.

  python benchmarks/scaling.py [--config imagenet:resnet50,cbam] [--devices 1 2 4 ...] [--jobs 2]
"""

import argparse
import concurrent.futures
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLLECTIVE = re.compile(
  r' = (?P<shapes>.*?) '
  r'(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\('
)
SHAPE = re.compile(r'\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]')


def collectives(program: str) -> list[tuple[str, int, list[tuple[int, ...]]]]:
  """The kind, bytes and shapes of what each collective of a compiled program gives a device."""
  found = []
  for line in program.splitlines():
    if match := COLLECTIVE.search(line):
      shapes, size = [], 0
      for name, bits, sides in SHAPE.findall(match['shapes']):
        shapes.append(tuple(int(side) for side in sides.split(',') if side))
        size += math.prod(shapes[-1]) * (1 if name == 'pred' else int(bits) // 8)
      found.append((match['kind'], size, shapes))
  return found


def compile_step(config):
  """The compiled training step of `config` and the state's shapes, on data that is never read."""
  import jax
  import numpy as np

  from cbam_jax.data.sources import ArraySource
  from cbam_jax.training.experiment import Experiment
  from cbam_jax.training.sharding import split_over_devices

  experiment = Experiment(config)
  batch, size, channels = config.batch_size, config.data.image_size, len(config.data.mean)
  source = ArraySource(
    np.broadcast_to(np.uint8(0), (100 * batch, size, size, channels)),
    np.broadcast_to(0, (100 * batch,)),
  )
  experiment.train_source = experiment.test_source = source
  split = split_over_devices(experiment.mesh)
  arrays = {
    'image': jax.ShapeDtypeStruct((batch, size, size, channels), np.uint8, sharding=split),
    'label': jax.ShapeDtypeStruct((batch,), np.int32, sharding=split),
    'mask': jax.ShapeDtypeStruct((batch,), np.bool_, sharding=split),
  }
  lowered = experiment.compiled_train_step.lower(experiment.abstract_state, arrays)
  # Only the collectives and the counts matter, not the machine code.
  return lowered.compile({'xla_backend_optimization_level': 0}), experiment.abstract_state


def bytes_of(tree) -> int:
  """Size of all arrays of a tree."""
  import jax

  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(options: argparse.Namespace) -> dict:
  """One row: in this process, which must have as many devices as the row is for."""
  import jax

  from cbam_jax.cli.config_file import load_config

  batch = options.batch * jax.device_count()
  fixed = [f'batch_size={batch}', f'eval_batch_size={batch}', f'mesh.fsdp={options.fsdp}']
  config = load_config(options.config, [f'--config.{key}' for key in [*fixed, *options.set]])
  program, state = compile_step(config)
  cost, counts = program.cost_analysis(), Counter()
  for kind, size, _ in collectives(program.as_text()):
    counts[kind] += size
  return {
    'flops': cost['flops'],
    'bytes': cost['bytes accessed'],
    'collectives': counts,
    'parameters': bytes_of(state.params),
    'statistics': bytes_of(state.batch_stats),
    'state': sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
    ),
  }


def measure_in_process(devices: int, fsdp: int, options: argparse.Namespace) -> dict:
  """A row for that many devices, simulated in a process of their own."""
  command = [sys.executable, __file__, '--one', f'--config={options.config}', f'--fsdp={fsdp}']
  command += [f'--batch={options.batch}', *(f'--set={value}' for value in options.set)]
  flags = f'--xla_force_host_platform_device_count={devices}'
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  # A program that may be kept does not call oneDNN, whose operations XLA could not count.
  with tempfile.TemporaryDirectory() as kept:
    environment['JAX_COMPILATION_CACHE_DIR'] = kept
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f'{devices} devices, fsdp {fsdp}: compiling failed, see above')
  return json.loads(done.stdout)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='imagenet:resnet50,cbam')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE')
  parser.add_argument('--batch', type=int, default=64, help='images a device')
  parser.add_argument('--devices', type=int, nargs='+', default=COUNTS)
  parser.add_argument('--fsdp', type=int, default=8, help='devices that share a state')
  parser.add_argument('--jobs', type=int, default=2, help='programs compiled at a time')
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.one:
    print(json.dumps(measure(options)))
    return

  wanted = [(devices, 1) for devices in options.devices]
  if options.fsdp > 1:
    sharing = [devices for devices in options.devices if devices % options.fsdp == 0]
    wanted += [(devices, options.fsdp) for devices in sharing[:: max(1, len(sharing) - 1)]]
  print(
    '| devices | fsdp | TFLOP | GB accessed | all-reduce MB | all-gather MB | other MB | state MB |'
  )
  print('|' + '---|' * 8)
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    rows = [pool.submit(measure_in_process, *case, options) for case in wanted]
    for case, future in zip(wanted, rows, strict=True):
      row = future.result()
      kinds = dict(row['collectives'])
      sizes = [kinds.pop('all-reduce', 0), kinds.pop('all-gather', 0), sum(kinds.values())]
      columns = [
        *map(str, case),
        f'{row["flops"] / 1e12:.3f}',
        f'{row["bytes"] / 1e9:.1f}',
        *(f'{size / 1e6:.2f}' for size in [*sizes, row['state']]),
      ]
      print(f'| {" | ".join(columns)} |', flush=True)
  print(
    f'\nparameters {row["parameters"] / 1e6:.2f} MB, '
    f'batch-norm statistics {row["statistics"] / 1e6:.2f} MB'
  )


if __name__ == '__main__':
  main()
