"""Batches of examples: a pure function of the seed and the step, read ahead by grain."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, TypedDict

import jax
import numpy as np

from cbam_jax.data.sources import Source
from cbam_jax.data.transforms import Transform, decode
from cbam_jax.errors import UserError, require


class Batch(TypedDict):
  """What a step takes: this process's share of a global batch.

  `image` is uint8 (n, H, W, C), `label` int32 (n,), `mask` bool (n,), False where the example
  only fills up the last batch of an evaluation.
  """

  image: np.ndarray
  label: np.ndarray
  mask: np.ndarray


class _Examples:
  """This process's examples in the order they are fed, with random access.

  Position j of a process's stream belongs to global batch `j // local_size`. Whatever the number
  of processes, a global batch holds the same examples in the same order, and each example's
  randomness comes from (seed, epoch, index) alone.
  """

  def __init__(
    self, source: Source, transform: Transform, batch_size: int, steps: int, seed: int | None
  ):
    self.source = source
    self.transform = transform
    self.batch_size = batch_size
    self.local_size = batch_size // jax.process_count()
    self.offset = jax.process_index() * self.local_size
    self.steps = steps
    self.seed = seed

  def __len__(self) -> int:
    return self.steps * self.local_size

  def __getitem__(self, position: int) -> dict[str, Any]:
    step, row = divmod(position, self.local_size)
    place = step * self.batch_size + self.offset + row
    size = len(self.source)
    if self.seed is None:
      epoch, index, real = 0, min(place, size - 1), place < size
    else:
      # The examples that do not fill a batch are left out, others in every epoch.
      epoch, place = divmod(place, size // self.batch_size * self.batch_size)
      index, real = int(_permutation(self.seed, epoch, size)[place]), True
    rng = np.random.default_rng((self.seed or 0, epoch, index))
    record = self.source[index]
    image = self.transform(decode(record['image']), rng)
    return {'image': image, 'label': np.int32(record['label']), 'mask': np.bool_(real)}


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(size)


def train_batches(
  source: Source,
  transform: Transform,
  batch_size: int,
  *,
  seed: int,
  start_step: int,
  stop_step: int,
  workers: int = 0,
) -> Iterator[Batch]:
  """The shuffled batches of steps `start_step` to `stop_step`, this process's share of each.

  Args:
    source: The examples.
    transform: What is done to a decoded image.
    batch_size: Examples of a global batch, over all processes.
    seed: Seed of the order and of the transforms.
    start_step: First step; 0 at the start of a run.
    stop_step: One past the last step.
    workers: Processes that decode and transform; 0 for threads of this process.

  Raises:
    UserError: If the processes do not divide the batch, or the source holds less than a batch.
  """
  if len(source) < batch_size:
    raise UserError(
      f'batch_size={batch_size} but the training set holds {len(source)} examples; choose a '
      'batch size of at most that.'
    )
  _check_processes(batch_size)
  examples = _Examples(source, transform, batch_size, stop_step, seed)
  return _read(examples, start_step, workers)


def eval_batches(
  source: Source, transform: Transform, batch_size: int, *, workers: int = 0
) -> Iterator[Batch]:
  """Every example once, in order, this process's share of each batch; the last one is filled up.

  Args:
    source: The examples.
    transform: What is done to a decoded image.
    batch_size: Examples of a global batch, over all processes.
    workers: Processes that decode and transform; 0 for threads of this process.

  Raises:
    UserError: If the processes do not divide the batch.
  """
  _check_processes(batch_size)
  steps = -(len(source) // -batch_size)
  return _read(_Examples(source, transform, batch_size, steps, seed=None), 0, workers)


def _check_processes(batch_size: int) -> None:
  if batch_size % jax.process_count():
    raise UserError(
      f'batch_size={batch_size} cannot be split over {jax.process_count()} processes; choose a '
      'multiple of their number.'
    )


def _read(examples: _Examples, start_step: int, workers: int) -> Iterator[Batch]:
  grain = require('grain', 'train')
  dataset = (
    grain.MapDataset.source(examples)
    .batch(examples.local_size, drop_remainder=True)
    .slice(slice(start_step, None))
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  )
  if workers:
    from absl import flags

    # grain's workers read absl flags, which only absl.app parses: a script need not run under it.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(dataset)
