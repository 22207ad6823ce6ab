"""Which floating point type each quantity is computed in."""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from jax.typing import DTypeLike

Dtype: TypeAlias = DTypeLike


def at_least_float32(dtype: Dtype) -> jnp.dtype:
  """The type that sums, statistics, gates and logits keep beside features of `dtype`.

  float32 for bfloat16, float16 and float32; float64 for float64.
  """
  return jnp.promote_types(dtype, jnp.float32)
