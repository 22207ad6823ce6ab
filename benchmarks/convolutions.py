"""The convolutions of ResNet-50 alone, forward, in XLA and in PyTorch, on the same CPU.

Their sum in XLA is a floor for the network's forward pass: normalisation, attention and everything
else comes on top. A 1x1 convolution is a matrix product, as in cbam_jax.

  pip install 'cbam-jax[train,bench]'
  python benchmarks/convolutions.py
"""

import argparse
import collections
import functools

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


def in_xla(x: np.ndarray, kernel: np.ndarray, stride: int) -> Runner:
  """Our convolution."""
  conv = Conv(kernel.shape[3], kernel.shape[:2], stride)
  variables = {'params': {'kernel': jnp.asarray(kernel)}}
  run = jax.jit(functools.partial(conv.apply, variables))
  images = jnp.asarray(x)
  return lambda: jax.block_until_ready(run(images))


def in_pytorch(x: np.ndarray, kernel: np.ndarray, stride: int) -> Runner:
  """PyTorch's, channels last."""
  images = torch.from_numpy(x).permute(0, 3, 1, 2)
  weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
  weight = weight.contiguous(memory_format=torch.channels_last)

  def run() -> None:
    with torch.inference_mode():
      torch.nn.functional.conv2d(images, weight, stride=stride, padding=kernel.shape[0] // 2)

  return run


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()

  print('| times | features | kernel | XLA, ms | PyTorch, ms | XLA, GFLOP/s | PyTorch, GFLOP/s |')
  print('|---|---|---|---|---|---|---|')
  rng = np.random.default_rng(0)
  totals: collections.Counter[str] = collections.Counter()
  for (reduction, size, stride, channels, features), count in layers().items():
    side = args.image_size // reduction
    x = rng.standard_normal((args.batch_size, side, side, channels), np.float32)
    kernel = rng.standard_normal((size, size, channels, features), np.float32)
    peers = {'XLA': in_xla(x, kernel, stride), 'PyTorch': in_pytorch(x, kernel, stride)}
    # The least, since this is a floor.
    seconds = {name: min(times) for name, times in measure(peers, args.rounds, 0.05).items()}
    flops = 2 * x.size / stride**2 * size**2 * features
    for name, s in seconds.items():
      totals[name] += count * s
    totals['FLOP'] += count * flops
    print(
      f'| {count} | {side}x{side}x{channels} | {size}x{size} / {stride}, {features} '
      f'| {1e3 * seconds["XLA"]:.1f} | {1e3 * seconds["PyTorch"]:.1f} '
      f'| {flops / seconds["XLA"] / 1e9:.0f} | {flops / seconds["PyTorch"] / 1e9:.0f} |',
      flush=True,
    )
  print(
    f'| | all {totals["FLOP"] / 1e9:.0f} GFLOP | | {1e3 * totals["XLA"]:.0f} '
    f'| {1e3 * totals["PyTorch"]:.0f} | {totals["FLOP"] / totals["XLA"] / 1e9:.0f} '
    f'| {totals["FLOP"] / totals["PyTorch"] / 1e9:.0f} |'
  )


if __name__ == '__main__':
  main()
