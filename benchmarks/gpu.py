"""Networks and the CBAM block on one GPU, in bfloat16, beside PyTorch's and the card's own peaks.

Three tables: images a second of training and inference, beside timm's network by `torch.compile`,
channels last, under autocast; for the end of a residual block, time, bandwidth and FLOP rate as
shares of what a copy and a matrix product reach on the same card; and the kernels of a train step.

The peers of a row are compiled side by side, and then timed in turn.

  pip install -U 'jax[cuda13]' && pip install 'cbam-jax[train]' torch timm
  python benchmarks/gpu.py
"""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both frameworks share the card's memory.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from models import Runner, compiled, measure
from pytorch_networks import network

import cbam_jax
from cbam_jax.layers import BatchNorm
from cbam_jax.models.base import finish_block

IMPLEMENTATIONS = ('plain', 'xla', 'pallas')

# Passes over the features that a block's end cannot do without: x before each gate and at the sum,
# the shortcut, the output; and in the backward pass x, the output and its cotangent for the spatial
# gate, x and the sum's cotangent for each further gate, and two cotangents written.
PASSES = {'forward': 5, 'gradient': 5 + 9}

# Steps that are under way before anyone waits for one, as in a training loop: what the host does
# for a step is hidden behind the one before.
IN_FLIGHT = 10

# What runs, and its temporary memory in bytes.
Peer = tuple[Runner, int]


def ours(attention: str, implementation: str, images: np.ndarray, step: str) -> Peer:
  """Our ResNet-50."""
  if attention == 'cbam':
    attention = functools.partial(cbam_jax.CBAM, implementation=implementation)
  model = cbam_jax.create_model('resnet50', attention=attention, dtype=jnp.bfloat16)
  run, program = compiled(model, images, step, any_values, IN_FLIGHT)
  run()
  return run, program.memory_analysis().temp_size_in_bytes


def any_values(make: Callable[[], Any]) -> Any:
  """Arrays like those of `make`: to compile a network's own initial values takes half a minute."""
  rng = np.random.default_rng(0)

  def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if 'kernel' in name and 'opt_state' not in name:
      values = rng.normal(0, np.sqrt(2 / np.prod(shape.shape[:-1])), shape.shape)
    else:
      values = np.full(shape.shape, 'scale' in name or 'var' in name)
    return jnp.asarray(values, shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make))


def pytorch(attention: str, images: np.ndarray, step: str, device: str) -> Peer:
  """timm's ResNet-50 by `torch.compile`, channels last, under autocast."""
  torch.manual_seed(0)
  module = network('resnet50', attention).to(device, memory_format=torch.channels_last)
  inputs = torch.from_numpy(images).to(device).contiguous(memory_format=torch.channels_last)
  labels = torch.arange(len(images), device=device)
  module.train(step == 'train')
  torch.backends.cudnn.benchmark = True
  call = torch.compile(module)
  optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

  def wait() -> None:
    if device == 'cuda':
      torch.cuda.synchronize()

  def forward() -> None:
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
      for _ in range(IN_FLIGHT):
        call(inputs)
    wait()

  def train() -> None:
    for _ in range(IN_FLIGHT):
      optimizer.zero_grad(set_to_none=True)
      with torch.autocast(device, torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(call(inputs), labels)
      loss.backward()
      optimizer.step()
    wait()

  run = forward if step == 'forward' else train
  run()
  if device != 'cuda':
    return run, 0
  before = torch.cuda.memory_allocated()
  torch.cuda.reset_peak_memory_stats()
  run()
  return run, torch.cuda.max_memory_allocated() - before


def networks(
  images: np.ndarray, rounds: int, threads: concurrent.futures.Executor, device: str
) -> dict[tuple[str, str], Runner]:
  """Prints images a second; returns our train steps by attention and implementation."""
  print('| ResNet-50 | step | peer | ms | images/s | times PyTorch | temporary GB |')
  print('|---|---|---|---|---|---|---|')
  steps = {}
  for attention, step in itertools.product(('none', 'cbam'), ('train', 'forward')):
    ours_by_implementation = {
      implementation: threads.submit(ours, attention, implementation, images, step)
      for implementation in (IMPLEMENTATIONS if attention == 'cbam' else ('xla',))
    }
    peers = {'PyTorch': pytorch(attention, images, step, device)}
    for implementation, compiling in ours_by_implementation.items():
      peers[f'cbam_jax, {implementation}'] = compiling.result()
      if step == 'train':
        steps[attention, implementation], _ = compiling.result()
    runners = {name: run for name, (run, _) in peers.items()}
    measured = measure(runners, rounds)
    seconds = {name: statistics.median(s) / IN_FLIGHT for name, s in measured.items()}
    for name, s in seconds.items():
      print(
        f'| {attention} | {step} | {name} | {1e3 * s:.2f} | {len(images) / s:.0f} '
        f'| {seconds["PyTorch"] / s:.2f} | {peers[name][1] / 1e9:.2f} |',
        flush=True,
      )
  return steps


def timed(function: Runner, repeats: int = 20) -> float:
  """Seconds of a run, the least of several."""
  function()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def peaks(size: int) -> tuple[float, float]:
  """FLOP/s of a bfloat16 matrix product, and bytes/s of a copy, read and written."""
  square = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(jnp.dot)
  flops = 2 * size**3 / timed(lambda: product(square, square).block_until_ready())
  array = jnp.ones((8 * size, size), jnp.float32)
  copy = jax.jit(jnp.negative)
  return flops, 2 * array.nbytes / timed(lambda: copy(array).block_until_ready())


class End(nn.Module):
  """The end of a residual block: norm, CBAM and sum."""

  implementation: str

  @nn.compact
  def __call__(self, x: jax.Array, shortcut: jax.Array) -> jax.Array:
    def convolved(x: jax.Array, norm: Any = None, *, train: bool = True) -> jax.Array:
      return x if norm is None else norm(x, train=train)

    attention = functools.partial(cbam_jax.CBAM, implementation=self.implementation)
    return finish_block(x, convolved, BatchNorm(name='norm'), attention, shortcut, train=True)


Block = tuple[tuple[int, ...], str, str, Any, tuple[jax.Array, ...]]


def blocks(batch: int, size: int, threads: concurrent.futures.Executor) -> list[Block]:
  """Shape, pass, implementation, compiled function and inputs of the end of a residual block.

  At each stage of ResNet-50.
  """
  made = []
  for fraction, channels in ((4, 256), (8, 512), (16, 1024), (32, 2048)):
    shape = (batch, size // fraction, size // fraction, channels)
    inputs = tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (0, 1))
    for implementation in IMPLEMENTATIONS:
      module = End(implementation)
      variables = module.init(jax.random.key(2), *(v[:1] for v in inputs))

      def end(*inputs, module=module, variables=variables):
        return module.apply(variables, *inputs, mutable=['batch_stats'])[0]

      def gradient(*inputs, end=end):
        y, pull_back = jax.vjp(end, *inputs)
        return pull_back(y)

      for name, function in (('forward', end), ('gradient', gradient)):
        compiling = threads.submit(jax.jit(function).lower(*inputs).compile)
        made.append((shape, name, implementation, compiling, inputs))
  return [(*what, compiling.result(), inputs) for *what, compiling, inputs in made]


def print_blocks(made: list[Block], flops: float, bandwidth: float) -> None:
  """Prints what the end of a residual block takes."""
  print('\n| features | pass | implementation | ms | of the bandwidth | of the FLOP rate |')
  print('|---|---|---|---|---|---|')
  for shape, name, implementation, run, inputs in made:
    s = timed(lambda run=run, inputs=inputs: jax.block_until_ready(run(*inputs)))
    count = run.cost_analysis().get('flops', float('nan'))
    print(
      f'| {"x".join(map(str, shape))} | {name} | {implementation} | {1e3 * s:.3f} '
      f'| {PASSES[name] * inputs[0].nbytes / s / bandwidth:.0%} | {count / s / flops:.2%} |',
      flush=True,
    )


def profile(run: Runner, name: str) -> None:
  """Prints the kernels of a train step that take longest."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (file,) = Path(folder).rglob('*.xplane.pb')
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    spent: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for plane in planes:
      for line in plane.lines if plane.name.startswith('/device:GPU') else ():
        if line.name.startswith('Stream'):
          for event in line.events:
            spent[event.name] += event.duration_ns
            count[event.name] += 1
  print(
    f'\n{name}: {spent.total() / 1e6 / IN_FLIGHT:.2f} ms '
    f'in {count.total() // IN_FLIGHT} kernels\n\n'
    '| kernel of a train step | launches | ms | share |'
  )
  print('|---|---|---|---|')
  for name, ns in spent.most_common(25):
    each = count[name] / IN_FLIGHT, ns / 1e6 / IN_FLIGHT, ns / spent.total()
    print(f'| {name[:70]} | {each[0]:g} | {each[1]:.2f} | {each[2]:.1%} |')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch-size', type=int, default=256)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  print(f'{jax.devices()[0].device_kind}; jax {jax.__version__}, PyTorch {torch.__version__}')
  flops, bandwidth = peaks(8192 if device == 'cuda' else 512)
  print(f'peaks measured: {flops / 1e12:.1f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s')
  print(f'bfloat16, batch {args.batch_size} at {args.image_size}\n')
  shape = (args.batch_size, 3, args.image_size, args.image_size)
  images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  with concurrent.futures.ThreadPoolExecutor() as threads:
    steps = networks(images, args.rounds, threads, device)
    print_blocks(blocks(args.batch_size, args.image_size, threads), flops, bandwidth)
  for attention, implementation in (('none', 'xla'), ('cbam', 'pallas')):
    profile(steps[attention, implementation], f'{attention}, {implementation}')


if __name__ == '__main__':
  main()
