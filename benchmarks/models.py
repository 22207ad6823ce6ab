"""Time of a network's forward pass and train step, beside PyTorch's on the same machine.

The peers run in one process and in turn, so that a drift of the machine's speed meets all alike;
the table gives medians, and the median of the ratios round by round. PyTorch runs timm's networks
eagerly in both memory formats, of which the faster is compared; its train step is timm's network
under `torch.optim.SGD`. "linen" is our network with each 1x1 convolution left to XLA's convolution.

  pip install 'cbam-jax[train,bench]'
  python benchmarks/models.py [--models resnet50] [--attention none cbam] [--steps forward train]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch

import cbam_jax
from cbam_jax.layers import Conv
from cbam_jax.models.base import Classifier
from cbam_jax.training.optimizer import sgd
from cbam_jax.training.state import create_state
from cbam_jax.training.step import make_train_step

# timm's names, and how it is told the attention.
TIMM_NAMES = {'resnet50': 'resnet50', 'resnext50_32x4d': 'resnext50_32x4d', 'resnet18': 'resnet18'}

Runner = Callable[[], None]


def ours(model: Classifier, images: np.ndarray, step: str) -> Runner:
  """Runs our network, compiled."""
  nhwc = jnp.asarray(images.transpose(0, 2, 3, 1))
  if step == 'forward':
    variables = model.init(jax.random.key(0), nhwc[:1], train=False)
    forward = jax.jit(lambda x: model.apply(variables, x, train=False))
    forward(nhwc)
    return lambda: jax.block_until_ready(forward(nhwc))

  optimizer = sgd(0.1)
  batch = {
    'image': nhwc,
    'label': jnp.arange(len(images)),
    'mask': jnp.ones(len(images), bool),
  }
  train_step = jax.jit(make_train_step(model, optimizer, lambda x: x), donate_argnums=0)
  state = create_state(model, optimizer, jax.random.key(0), nhwc.shape[1:])
  state, _ = train_step(state, batch)

  def run() -> None:
    nonlocal state
    state, metrics = train_step(state, batch)
    jax.block_until_ready((state, metrics))

  return run


def linen(model: Classifier, images: np.ndarray, step: str) -> Runner:
  """Runs our network with 1x1 convolutions as convolutions."""
  with mock.patch.object(Conv, '_pointwise', Conv._convolve):
    return ours(model, images, step)


def pytorch(
  name: str, attention: str, images: np.ndarray, step: str, channels_last: bool
) -> Runner:
  """Runs timm's network eagerly."""
  layer = None if attention == 'none' else attention
  network = timm.create_model(TIMM_NAMES[name], block_args={'attn_layer': layer})
  inputs = torch.from_numpy(images)
  if channels_last:
    network = network.to(memory_format=torch.channels_last)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
  if step == 'forward':
    network.eval()

    def forward() -> None:
      with torch.inference_mode():
        network(inputs)

    return forward

  network.train()
  labels = torch.arange(len(images))
  optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

  def train() -> None:
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(network(inputs), labels).backward()
    optimizer.step()

  return train


def measure(runners: dict[str, Runner], rounds: int) -> dict[str, list[float]]:
  """Seconds of each runner, in turn, after one round that does not count."""
  seconds: dict[str, list[float]] = {name: [] for name in runners}
  for number in range(rounds + 1):
    for name, run in runners.items():
      # The threads of the peer before spin for a while once they are idle.
      time.sleep(0.3)
      start = time.perf_counter()
      run()
      if number:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--models', nargs='+', default=['resnet50'], choices=TIMM_NAMES)
  parser.add_argument('--attention', nargs='+', default=['none', 'cbam'])
  parser.add_argument('--steps', nargs='+', default=['forward', 'train'])
  parser.add_argument('--batch-size', type=int, default=16)
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()

  device = jax.devices()[0].device_kind
  print(
    f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {device}'
  )
  print(f'jax {jax.__version__}, PyTorch {torch.__version__}, timm {timm.__version__}')
  print(
    f'float32, batch {args.batch_size} at {args.image_size}, median of {args.rounds} rounds, s\n'
  )
  print('| network | step | cbam_jax | linen | PyTorch | PyTorch channels_last '
        '| best PyTorch / cbam_jax |')  # fmt: skip
  print('|---|---|---|---|---|---|---|')
  shape = (args.batch_size, 3, args.image_size, args.image_size)
  images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  for name in args.models:
    for attention in args.attention:
      for step in args.steps:
        model = cbam_jax.create_model(name, attention=attention)
        runners = {
          'ours': ours(model, images, step),
          'linen': linen(model, images, step),
          'nchw': pytorch(name, attention, images, step, channels_last=False),
          'nhwc': pytorch(name, attention, images, step, channels_last=True),
        }
        seconds = measure(runners, args.rounds)
        medians = {peer: statistics.median(times) for peer, times in seconds.items()}
        best = min('nchw', 'nhwc', key=medians.__getitem__)
        ratio = statistics.median(
          theirs / own for theirs, own in zip(seconds[best], seconds['ours'], strict=True)
        )
        cells = ' | '.join(f'{medians[peer]:.3f}' for peer in runners)
        print(f'| {name}, {attention} | {step} | {cells} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
  main()
