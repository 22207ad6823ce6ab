"""The convolutions of ResNet-50 alone, and their gradients, in XLA and in PyTorch, on the same CPU.

Their sum in XLA is a floor for the network's forward pass, and with the gradients for its train
step: normalisation, attention and everything else comes on top. A 1x1 convolution is a matrix
product, as in cbam_jax.

  pip install 'cbam-jax[train,bench]'
  python benchmarks/convolutions.py
"""

import argparse
import collections
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from models import Runner, measure

from cbam_jax.layers import Conv

# Side of the input over that of the image, kernel, stride, channels in and out.
Layer = tuple[int, int, int, int, int]


def layers() -> collections.Counter[Layer]:
  """How often each convolution stands in ResNet-50."""
  counts = collections.Counter({(1, 7, 2, 3, 64): 1})
  channels, reduction = 64, 4
  for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
    for block in range(blocks):
      stride = 2 if block == 0 and inner > 64 else 1
      counts[reduction, 1, 1, channels, inner] += 1
      counts[reduction, 3, stride, inner, inner] += 1
      if block == 0:
        counts[reduction, 1, stride, channels, 4 * inner] += 1
      reduction *= stride
      counts[reduction, 1, 1, inner, 4 * inner] += 1
      channels = 4 * inner
  return counts


def of_images(x: np.ndarray | jax.Array) -> bool:
  """Whether nothing is before the convolution of `x` that needs a gradient."""
  return x.shape[-1] == 3


def in_xla(x: np.ndarray, kernel: np.ndarray, stride: int) -> dict[str, Runner]:
  """Our convolution, and its gradients by input and kernel."""
  conv = Conv(kernel.shape[3], kernel.shape[:2], stride)

  def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv.apply({'params': {'kernel': kernel}}, x)

  def gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    if of_images(x):
      return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](dy)
    return jax.vjp(forward, x, kernel)[1](dy)

  inputs = jnp.asarray(x), jnp.asarray(kernel)
  run, run_back = jax.jit(forward), jax.jit(gradients)
  dy = run(*inputs)
  return {
    'forward': lambda: jax.block_until_ready(run(*inputs)),
    'gradients': lambda: jax.block_until_ready(run_back(*inputs, dy)),
  }


def in_pytorch(x: np.ndarray, kernel: np.ndarray, stride: int) -> dict[str, Runner]:
  """PyTorch's, channels last."""
  images = torch.from_numpy(x).permute(0, 3, 1, 2)
  weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
  weight = weight.contiguous(memory_format=torch.channels_last)
  steps, padding = [stride] * 2, [kernel.shape[0] // 2] * 2
  dy = torch.nn.functional.conv2d(images, weight, stride=steps, padding=padding)

  def run() -> None:
    with torch.inference_mode():
      torch.nn.functional.conv2d(images, weight, stride=steps, padding=padding)

  def run_back() -> None:
    torch.ops.aten.convolution_backward(
      dy,
      images,
      weight,
      None,
      steps,
      padding,
      [1, 1],
      False,
      [0, 0],
      1,
      [not of_images(x), True, False],
    )

  return {'forward': run, 'gradients': run_back}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()

  print('| times | features | kernel | pass | XLA, ms | PyTorch, ms | XLA, GFLOP/s | PyTorch |')
  print('|---|---|---|---|---|---|---|---|')
  rng = np.random.default_rng(0)
  totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for (reduction, size, stride, channels, features), count in layers().items():
    side = args.image_size // reduction
    x = rng.standard_normal((args.batch_size, side, side, channels), np.float32)
    kernel = rng.standard_normal((size, size, channels, features), np.float32)
    peers = {'XLA': in_xla(x, kernel, stride), 'PyTorch': in_pytorch(x, kernel, stride)}
    for name, times in (('forward', 1), ('gradients', 1 if of_images(x) else 2)):
      runners = {peer: passes[name] for peer, passes in peers.items()}
      # The least, since this is a floor.
      seconds = {peer: min(s) for peer, s in measure(runners, args.rounds, 0.05).items()}
      flops = times * 2 * x.size / stride**2 * size**2 * features
      totals[name].update({peer: count * s for peer, s in seconds.items()}, FLOP=count * flops)
      what = f'{count} | {side}x{side}x{channels} | {size}x{size} / {stride}, {features}'
      print(row(what, name, {**seconds, 'FLOP': flops}), flush=True)
  for name, total in totals.items():
    print(row(f'| all, {total["FLOP"] / 1e9:.0f} GFLOP |', name, total))


def row(what: str, name: str, of: Mapping[str, float]) -> str:
  """A line of the table, from seconds and FLOP."""
  peers = ('XLA', 'PyTorch')
  cells = [f'{1e3 * of[peer]:.1f}' for peer in peers]
  cells += [f'{of["FLOP"] / of[peer] / 1e9:.0f}' for peer in peers]
  return f'| {what} | {name} | {" | ".join(cells)} |'


if __name__ == '__main__':
  main()
