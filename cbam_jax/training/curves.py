"""The picture of a run: loss, accuracy and learning rate over its epochs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbam_jax.errors import require

# Okabe and Ito's blue and vermilion, told apart by colour-blind readers too.
COLOURS = {'train': '#0072B2', 'test': '#D55E00'}


def draw_curves(entries: Iterable[dict[str, Any]], path: Path, title: str) -> None:
  """Draws what a run has logged.

  Args:
    entries: Lines of `metrics.jsonl`.
    path: The PNG file to write.
    title: What the run is.
  """
  require('matplotlib', 'train')
  from matplotlib.figure import Figure

  entries = list(entries)
  figure = Figure(figsize=(11, 4.2), layout='constrained')
  loss, error = figure.subplots(1, 2)
  for split, colour in COLOURS.items():
    rows = [entry for entry in entries if entry['split'] == split]
    if not rows:
      continue
    epochs = [row['epoch'] for row in rows]
    style = {'color': colour, 'marker': '.' if len(rows) < 60 else None, 'label': split}
    loss.plot(epochs, [row['loss'] for row in rows], **style)
    error.plot(epochs, [100 * (1 - row['top1']) for row in rows], **style)
  error.set_title(_best(entry for entry in entries if entry['split'] == 'test'))
  _show_learning_rate(loss, [entry for entry in entries if entry['split'] == 'train'])
  # The test loss has neither smoothing nor augmentation, so it can be the smaller.
  loss.set(title='Loss (of training: as minimised)', ylabel='cross entropy (nats)', yscale='log')
  error.set(ylabel='error (%)', yscale='symlog', ylim=(0, 100))
  error.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  for axes in (loss, error):
    axes.set_xlabel('epoch')
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  if entries:  # none if a run ends before it has logged anything
    error.legend(frameon=False, loc='upper right')
  figure.suptitle(title)
  figure.savefig(path, dpi=120)


def _best(rows: Iterable[dict[str, Any]]) -> str:
  # The latest of equals, as the best checkpoint is.
  best = max(rows, key=lambda row: (row['top1'], row['step']), default=None)
  if best is None:
    return 'Top-1 error'
  return f'Top-1 error: {100 * (1 - best["top1"]):.2f} % at the best epoch, {best["epoch"]:g}'


def _show_learning_rate(axes: Any, rows: list[dict[str, Any]]) -> None:
  if not rows:
    return
  rate = axes.twinx()
  epochs = [row['epoch'] for row in rows]
  rate.plot(epochs, [row['learning_rate'] for row in rows], color='0.6', linestyle=':')
  rate.set_ylabel('learning rate (dotted)', color='0.4')
  rate.set_ylim(bottom=0)
  rate.spines[['top']].set_visible(False)
