"""What a person sees of a run: the progress bar, metrics.jsonl, TensorBoard, curves."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from cbam_jax.training.curves import draw_curves
from cbam_jax.training.workdir import Workdir

# A long run redraws its curves now and then; a short one at its end only.
SECONDS_BETWEEN_CURVES = 60


class Report:
  """Shows and records the progress of a run, on the first process only.

  Attributes:
    workdir: The run's folder.
    title: What the run is, above its curves.
  """

  def __init__(
    self, workdir: Workdir, title: str, total_steps: int, start_step: int, console: Console
  ):
    self.workdir = workdir
    self.title = title
    self._console = console
    self._active = jax.process_index() == 0
    self._drawn = time.monotonic()
    self._progress = Progress(
      TextColumn('epoch {task.fields[epoch]:.1f}'),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn('{task.fields[metrics]}'),
      TimeRemainingColumn(),
      console=console,
      disable=not (self._active and console.is_terminal),
    )
    self._task = self._progress.add_task(
      'training', total=total_steps, completed=start_step, epoch=0.0, metrics=''
    )
    if self._active:
      workdir.forget_after(start_step)
      self._metrics_file = workdir.metrics_file.open('a')
      self._tensorboard = SummaryWriter(str(workdir.root), purge_step=start_step + 1)

  def __enter__(self) -> Self:
    self._progress.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._progress.stop()
    if self._active:
      self._metrics_file.close()
      self._tensorboard.close()
      self._draw()

  def advance(self, step: int, epoch: float, entry: dict[str, Any]) -> None:
    """Moves the progress bar to `step`, with what was logged there."""
    text = (
      f'loss {entry["loss"]:.3f}  top-1 {100 * entry["top1"]:.1f} %  '
      f'{entry["images_per_second"]:,.0f} images/s  input wait {entry["input_wait"]:.0f} %'
    )
    self._progress.update(self._task, completed=step, epoch=epoch, metrics=text)

  def log(self, step: int, epoch: float, split: str, metrics: dict[str, Any]) -> None:
    """Records metrics of a split at a step, as a line of metrics.jsonl and in TensorBoard."""
    if not self._active:
      return
    entry = {'step': step, 'epoch': round(epoch, 4), 'split': split, **metrics}
    self._metrics_file.write(json.dumps(entry) + '\n')
    self._metrics_file.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(f'{split}/{name}', value, step)
    if split == 'test':
      self.say(
        f'epoch {epoch:6.2f}  step {step:6}  test loss {metrics["loss"]:.4f}  '
        f'top-1 {100 * metrics["top1"]:6.2f} %  top-5 {100 * metrics["top5"]:6.2f} %'
      )
      if time.monotonic() - self._drawn > SECONDS_BETWEEN_CURVES:
        self._draw()

  def say(self, text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if self._active:
      # As it is: a log file is not wrapped at a screen's width, and a path may hold brackets.
      self._console.print(text, highlight=False, markup=False, soft_wrap=True)

  def _draw(self) -> None:
    self._drawn = time.monotonic()
    try:
      draw_curves(self.workdir.metrics(), self.workdir.curves_file, self.title)
    except OSError as error:  # a picture is no reason to stop, or to hide the reason for a stop
      self.say(f'{self.workdir.curves_file} could not be drawn: {error}')
