"""Time, memory and compilation of networks, beside PyTorch's on the same CPU.

The peers run in one process and in turn, so that a drift of the machine's speed meets all alike;
the table gives medians, and the median of the ratios round by round. Each then runs in a process of
its own for the seconds to its first result and the largest resident memory of one step after that,
whatever the process held before counted.

PyTorch runs timm's networks, eagerly and by `torch.compile`, in both memory formats, and for CBAM
in the paper's form as well as in timm's; the fastest is compared. "definition" is our network with
CBAM step by step and each convolution left to XLA, whose gradients of a ResNeXt take minutes on a
CPU (`--skip definition`).

  pip install 'cbam-jax[train,bench]'
  python benchmarks/models.py [--models resnet50] [--attention none cbam] [--steps forward train]
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
import train_step
from pytorch_networks import NAMES, network

import cbam_jax
from cbam_jax.layers import any_platform
from cbam_jax.models.base import Classifier

ATTENTIONS = ('none', 'se', 'bam', 'cbam')

Runner = Callable[[], None]


def compiled(
  model: Classifier,
  images: np.ndarray,
  step: str,
  values: Callable[[Callable[[], Any]], Any] = train_step.initial,
  repeats: int = 1,
  options: dict[str, str] | None = None,
  in_parts: Callable[..., Any] = cbam_jax.in_parts,
) -> tuple[Runner, jax.stages.Compiled]:
  """A network of ours, with the values that `values` makes and `options` (see `train_step.make`).

  It runs `repeats` steps, and waits for the last; a forward pass by `in_parts`.
  """
  nhwc = jnp.asarray(images.transpose(0, 2, 3, 1))
  if step == 'forward':
    variables = values(lambda: model.init(jax.random.key(0), nhwc[:1], train=False))

    def apply(variables: Any, images: jax.Array) -> jax.Array:
      return in_parts(functools.partial(model.apply, variables, train=False), images)

    forward = jax.jit(apply, compiler_options=options).lower(variables, nhwc).compile()

    def infer() -> None:
      jax.block_until_ready([forward(variables, nhwc) for _ in range(repeats)])

    return infer, forward

  step_function, state, batch = train_step.make(model, nhwc, values, options)
  one_step = step_function.lower(state, batch).compile()

  def train() -> None:
    nonlocal state
    for _ in range(repeats):
      state, metrics = one_step(state, batch)
    jax.block_until_ready((state, metrics))

  return train, one_step


def ours(name: str, attention: str, images: np.ndarray, step: str) -> Runner:
  """Our network, as `train.py` and `evaluate` compile and call it."""
  model = cbam_jax.create_model(name, attention=attention)
  return compiled(model, images, step, options=cbam_jax.compiler_options())[0]


def definition(name: str, attention: str, images: np.ndarray, step: str) -> Runner:
  """Our network as plain linen: nothing fused, called whole, and compiled as by default."""

  def plain(name: str) -> cbam_jax.CBAM:
    return cbam_jax.CBAM(implementation='plain', name=name)

  model = cbam_jax.create_model(name, attention=plain if attention == 'cbam' else attention)
  with any_platform():
    return compiled(model, images, step, in_parts=lambda function, images: function(images))[0]


def pytorch(
  name: str,
  attention: str,
  images: np.ndarray,
  step: str,
  *,
  channels_last: bool,
  optimized: bool,
) -> Runner:
  """PyTorch's network, by `torch.compile` if `optimized`."""
  torch.manual_seed(0)
  module = network(name, attention)
  inputs = torch.from_numpy(images)
  if channels_last:
    module = module.to(memory_format=torch.channels_last)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
  call = torch.compile(module) if optimized else module
  if step == 'forward':
    module.eval()

    def forward() -> None:
      with torch.inference_mode():
        call(inputs)

    return forward

  module.train()
  labels = torch.arange(len(images))
  optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

  def train() -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(call(inputs), labels).backward()
    optimizer.step()

  return train


def peers(name: str, attention: str, images: np.ndarray, step: str) -> dict[str, Callable]:
  """What makes each peer's runner, by its name."""
  arguments = (images, step)
  makers = {
    'cbam_jax': functools.partial(ours, name, attention, *arguments),
    'definition': functools.partial(definition, name, attention, *arguments),
  }
  for form in ('cbam', 'paper_cbam') if attention == 'cbam' else (attention,):
    for channels_last in (False, True):
      for optimized in (False, True):
        words = ['torch.compile' if optimized else 'PyTorch']
        words += ['channels_last'] * channels_last + ["paper's CBAM"] * (form == 'paper_cbam')
        makers[', '.join(words)] = functools.partial(
          pytorch, name, form, *arguments, channels_last=channels_last, optimized=optimized
        )
  return makers


def measure(runners: dict[str, Runner], rounds: int, pause: float = 0.3) -> dict[str, list[float]]:
  """Seconds of each runner, in turn, after one round that does not count."""
  seconds: dict[str, list[float]] = {name: [] for name in runners}
  for number in range(rounds + 1):
    for name, run in runners.items():
      # The threads of the peer before spin for a while once they are idle.
      time.sleep(pause)
      start = time.perf_counter()
      run()
      if number:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def first_step_and_memory(make: Callable[[], Runner]) -> tuple[float, float]:
  """Seconds to a first result, and the largest resident memory of a later step, MB."""
  start = time.perf_counter()
  run = make()
  run()
  seconds = time.perf_counter() - start
  run()
  Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
  run()
  status = Path('/proc/self/status').read_text()
  return seconds, int(status.partition('VmHWM:')[2].split()[0]) / 1e3


def alone(make: Callable[[], Runner]) -> tuple[float, float]:
  """`first_step_and_memory` in a process of its own."""
  fresh = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
    return pool.submit(first_step_and_memory, make).result()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--models', nargs='+', default=list(NAMES[1:]), choices=NAMES)
  parser.add_argument('--attention', nargs='+', default=list(ATTENTIONS), choices=ATTENTIONS)
  parser.add_argument('--steps', nargs='+', default=['forward', 'train'])
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(
    '--skip', nargs='+', default=[], help='other peers whose names hold one of these'
  )
  args = parser.parse_args()

  device = jax.devices()[0].device_kind
  print(
    f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {device}'
  )
  print(f'jax {jax.__version__}, PyTorch {torch.__version__}, timm {timm.__version__}')
  print(f'float32, batch {args.batch_size} at {args.image_size}, median of {args.rounds} rounds\n')
  print('| network | step | peer | s | s / cbam_jax | first result, s | memory, MB |')
  print('|---|---|---|---|---|---|---|')
  shape = (args.batch_size, 3, args.image_size, args.image_size)
  images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  for name in args.models:
    for attention in args.attention:
      for step in args.steps:
        makers = {
          peer: make
          for peer, make in peers(name, attention, images, step).items()
          if peer == 'cbam_jax' or not any(word in peer for word in args.skip)
        }
        torch.compiler.reset()  # or it gives up compiling after eight networks
        seconds = measure({peer: make() for peer, make in makers.items()}, args.rounds)
        for peer, make in makers.items():
          ratio = statistics.median(
            theirs / own for theirs, own in zip(seconds[peer], seconds['cbam_jax'], strict=True)
          )
          first, memory = alone(make)
          print(
            f'| {name}, {attention} | {step} | {peer} | {statistics.median(seconds[peer]):.3f} '
            f'| {ratio:.2f} | {first:.0f} | {memory:.0f} |',
            flush=True,
          )


if __name__ == '__main__':
  main()
