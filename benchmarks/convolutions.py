"""The convolutions of a network alone, and their gradients, beside PyTorch's on the same CPU.

Their sum is a floor for the network's forward pass, and with the gradients for its train step:
normalisation, attention and everything else comes on top. "XLA" is each convolution as XLA has it
by default, with a 1x1 as such; `--skip XLA` leaves it out, whose gradients for ResNeXt take seconds
each.

  pip install 'cbam-jax[train,bench]'
  python benchmarks/convolutions.py [--network resnet50]
"""

import argparse
import collections
import contextlib
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from models import Runner, measure

from cbam_jax.layers import Conv, any_platform, compiler_options

# Side of the input over that of the image, kernel, stride, channels in and out, groups.
Layer = tuple[int, int, int, int, int, int]


def bottlenecks(width: int, groups: int) -> collections.Counter[Layer]:
  """How often each convolution stands in a network of 50 layers that begins `width` wide."""
  counts = collections.Counter({(1, 7, 2, 3, 64, 1): 1})
  channels, reduction = 64, 4
  for factor, blocks in ((1, 3), (2, 4), (4, 6), (8, 3)):
    inner, out = width * factor, 256 * factor
    for block in range(blocks):
      stride = 2 if block == 0 and factor > 1 else 1
      counts[reduction, 1, 1, channels, inner, 1] += 1
      counts[reduction, 3, stride, inner, inner, groups] += 1
      if block == 0:
        counts[reduction, 1, stride, channels, out, 1] += 1
      reduction *= stride
      counts[reduction, 1, 1, inner, out, 1] += 1
      channels = out
  return counts


def separable() -> collections.Counter[Layer]:
  """How often each convolution stands in MobileNetV1."""
  counts = collections.Counter({(1, 3, 2, 3, 32, 1): 1})
  channels, reduction = 32, 2
  for out, strides in (
    (64, [1]),
    (128, [2, 1]),
    (256, [2, 1]),
    (512, [2] + 5 * [1]),
    (1024, [2, 1]),
  ):
    for stride in strides:
      counts[reduction, 3, stride, channels, channels, channels] += 1
      reduction *= stride
      counts[reduction, 1, 1, channels, out, 1] += 1
      channels = out
  return counts


NETWORKS = {
  'resnet50': bottlenecks(64, 1),
  'resnext50_32x4d': bottlenecks(128, 32),
  'mobilenet_v1': separable(),
}


def of_images(x: np.ndarray | jax.Array) -> bool:
  """Whether nothing is before the convolution of `x` that needs a gradient."""
  return x.shape[-1] == 3


def in_jax(
  x: np.ndarray, kernel: np.ndarray, stride: int, groups: int, plain: bool = False
) -> dict[str, Runner]:
  """Our convolution and its gradients by input and kernel, or if `plain`, XLA's."""
  conv = Conv(kernel.shape[3], kernel.shape[:2], stride, groups=groups)

  def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv.apply({'params': {'kernel': kernel}}, x)

  def gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    if of_images(x):
      return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](dy)
    return jax.vjp(forward, x, kernel)[1](dy)

  inputs = jnp.asarray(x), jnp.asarray(kernel)
  compiled = functools.partial(jax.jit, compiler_options=None if plain else compiler_options())
  with any_platform() if plain else contextlib.nullcontext():
    run = compiled(forward).lower(*inputs).compile()
    dy = run(*inputs)
    run_back = compiled(gradients).lower(*inputs, dy).compile()
  return {
    'forward': lambda: jax.block_until_ready(run(*inputs)),
    'gradients': lambda: jax.block_until_ready(run_back(*inputs, dy)),
  }


def in_pytorch(x: np.ndarray, kernel: np.ndarray, stride: int, groups: int) -> dict[str, Runner]:
  """PyTorch's, channels last."""
  images = torch.from_numpy(x).permute(0, 3, 1, 2)
  weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
  weight = weight.contiguous(memory_format=torch.channels_last)
  steps, padding = [stride] * 2, [kernel.shape[0] // 2] * 2
  convolve = functools.partial(
    torch.nn.functional.conv2d, images, weight, stride=steps, padding=padding, groups=groups
  )
  dy = convolve()

  def run() -> None:
    with torch.inference_mode():
      convolve()

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
      groups,
      [not of_images(x), True, False],
    )

  return {'forward': run, 'gradients': run_back}


PEERS = {
  'cbam_jax': in_jax,
  'XLA': functools.partial(in_jax, plain=True),
  'PyTorch': in_pytorch,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', default='resnet50', choices=NETWORKS)
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--skip', nargs='+', default=[], choices=PEERS, help='peers to leave out')
  args = parser.parse_args()

  names = [name for name in PEERS if name not in args.skip]
  cells = [f'{name}, ms' for name in names] + [f'{name}, GFLOP/s' for name in names]
  print(f'| times | features | kernel | pass | {" | ".join(cells)} |')
  print('|---' * (4 + len(cells)) + '|')
  rng = np.random.default_rng(0)
  totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for (reduction, size, stride, channels, features, groups), count in NETWORKS[
    args.network
  ].items():
    side = args.image_size // reduction
    x = rng.standard_normal((args.batch_size, side, side, channels), np.float32)
    kernel = rng.standard_normal((size, size, channels // groups, features), np.float32)
    peers = {name: PEERS[name](x, kernel, stride, groups) for name in names}
    for name, times in (('forward', 1), ('gradients', 1 if of_images(x) else 2)):
      runners = {peer: passes[name] for peer, passes in peers.items()}
      # The least, since this is a floor.
      seconds = {peer: min(s) for peer, s in measure(runners, args.rounds, 0.05).items()}
      flops = times * 2 * x[..., 0].size / stride**2 * kernel.size
      totals[name].update({peer: count * s for peer, s in seconds.items()}, FLOP=count * flops)
      what = f'{count} | {side}x{side}x{channels} | {size}x{size} / {stride}, {features}'
      what += f', {groups} groups' * (groups > 1)
      print(row(what, name, {**seconds, 'FLOP': flops}), flush=True)
  for name, total in totals.items():
    print(row(f'| all, {total["FLOP"] / 1e9:.0f} GFLOP |', name, total))


def row(what: str, name: str, of: Mapping[str, float]) -> str:
  """A line of the table, from seconds and FLOP."""
  peers = [peer for peer in PEERS if peer in of]
  cells = [f'{1e3 * of[peer]:.1f}' for peer in peers]
  cells += [f'{of["FLOP"] / of[peer] / 1e9:.0f}' for peer in peers]
  return f'| {what} | {name} | {" | ".join(cells)} |'


if __name__ == '__main__':
  main()
