"""The panel of a picture as a PNG: the image, its class maps and the attention in every block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbam_jax.errors import require
from cbam_jax.explain.pictures import COLOURS, bars, overlay, stretched
from cbam_jax.explain.views import AttentionMap, View

COLUMNS = 8
"""Blocks in a row."""


def draw_panel(path: Path, title: str, image: np.ndarray, views: Sequence[View]) -> None:
  """Writes the panel of one picture.

  Args:
    path: The PNG.
    title: The picture's name.
    image: What the networks see of it, uint8 (H, W, C).
    views: What each network makes of it.

  Raises:
    MissingExtraError: If matplotlib is not installed.
  """
  require('matplotlib', 'explain')
  from matplotlib.figure import Figure

  heights = [h for view in views for h in (2.6, *[2.2] * _rows(view))]
  figure = Figure(figsize=(13, 0.9 + sum(heights)), layout='constrained')
  figure.suptitle(title, x=0.01, ha='left', fontweight='bold', parse_math=False)
  figure.supxlabel(
    'Colours from purple (least) to yellow (most): class maps relative to their maximum, '
    'attention from the least gate to the largest.',
    fontsize='x-small',
  )
  parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
  for view in views:
    _draw_classes(next(parts), image, view)
    for start in range(0, len(view.attention), COLUMNS):
      _draw_attention(next(parts), view.attention[start : start + COLUMNS])
  figure.savefig(path, dpi=110)


def _rows(view: View) -> int:
  return -(len(view.attention) // -COLUMNS)


def _draw_classes(part: Any, image: np.ndarray, view: View) -> None:
  """The image, where the network sees classes in it, and how probable it finds them."""
  part.suptitle(view.network, x=0.01, ha='left', fontsize='medium', parse_math=False)
  # As wide as three maps, so that what there is of them has the same place in every panel.
  axes = part.subplots(1, 4, width_ratios=[1, 1, 1, 2])
  for axis in axes[:3]:
    axis.axis('off')
  axes[0].imshow(image, cmap='gray', vmin=0, vmax=255)
  axes[0].set_title('what the network sees', fontsize='small')
  for axis, found in zip(axes[1:3], view.class_maps, strict=False):
    axis.imshow(overlay(image, found.cam))
    axis.set_title(f'{_short(found.name)}{found.percent}', fontsize='small', parse_math=False)
  names = [_short(name) for name, _ in view.top]
  places = np.arange(len(names))
  drawn = axes[3].barh(places, [100 * p for _, p in view.top], color='tab:blue')
  axes[3].bar_label(drawn, fmt='%.1f', padding=3, fontsize='small')
  axes[3].set_yticks(places, names, fontsize='small', parse_math=False)
  axes[3].invert_yaxis()
  axes[3].set_xlim(0, 112)
  axes[3].set_xlabel('probability, %', fontsize='small')
  axes[3].spines[['top', 'right']].set_visible(False)


def _draw_attention(part: Any, row: Sequence[AttentionMap]) -> None:
  """The gates of some blocks, positions above and channels below."""
  axes = part.subplots(2, COLUMNS, height_ratios=[2, 1], squeeze=False)
  for axis in axes.flat[:]:
    axis.axis('off')
  for (above, below), attention in zip(axes.T, row, strict=False):
    spatial, channel = attention.spatial, attention.channel
    above.set_title(attention.name, fontsize='small', parse_math=False)
    if spatial is not None:
      above.imshow(stretched(spatial), cmap=COLOURS, interpolation='nearest')
      above.text(
        0.5, -0.02, _range('gates', spatial), transform=above.transAxes, ha='center', va='top',
        fontsize='x-small',
      )  # fmt: skip
    if channel is not None:
      feet, tops, each = bars(channel)
      below.axis('on')
      below.bar(np.arange(len(feet)), tops - feet, 0.85, feet, color='tab:blue')
      below.set_ylim(0, 1)
      below.set_xticks([])
      below.set_yticks([0, 1])
      below.tick_params(labelsize='x-small')
      counted = f'{len(channel)} channels' + (f', {each} a bar' if each > 1 else '')
      below.set_xlabel(f'{counted}\n{_range("gates", channel)}', fontsize='x-small')
      below.spines[['top', 'right']].set_visible(False)


def _range(what: str, values: np.ndarray) -> str:
  return f'{what} {values.min():.2f} to {values.max():.2f}'


def _short(name: str) -> str:
  return name if len(name) <= 24 else f'{name[:23]}…'
