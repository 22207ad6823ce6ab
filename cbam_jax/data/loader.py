"""Batches of examples: a pure function of the seed and the step, read ahead by grain."""

from __future__ import annotations

import functools
import logging
from typing import Any, Self, TypedDict, cast

import jax
import numpy as np

from cbam_jax.data.sources import Source
from cbam_jax.data.transforms import Transform, decode
from cbam_jax.errors import RunError, UserError, require

logger = logging.getLogger(__name__)

# A set so damaged is not worth searching on.
MOST_BAD_IN_A_ROW = 100


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
    image, label, bad = self._next_good(epoch, index)
    if not real:
      bad = 0  # a filler was counted in its own place
    elif self.seed is None and bad:
      real = False  # an evaluation counts no image twice
    return {
      'image': image,
      'label': np.int32(label),
      'mask': np.bool_(real),
      'index': np.int64(index),
      'bad': np.int32(bad),
    }

  def _next_good(self, epoch: int, index: int) -> tuple[np.ndarray, int, int]:
    """The image and label at `index`, or the nearest after it that can be read, and how many not.

    Raises:
      RunError: If a hundred in a row cannot.
    """
    for bad in range(MOST_BAD_IN_A_ROW):
      at = (index + bad) % len(self.source)
      rng = np.random.default_rng((self.seed or 0, epoch, at))
      try:
        record = self.source[at]
        return self.transform(decode(record['image']), rng), record['label'], bad
      except UserError:
        raise
      except Exception as error:  # Pillow raises nearly anything on a damaged file
        reason = error
    raise RunError(
      f'{MOST_BAD_IN_A_ROW} images in a row from number {index} on cannot be read (the last: '
      f'{reason}); check the data set and the disk it is on.'
    )


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
  bad_share: float = 0.001,
) -> BatchIterator:
  """The shuffled batches of steps `start_step` to `stop_step`, this process's share of each.

  Args:
    source: The examples.
    transform: What is done to a decoded image.
    batch_size: Examples of a global batch, over all processes.
    seed: Seed of the order and of the transforms.
    start_step: First step; 0 at the start of a run.
    stop_step: One past the last step.
    workers: Processes that decode and transform; 0 for threads of this process.
    bad_share: Share of the images that may be unreadable; past it, iterating raises `RunError`.

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
  return BatchIterator(examples, start_step, workers, bad_share)


def eval_batches(
  source: Source,
  transform: Transform,
  batch_size: int,
  *,
  workers: int = 0,
  bad_share: float = 0.001,
) -> BatchIterator:
  """Every example once, in order, this process's share of each batch; the last one is filled up.

  Args:
    source: The examples.
    transform: What is done to a decoded image.
    batch_size: Examples of a global batch, over all processes.
    workers: Processes that decode and transform; 0 for threads of this process.
    bad_share: Share of the images that may be unreadable; past it, iterating raises `RunError`.

  Raises:
    UserError: If the processes do not divide the batch.
  """
  _check_processes(batch_size)
  steps = -(len(source) // -batch_size)
  examples = _Examples(source, transform, batch_size, steps, seed=None)
  return BatchIterator(examples, 0, workers, bad_share)


def _check_processes(batch_size: int) -> None:
  if batch_size % jax.process_count():
    raise UserError(
      f'batch_size={batch_size} cannot be split over {jax.process_count()} processes; choose a '
      'multiple of their number.'
    )


class BatchIterator:
  """Batches read ahead by grain, and what was wrong with them.

  Attributes:
    bad_images: How many images so far could not be read, and were replaced or left out.
  """

  def __init__(self, examples: _Examples, start_step: int, workers: int, bad_share: float):
    grain = require('grain', 'train')
    dataset = (
      grain.MapDataset.source(examples)
      .batch(examples.local_size, drop_remainder=True)
      .slice(slice(start_step, None))
      .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    if workers:
      from absl import flags

      # grain's workers read absl's flags, which the command line has no use for.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    self.bad_images = 0
    self._read = 0
    self._batches = iter(dataset)
    self._source = examples.source
    self._bad_share = bad_share

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    indices, bad = batch.pop('index'), batch.pop('bad')
    self._read += len(bad)
    for row in np.flatnonzero(bad):
      self._note(int(indices[row]), int(bad[row]))
    return cast('Batch', batch)

  def _note(self, index: int, bad: int) -> None:
    self.bad_images += bad
    for at in range(index, index + bad):
      number = at % len(self._source)
      name = getattr(self._source, 'name', lambda at: f'number {at}')(number)
      logger.warning('image %s cannot be read; another takes its place', name)
    # Of a set not yet read whole, a share of the whole may be bad.
    if self.bad_images > self._bad_share * max(self._read, len(self._source)):
      raise RunError(
        f'{self.bad_images} of {self._read} images read cannot be decoded, more than the allowed '
        f'share of {self._bad_share:.2%}; mend the data set (the log names them), or allow more '
        'with --config.data.bad_share.'
      )
