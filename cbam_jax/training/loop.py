"""The training loop: from a configuration and a folder to a trained network in it."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import ml_collections
from rich.console import Console

from cbam_jax.data import train_batches
from cbam_jax.errors import UserError
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.experiment import Experiment, means
from cbam_jax.training.report import Report
from cbam_jax.training.step import Metrics
from cbam_jax.training.workdir import Workdir


def train(
  config: ml_collections.ConfigDict, workdir: str, console: Console | None = None
) -> dict[str, float]:
  """Trains what `config` describes in `workdir`, going on where an earlier call stopped.

  Args:
    config: The configuration, made from `default_config()`.
    workdir: The folder for checkpoints, metrics and curves; made if need be.
    console: Where progress is shown; None for standard output.

  Returns:
    The test metrics of the last step: 'loss', 'top1', 'top5' and 'count'.

  Raises:
    UserError: On a configuration that cannot be run, a folder of another run, or a loss that is
      not finite.
  """
  console = console or Console()
  experiment = Experiment(config)
  total_steps, steps_per_epoch = experiment.total_steps, experiment.steps_per_epoch
  # Opens the test set and traces the network: what cannot work fails before anything is written.
  abstract_state = experiment.abstract_state()
  folder = Workdir(workdir)
  folder.claim(config)

  with Checkpoints(folder.checkpoints, config.checkpoints.keep) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      state = checkpoints.restore(start, abstract_state)
    else:
      state = experiment.new_state()

    title = f'{config.model.name} + {config.model.attention} on {config.data.name}'
    with Report(folder, title, total_steps, start, console) as report:
      report.say(_introduction(experiment, folder, start))
      meter = _Meter(report, experiment, start)
      batches = train_batches(
        experiment.train_source,
        experiment.train_transform,
        config.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=total_steps,
        workers=config.data.workers,
      )
      result: dict[str, float] = {}
      eval_steps = max(1, round(config.eval_every_epochs * steps_per_epoch))
      for step, batch in enumerate(batches, start + 1):
        state, metrics = experiment.train_step(state, batch)
        meter.add(step, metrics)
        if step % eval_steps == 0 or step == total_steps:
          meter.flush(step)
          result = experiment.evaluate(state.variables)
          _check_finite(result['loss'], f'the test loss at step {step}')
          report.log(step, step / steps_per_epoch, 'test', result)
          checkpoints.save(state, step, result)
          meter.restart()
      if not result:
        result = experiment.evaluate(state.variables)
        report.say(f'The run is complete: {total_steps} steps were already taken.')
  return result


def _check_finite(loss: float, what: str) -> None:
  if not math.isfinite(loss):
    raise UserError(
      f'{what} is {loss}; lower optimizer.learning_rate or warm it up (optimizer.warmup_epochs), '
      'and see that model.num_classes is above every label. Started again, the run goes on from '
      'its last checkpoint.'
    )


def _introduction(experiment: Experiment, folder: Workdir, start: int) -> str:
  devices = jax.devices()
  verb = f'going on from step {start}' if start else 'starting'
  return (
    f'{folder.root}: {verb}, {experiment.total_steps} steps of {experiment.config.batch_size} '
    f'images on {len(devices)} x {devices[0].device_kind}'
  )


class _Meter:
  """Adds up training metrics on the device and reports them without holding up the next step."""

  def __init__(self, report: Report, experiment: Experiment, step: int):
    self._report = report
    self._experiment = experiment
    self._logged_step = step
    self._sums: Metrics | None = None
    self._started = time.monotonic()

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes in one step's metrics; every so often, reports those of the steps before it.

    The step just dispatched is left to run: only sums that are finished already are fetched.
    """
    if step - 1 - self._logged_step >= self._experiment.config.log_every_steps:
      self.flush(step - 1)
    self._sums = metrics if self._sums is None else jax.tree.map(jax.numpy.add, self._sums, metrics)

  def flush(self, step: int) -> None:
    """Reports what has been added up to `step`."""
    if self._sums is None:
      return
    values = means(jax.device_get(self._sums))
    _check_finite(values['loss'], f'the loss in steps {self._logged_step + 1} to {step}')
    seconds = time.monotonic() - self._started
    speed = values.pop('count') / seconds
    epoch = step / self._experiment.steps_per_epoch
    entry: dict[str, Any] = values | {
      'learning_rate': float(self._experiment.schedule(step - 1)),
      'images_per_second': round(speed, 1),
    }
    self._report.log(step, epoch, 'train', entry)
    self._report.advance(step, epoch, values['loss'], values['top1'], speed)
    self._logged_step = step
    self.restart()

  def restart(self) -> None:
    """Starts the clock and the sums anew, so that an evaluation's time does not count."""
    self._sums = None
    self._started = time.monotonic()
