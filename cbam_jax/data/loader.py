"""Batches of examples: a pure function of the seed and the step, read ahead by grain."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
from typing import Self, TypedDict, cast

import jax
import numpy as np

from cbam_jax.data.sources import Source
from cbam_jax.data.transforms import Transform
from cbam_jax.errors import RunError, UserError, require

logger = logging.getLogger(__name__)

# A set so damaged is not worth searching on.
MOST_BAD_IN_A_ROW = 100

# Decoding leaves the interpreter to other threads, the rest of an image's way does not: past some
# threads a process gains nothing.
MOST_THREADS = 8
WORKER_THREADS = 2


class Batch(TypedDict):
  """What a step takes: this process's share of a global batch.

  `image` is uint8 (n, H, W, C), `label` int32 (n,), `mask` bool (n,), False where the example
  only fills up the last batch of an evaluation.
  """

  image: np.ndarray
  label: np.ndarray
  mask: np.ndarray


class _Batches:
  """This process's share of every batch, with random access.

  Whatever the number of processes, a global batch holds the same examples in the same order, and
  each example's randomness comes from (seed, epoch, index) alone.
  """

  def __init__(
    self, source: Source, transform: Transform, batch_size: int, steps: int, seed: int | None
  ):
    self.source = source
    self.size = len(source)
    self.transform = transform
    self.batch_size = batch_size
    self.local_size = batch_size // jax.process_count()
    self.offset = jax.process_index() * self.local_size
    self.steps = steps
    self.seed = seed

  def __len__(self) -> int:
    return self.steps

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    n = self.local_size
    images = np.empty((n, 0, 0, 0), np.uint8)
    batch = {
      'label': np.empty(n, np.int32),
      'mask': np.empty(n, np.bool_),
      'index': np.empty(n, np.int64),
      'bad': np.empty(n, np.int32),
    }
    for row in range(n):
      epoch, index, real = self._choose(step * self.batch_size + self.offset + row)
      image, label, bad = self._next_good(epoch, index)
      if not real:
        bad = 0  # a filler was counted in its own place
      elif self.seed is None and bad:
        real = False  # an evaluation counts no image twice
      if row == 0:
        images = np.empty((n, *image.shape), np.uint8)
      if image.shape != images.shape[1:]:
        raise UserError(
          f'{_name(self.source, index)} is an image of {_sides(image)} in a batch of '
          f'{_sides(images[0])}, and nothing crops them; make them the same, or set '
          'data.augmentation=crop_flip and data.resized_side.'
        )
      images[row] = image
      for key, value in zip(batch, (label, real, index, bad), strict=True):
        batch[key][row] = value
    return {'image': images, **batch}

  def _choose(self, place: int) -> tuple[int, int, bool]:
    """The epoch and the index of an example, and whether it is more than a filler."""
    if self.seed is None:
      return 0, min(place, self.size - 1), place < self.size
    # The examples that do not fill a batch are left out, others in every epoch.
    epoch, place = divmod(place, self.size // self.batch_size * self.batch_size)
    return epoch, int(_permutation(self.seed, epoch, self.size)[place]), True

  def _next_good(self, epoch: int, index: int) -> tuple[np.ndarray, int, int]:
    """The image and label at `index`, or the nearest after it that can be read, and how many not.

    Raises:
      RunError: If a hundred in a row cannot.
    """
    for bad in range(MOST_BAD_IN_A_ROW):
      at = (index + bad) % self.size
      rng = np.random.default_rng((self.seed or 0, epoch, at))
      try:
        record = self.source[at]
        return self.transform(record['image'], rng), record['label'], bad
      except UserError:
        raise
      except Exception as error:  # Pillow raises nearly anything on a damaged file
        reason = error
    raise RunError(
      f'{MOST_BAD_IN_A_ROW} images in a row from {_name(self.source, index)} on cannot be read '
      f'(the last: {reason}); check the data set and the disk it is on.'
    )


def _sides(image: np.ndarray) -> str:
  return 'x'.join(map(str, image.shape))


def _name(source: Source, index: int) -> str:
  """The file of an example where its source knows it, else its number."""
  name: str = getattr(source, 'name', 'number {}'.format)(index)
  return name


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
    transform: What is done to a record's image.
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
  share = _Batches(source, transform, batch_size, stop_step, seed)
  return BatchIterator(share, start_step, workers, bad_share)


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
    transform: What is done to a record's image.
    batch_size: Examples of a global batch, over all processes.
    workers: Processes that decode and transform; 0 for threads of this process.
    bad_share: Share of the images that may be unreadable; past it, iterating raises `RunError`.

  Raises:
    UserError: If the processes do not divide the batch.
  """
  _check_processes(batch_size)
  steps = -(len(source) // -batch_size)
  share = _Batches(source, transform, batch_size, steps, seed=None)
  return BatchIterator(share, 0, workers, bad_share)


def _cores() -> int:
  """How many cores this process may use, which a scheduler may have made few of many."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _check_processes(batch_size: int) -> None:
  if batch_size % jax.process_count():
    raise UserError(
      f'batch_size={batch_size} cannot be split over {jax.process_count()} processes; choose a '
      'multiple of their number.'
    )


def _live_as_the_parent(index: int, count: int) -> None:
  """Ends this worker as soon as its parent is dead; if that was killed, it would wait for ever.

  And not before: a terminal sends Ctrl-C to workers too, whose batches the parent may wait for.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


class BatchIterator:
  """Batches read ahead by grain, and what was wrong with them.

  Attributes:
    bad_images: How many images so far could not be read, and were replaced or left out.
  """

  def __init__(self, share: _Batches, start_step: int, workers: int, bad_share: float):
    grain = require('grain', 'train')
    threads = WORKER_THREADS if workers else min(MOST_THREADS, _cores())
    dataset = (
      grain.MapDataset.source(share)
      .slice(slice(start_step, None))
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2))
    )
    if workers:
      from absl import flags

      # grain's workers read absl's flags, which the command line has no use for.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers)
      dataset = dataset.mp_prefetch(options, worker_init_fn=_live_as_the_parent)
    self.bad_images = 0
    self._read = 0
    self._batches = iter(dataset)
    self._source = share.source
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
      name = _name(self._source, at % len(self._source))
      logger.warning('image %s cannot be read; another takes its place', name)
    # Of a set not yet read whole, a share of the whole may be bad, of which this is one's part.
    part = len(self._source) / jax.process_count()
    if self.bad_images > self._bad_share * max(self._read, part):
      raise RunError(
        f'{self.bad_images} of {self._read} images read cannot be decoded, more than the allowed '
        f'share of {self._bad_share:.2%}; mend the data set (the log names them), or allow more '
        'with --config.data.bad_share.'
      )
