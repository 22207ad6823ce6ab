"""Training metrics, added up on the device and fetched a step late."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from cbam_jax.errors import RunError
from cbam_jax.training.report import Report
from cbam_jax.training.step import SUMMED, Metrics, means


class Meter:
  """Follows a run's steps and reports them, without ever holding up the device.

  While a step runs, the host fetches what the step before it gave, which is there already.

  Attributes:
    log_every: Steps between two reports.
    steps_per_epoch: Steps of an epoch.
    skip_nonfinite: How many steps in a row may lack a finite loss and gradient.
  """

  def __init__(self, report: Report, log_every: int, steps_per_epoch: int, skip_nonfinite: int):
    self.log_every = log_every
    self.steps_per_epoch = steps_per_epoch
    self.skip_nonfinite = skip_nonfinite
    self._report = report
    self._pending: tuple[int, Metrics] | None = None
    self._bad_images = 0
    self.restart()

  def restart(self) -> None:
    """Starts the clock and the sums anew, so that an evaluation's time does not count."""
    self._sums: Metrics | None = None
    self._steps = 0
    self._waited = 0.0
    self._started = time.monotonic()

  def received(self, seconds: float, bad_images: int) -> None:
    """Notes how long a batch was waited for, and how many images could not be read so far."""
    self._waited += seconds
    self._bad_images = bad_images

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes in the metrics of a step that has been dispatched, and looks at the one before.

    Raises:
      RunError: If too many steps in a row up to the one before had no finite loss or gradient.
    """
    self._settle()
    self._pending = step, metrics
    summed = {name: metrics[name] for name in SUMMED}
    self._sums = summed if self._sums is None else jax.tree.map(jnp.add, self._sums, summed)
    self._steps += 1

  def due(self) -> bool:
    """Whether it is time for a report."""
    return self._steps >= self.log_every

  def flush(self) -> None:
    """Waits for the last step, and reports all since the last report.

    Raises:
      RunError: If too many steps in a row had no finite loss or gradient.
    """
    if self._pending is None or self._sums is None:
      return
    step, metrics = self._pending
    learning_rate = float(jax.device_get(metrics['learning_rate']))
    self._settle()
    seconds = time.monotonic() - self._started
    values: dict[str, Any] = means(jax.device_get(self._sums))
    speed = values.pop('count') / seconds
    entry = values | {
      'learning_rate': learning_rate,
      'images_per_second': round(speed, 1),
      'input_wait': round(100 * self._waited / seconds, 2),
      'bad_images': self._bad_images,
    }
    epoch = step / self.steps_per_epoch
    self._report.log(step, epoch, 'train', entry)
    self._report.advance(step, epoch, entry)
    self.restart()

  def _settle(self) -> None:
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    bad = int(jax.device_get(metrics['bad_steps']))
    if bad > self.skip_nonfinite:
      raise RunError(
        f'the loss or the gradient is not finite at step {step}'
        f'{f", nor in the {bad - 1} steps before it" if bad > 1 else ""}; the newest checkpoint is '
        'from before it. Lower the learning rate, clip the gradient (optimizer.clip_norm), or pass '
        f'over such steps (skip_nonfinite, now {self.skip_nonfinite}).'
      )
    if bad:
      self._report.say(f'step {step} had no finite loss or gradient and was passed over')
