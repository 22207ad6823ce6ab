"""One self-contained page of what networks make of pictures, light or dark as its reader likes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cbam_jax.errors import require
from cbam_jax.explain.pictures import bars, coloured, overlay, stretched
from cbam_jax.explain.views import AttentionMap, ClassMap, View

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #63636a; --page: #fbfbfd; --card: #fff;
  --line: #d9d9de; --mark: #2a6fbb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a0a0a8; --page: #151517; --card: #1f1f22; --line: #3a3a40;
    --mark: #6aa9e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; }
p { margin: .25rem 0; color: var(--soft); max-width: 60rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.25rem; margin: 1.25rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: .3rem; }
figcaption { font-size: .8rem; color: var(--soft); margin-top: .3rem; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
.large { width: 13rem; }
.blocks { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: 1rem; }
.blocks img { image-rendering: pixelated; width: 100%; }
table { border-collapse: collapse; font-size: .9rem; width: 26rem; max-width: 100%; }
td { padding: .15rem .6rem .15rem 0; vertical-align: middle; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 40%; }
td.bar div { height: .7rem; background: var(--mark); border-radius: .15rem; min-width: 1px; }
svg { display: block; width: 100%; height: 3rem; margin-top: .4rem; fill: var(--mark);
  border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); }
details summary { cursor: pointer; margin: 1rem 0 .75rem; }
.scale { display: inline-block; width: 8rem; height: .7rem; border-radius: .15rem;
  vertical-align: middle; }
"""


class Entry(NamedTuple):
  """One picture of a report.

  Attributes:
    title: Its name.
    image: What the networks see of it, uint8 (H, W, C).
    views: What each network makes of it.
  """

  title: str
  image: np.ndarray
  views: Sequence[View]


def write_report(path: Path, entries: Sequence[Entry], *, method: str, stage: str) -> None:
  """Writes the page.

  Args:
    path: The HTML file; it needs no other, and no network.
    entries: The pictures.
    method: What the class maps are, such as 'Grad-CAM'.
    stage: Where they were taken.

  Raises:
    MissingExtraError: If matplotlib or Pillow is not installed.
  """
  gradient = ', '.join(
    '#' + ''.join(f'{level:02x}' for level in colour)
    for colour in coloured(np.linspace(0, 1, 9)[None])[0]
  )
  body = '\n'.join(_article(entry) for entry in entries)
  path.write_text(
    f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the network sees</title>
<style>{STYLE}</style>
<h1>What the network sees</h1>
<p>Class maps: {escape(method)} at {escape(stage)}, each relative to its own largest value,
none <span class="scale" style="background: linear-gradient(to right, {gradient})"></span> most.</p>
<p>Attention: the gates, factors between 0 and 1 that a block multiplies its features by. A map of
positions is stretched from its least to its largest gate, which stand below it; a chart of
channels goes from 0 to 1, and where a bar is for several it reaches from the least to the
largest of them.</p>
{body}
</html>
""",
    encoding='utf-8',
  )


def _article(entry: Entry) -> str:
  parts = [f'<h2>{escape(entry.title)}</h2>', '<div class="row">']
  parts.append(_figure(entry.image, 'what the network sees', 'large'))
  parts += [
    _class_map(view, found, entry.image) for view in entry.views for found in view.class_maps
  ]
  parts += ['</div>', '<div class="row">']
  parts += [_table(view) for view in entry.views]
  parts.append('</div>')
  parts += [_attention(view) for view in entry.views if view.attention]
  return '<article>\n' + '\n'.join(parts) + '\n</article>'


def _class_map(view: View, found: ClassMap, image: np.ndarray) -> str:
  caption = f'<b>{escape(found.name)}</b>{found.percent}<br>{escape(view.network)}'
  return _figure(overlay(image, found.cam), caption, 'large')


def _table(view: View) -> str:
  rows = '\n'.join(
    f'<tr><td>{escape(name)}</td><td class="number">{100 * probability:.1f} %</td>'
    f'<td class="bar"><div style="width: {100 * probability:.1f}%"></div></td></tr>'
    for name, probability in view.top
  )
  return f'<div><h3>{escape(view.network)}</h3><table>{rows}</table></div>'


def _attention(view: View) -> str:
  blocks = '\n'.join(_block(attention) for attention in view.attention)
  return (
    f'<details open><summary>Attention in {escape(view.network)}</summary>'
    f'<div class="blocks">{blocks}</div></details>'
  )


def _block(attention: AttentionMap) -> str:
  parts = []
  caption = [f'<b>{escape(attention.name)}</b>']
  if (spatial := attention.spatial) is not None:
    parts.append(_image(coloured(stretched(spatial)), f'spatial attention of {attention.name}'))
    caption.append(f'positions {spatial.min():.2f}–{spatial.max():.2f}')
  if (channel := attention.channel) is not None:
    parts.append(_chart(channel))
    *_, each = bars(channel)
    caption.append(f'channels {channel.min():.2f}–{channel.max():.2f}')
    caption.append(f'{len(channel)} of them' + (f', {each} a bar' if each > 1 else ''))
  return f'<figure>{"".join(parts)}<figcaption>{"<br>".join(caption)}</figcaption></figure>'


def _chart(channel: np.ndarray) -> str:
  feet, tops, _ = bars(channel)
  drawn = ''.join(
    f'<rect x="{i}" y="{1 - top:.3f}" width="0.85" height="{top - foot:.3f}"/>'
    for i, (foot, top) in enumerate(zip(feet, tops, strict=True))
  )
  return (
    f'<svg viewBox="0 0 {len(feet)} 1" preserveAspectRatio="none" role="img" '
    f'aria-label="gates of the channels">{drawn}</svg>'
  )


def _figure(pixels: np.ndarray, caption: str, kind: str) -> str:
  return f'<figure class="{kind}">{_image(pixels, "")}<figcaption>{caption}</figcaption></figure>'


def _image(pixels: np.ndarray, description: str) -> str:
  picture = require('PIL.Image', 'explain').fromarray(
    pixels[..., 0] if pixels.shape[-1] == 1 else pixels
  )
  buffer = io.BytesIO()
  picture.save(buffer, 'PNG')
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
