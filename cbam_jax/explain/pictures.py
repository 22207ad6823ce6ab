"""Maps as pictures: in colours that all can tell apart, alone and over the image."""

from __future__ import annotations

import numpy as np

from cbam_jax.errors import require
from cbam_jax.explain.score import upsample

# Even in lightness, and the same to the colour-blind; nothing hides behind a rainbow's edges.
COLOURS = 'viridis'

BARS = 64
"""Bars of a chart of channels at the most."""


def coloured(values: np.ndarray) -> np.ndarray:
  """Values from 0 to 1, (h, w), as uint8 (h, w, 3)."""
  colormap = require('matplotlib', 'explain').colormaps[COLOURS]
  return np.round(255 * colormap(np.clip(values, 0, 1))[..., :3]).astype(np.uint8)


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
  """A class map over its image: grey where it is not, in colours where it is.

  Args:
    image: uint8 (H, W, 1 or 3).
    cam: (h, w), not negative; shown relative to its maximum.

  Returns:
    uint8 (H, W, 3).
  """
  height, width, _ = image.shape
  strength = upsample(cam / (cam.max() or 1), (height, width))[..., None]
  grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
  share = 0.15 + 0.6 * strength  # of the colours
  return np.round((1 - share) * grey + share * coloured(strength[..., 0])).astype(np.uint8)


def stretched(values: np.ndarray) -> np.ndarray:
  """Values spread over 0 to 1, from their least to their largest."""
  least, largest = float(values.min()), float(values.max())
  return (values - least) / ((largest - least) or 1)


def bars(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
  """At most `BARS` bars for the gates of channels: their feet, their tops, and the channels in one.

  A channel's bar stands on 0. Where there are more channels than bars, one is for neighbours, and
  reaches from the least of them to the largest; the last may have fewer than the others.
  """
  each = -(len(channel) // -BARS)
  parts = [channel[start : start + each] for start in range(0, len(channel), each)]
  feet = np.array([part.min() if each > 1 else 0 for part in parts])
  return feet, np.array([part.max() for part in parts]), each
