"""The training loop: from a configuration and a folder to a trained network in it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import ml_collections
from rich.console import Console

from cbam_jax.data import Batch, train_batches
from cbam_jax.errors import RunError, UserError
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.distributed import from_first
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.interruption import Interruption
from cbam_jax.training.meter import Meter
from cbam_jax.training.report import Report
from cbam_jax.training.state import TrainState
from cbam_jax.training.workdir import Workdir


def train(
  config: ml_collections.ConfigDict, workdir: str, console: Console | None = None
) -> dict[str, float] | None:
  """Trains what `config` describes in `workdir`, going on where an earlier call stopped.

  Args:
    config: The configuration, made from `default_config()`.
    workdir: The folder for checkpoints, metrics and curves; made if need be.
    console: Where progress is shown; None for standard output.

  Returns:
    The test metrics of the last step: 'loss', 'top1', 'top5' and 'count'; None if SIGTERM ended
    the run before, with a checkpoint to go on from.

  Raises:
    UserError: On a configuration that cannot be run, or a folder of another run.
    KeyboardInterrupt: On Ctrl-C, after a checkpoint.
    RunError: If the run cannot go on: a loss that is not finite, a checkpoint that cannot be
      written or read, too many images that cannot be decoded.
  """
  return _Run(Experiment(config), Workdir(workdir), console or Console()).run()


class _Run:
  """One call of `train`."""

  def __init__(self, experiment: Experiment, folder: Workdir, console: Console):
    self.experiment = experiment
    self.config = experiment.config
    self.folder = folder
    self.console = console
    self.total_steps = experiment.total_steps
    self.steps_per_epoch = experiment.steps_per_epoch
    self.eval_steps = max(1, round(self.config.eval_every_epochs * self.steps_per_epoch))
    # What cannot work fails before anything is written.
    self.abstract_state = experiment.abstract_state
    self.classes = getattr(experiment.test_source, 'classes', None)

  def run(self) -> dict[str, float] | None:
    """Trains from the newest checkpoint to the last step."""
    self.folder.check(self.config)
    if not any(path.name.isdigit() for path in self.folder.checkpoints.glob('*')):
      # Weights that do not fit fail here, too; a run that goes on no longer needs them.
      _ = self.experiment.initial
    try:
      with self.folder.locked(), contextlib.ExitStack() as stack:
        return self._run(stack)
    except OSError as error:
      raise RunError(
        f'{self.folder.root} cannot be written ({error}); its checkpoints are whole. Make room or '
        'restore access, then run the same command again.'
      ) from error

  def _run(self, stack: contextlib.ExitStack) -> dict[str, float] | None:
    config, folder = self.config, self.folder
    self.interruption = stack.enter_context(Interruption())
    self.checkpoints = stack.enter_context(
      Checkpoints(folder.checkpoints, config.checkpoints.keep, self._say)
    )
    found = self.checkpoints.restore_newest(self.abstract_state)
    state, start = found or (self.experiment.new_state(), 0)
    folder.claim(config, self.classes)
    title = f'{config.model.name} + {config.model.attention} on {config.data.name}'
    self.report = stack.enter_context(Report(folder, title, self.total_steps, start, self.console))
    self.report.say(self._introduction(start))
    with jax.transfer_guard('disallow'):
      return self._train(state, start)

  def _train(self, state: TrainState, start: int) -> dict[str, float] | None:
    config, experiment = self.config, self.experiment
    meter = Meter(self.report, config.log_every_steps, self.steps_per_epoch, config.skip_nonfinite)
    result = self.folder.last_test(start)
    # A shared disk may show the processes different files, and all must do the same.
    evaluated = from_first(result is not None)
    if start and self._evaluates_after(start) and not evaluated:
      # The run was interrupted between the step and the end of its evaluation.
      result = self._evaluate(state, start)
      if result is None:
        self._stop(state, start)
        return None
      self.checkpoints.save(state, start, result)
    if start > self.total_steps:
      raise UserError(
        f'{self.folder.root} has taken {start} steps already, more than the {self.total_steps} of '
        f'epochs={self.config.epochs:g}; raise epochs, or choose another --workdir.'
      )
    if start == self.total_steps:
      self.report.say(f'The run is complete: all {start} steps were taken.')
      return result

    saved = time.monotonic()
    for step, batch in enumerate(self._batches(start, meter), start + 1):
      state, metrics = experiment.train_step(state, batch)
      meter.add(step, metrics)
      if self._evaluates_after(step):
        meter.flush()
        result = self._evaluate(state, step)
        if result is None:
          self._stop(state, step)
          return None
        self.checkpoints.save(state, step, result)
        saved = time.monotonic()
        meter.restart()
      elif self._saves_after(step, saved):
        meter.flush()
        self.checkpoints.save(state, step)
        saved = time.monotonic()
        meter.restart()
      elif meter.due():
        meter.flush()
      if self.interruption.requested(step):
        meter.flush()
        self._stop(state, step)
        return None
    return result

  def _batches(self, start: int, meter: Meter) -> Iterator[Batch]:
    batches = train_batches(
      self.experiment.train_source,
      self.experiment.train_transform,
      self.config.batch_size,
      seed=self.config.seed,
      start_step=start,
      stop_step=self.total_steps,
      workers=self.config.data.workers,
      bad_share=self.config.data.bad_share,
    )
    while True:
      asked = time.monotonic()
      batch = next(batches, None)
      if batch is None:
        return
      meter.received(time.monotonic() - asked, batches.bad_images)
      yield batch

  def _evaluates_after(self, step: int) -> bool:
    return step % self.eval_steps == 0 or step == self.total_steps

  def _saves_after(self, step: int, saved: float) -> bool:
    every = self.config.checkpoints.every_steps
    if every is not None:
      return step % every == 0
    # The clocks of several processes differ, and all must save alike: the first one's counts.
    due = time.monotonic() - saved > 60 * self.config.checkpoints.every_minutes
    if jax.process_count() > 1 and step % self.config.log_every_steps:
      return False
    return bool(from_first(due))

  def _evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
    result = self.experiment.evaluate(
      state.variables,
      # Several processes give up between steps only, where they can agree to.
      interrupted=lambda: jax.process_count() == 1 and self.interruption.requested(step),
    )
    if result is not None:
      if not math.isfinite(result['loss']):
        raise RunError(
          f'the test loss at step {step} is {result["loss"]}; lower optimizer.learning_rate or '
          'warm it up (optimizer.warmup_epochs). The newest checkpoint is from before it.'
        )
      self.report.log(step, step / self.steps_per_epoch, 'test', result)
    return result

  def _stop(self, state: TrainState, step: int) -> None:
    if self.checkpoints.latest_step() != step:
      self.checkpoints.save(state, step)
    self.checkpoints.wait()
    self.report.say(
      f'Interrupted: step {step} is saved. Run the same command again to go on from there.'
    )
    if self.interruption.by_keyboard:
      raise KeyboardInterrupt

  def _say(self, text: str) -> None:
    if jax.process_index() == 0:
      self.console.print(text, highlight=False, markup=False, soft_wrap=True)

  def _introduction(self, start: int) -> str:
    devices = jax.devices()
    verb = f'going on from step {start}' if start else 'starting'
    if not start and self.experiment.initial:
      verb = f'starting from {self.experiment.initial.origin}'
    return (
      f'{self.folder.root}: {verb}, {self.total_steps} steps of {self.config.batch_size} '
      f'images on {len(devices)} x {devices[0].device_kind}'
    )
