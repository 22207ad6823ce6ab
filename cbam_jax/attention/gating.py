"""How a map of logits refines features, the same for every attention here."""

from __future__ import annotations

import flax.linen as nn
import jax

from cbam_jax.layers import Dtype


def gate(x: jax.Array, logits: jax.Array, dtype: Dtype | None) -> jax.Array:
  """`x * sigmoid(logits)`, multiplied in the type of the logits, returned in `dtype` (or x's)."""
  return (x.astype(logits.dtype) * nn.sigmoid(logits)).astype(dtype or x.dtype)
