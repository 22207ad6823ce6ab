"""How a train step's time and memory grow with the batch and with the side of the images.

Cost that grows as it should is a line over the pixels of a step: a constant (the parameters' share)
and so much for every example or for every square of the side. Prints how far from it costs are, and
draws both.

  pip install 'cbam-jax[train]'
  python benchmarks/growth.py [--model resnet50] [--figure growth.png]
"""

import argparse
import statistics
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import train_step

import cbam_jax

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIDES = (96, 128, 160, 192, 224, 288, 384)


def cost(name: str, attention: str, batch: int, side: int, rounds: int) -> tuple[float, float]:
  """Median seconds of a train step, and MB of its temporary memory."""
  model = cbam_jax.create_model(name, attention=attention)
  images = jax.random.normal(jax.random.key(1), (batch, side, side, 3))
  step, state, examples = train_step.make(model, images, options=cbam_jax.compiler_options())
  compiled = step.lower(state, examples).compile()
  seconds = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    state, metrics = compiled(state, examples)
    jax.block_until_ready(metrics)
    seconds.append(time.perf_counter() - start)
  memory = compiled.memory_analysis().temp_size_in_bytes
  return statistics.median(seconds[1:]), memory / 1e6


def line(pixels: np.ndarray, costs: np.ndarray) -> tuple[float, float]:
  """Constant and slope of the line with the least squares of relative errors."""
  return tuple(np.linalg.lstsq(np.stack([1 / costs, pixels / costs], 1), np.ones(len(costs)))[0])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--attention', nargs='+', default=['none', 'cbam'])
  parser.add_argument('--batches', nargs='+', type=int, default=BATCHES)
  parser.add_argument('--sides', nargs='+', type=int, default=SIDES)
  parser.add_argument('--fixed-batch', type=int, default=4)
  parser.add_argument('--fixed-side', type=int, default=96)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--figure', help='where the figure goes')
  args = parser.parse_args()

  print(f'{jax.devices()[0].device_kind}; jax {jax.__version__}; {args.model}, float32\n')
  print('| attention | batch | side | s | temporary MB |\n|---|---|---|---|---|')
  sweeps = {
    f'batch, at {args.fixed_side}x{args.fixed_side}': [(b, args.fixed_side) for b in args.batches],
    f'side, batch of {args.fixed_batch}': [(args.fixed_batch, side) for side in args.sides],
  }
  figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout='constrained', sharey='row')
  rows = []
  for column, (title, points) in enumerate(sweeps.items()):
    sizes = [point[column] for point in points]
    pixels = np.array([batch * side**2 for batch, side in points])
    for attention in args.attention:
      costs = []
      for batch, side in points:
        seconds, memory = cost(args.model, attention, batch, side, args.rounds)
        costs.append((seconds, memory))
        print(f'| {attention} | {batch} | {side} | {seconds:.3f} | {memory:.0f} |', flush=True)
      for axis, name, values in zip(
        axes[:, column], ('s', 'temporary MB'), np.transpose(costs), strict=True
      ):
        constant, slope = line(pixels, values)
        fitted = constant + slope * pixels
        error = np.max(np.abs(values / fitted - 1))
        rows.append((title, attention, name, constant, slope * 224**2, error))
        (drawn,) = axis.plot(pixels / 1e6, values, 'o', label=attention)
        axis.plot(pixels / 1e6, fitted, '-', color=drawn.get_color())
        axis.set_ylabel(name)
    for axis in axes[:, column]:
      axis.set_xlabel(f'megapixels ({title}: {", ".join(map(str, sizes))})')
      axis.set_ylim(bottom=0)
      axis.grid(alpha=0.3)
      axis.legend()
  print('\n| growing | attention | of | constant | an image of 224x224 | farthest from the line |')
  print('|---|---|---|---|---|---|')
  for *names, constant, slope, error in rows:
    print(f'| {" | ".join(names)} | {constant:.3g} | {slope:.3g} | {error:.0%} |')
  figure.suptitle(f'A train step of {args.model}')
  if args.figure:
    figure.savefig(args.figure, dpi=150)


if __name__ == '__main__':
  main()
