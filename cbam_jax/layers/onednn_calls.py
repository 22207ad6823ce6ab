"""The custom calls by which XLA's CPU backend calls oneDNN, of two arrays each, float32.

Their form is XLA's own, and no compiler checks it: see `cbam_jax.layers.onednn` for when they may
be used. Each is linear in either operand, and knows which of its transposes are calls as well.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax import lax

TARGET = '__onednn$'


@dataclasses.dataclass(frozen=True)
class Convolution:
  """Of (N, H, W, C) and (K, L, C / groups, F), odd sides, padded by half of them times dilation.

  Attributes:
    strides: Step on both spatial axes.
    dilation: Distance between the taps of the kernel.
    groups: Groups of channels convolved apart.
    flipped: Whether it is what goes back through the convolution at stride 1, (N, H, W, F) to
      (N, H, W, C).
  """

  strides: int
  dilation: int
  groups: int
  flipped: bool = False

  rank: ClassVar[int] = 4

  def shape(self, x: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    """The result's, for operands of these shapes."""
    features = self.groups * kernel[2] if self.flipped else kernel[3]
    return x[0], *(math.ceil(size / self.strides) for size in x[1:3]), features

  def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """XLA's call."""
    shape = self.shape(x.shape, kernel.shape)
    if self.flipped:
      # In each group, the channels that come in and the features change places.
      *sides, c, features = kernel.shape
      kernel = lax.rev(kernel, (0, 1)).reshape(*sides, c, self.groups, features // self.groups)
      kernel = kernel.swapaxes(2, 4).reshape(*sides, features // self.groups, self.groups * c)
    padding = [self.dilation * (side // 2) for side in kernel.shape[:2]]
    data = {'batch_dim': 0, 'spatial_dims': [1, 2], 'feature_dim': 3}
    filters = {'spatial_dims': [0, 1], 'input_feature_dim': 2, 'output_feature_dim': 3}
    told = {
      'dims': 4,
      'feature_groups': self.groups,
      'input': {'dims': 4, 'data': data},
      'kernel': {'dims': 4, 'filter': filters},
      'output': {'dims': 4, 'data': data},
      'window': {
        'strides': [self.strides] * 2,
        'pad_left': padding,
        'pad_right': padding,
        'window_dilations': [self.dilation] * 2,
      },
    }
    return _call('convolution', {'onednn_conv_config': told}, shape, x, kernel)

  @property
  def keeps_rows(self) -> bool:
    """Whether rows (the first axis) of the first operand give those of the result, however many."""
    return True

  def back_to_first(self) -> Convolution | None:
    """The call from the result's cotangent and the second operand to the first's; None for none."""
    return dataclasses.replace(self, flipped=not self.flipped) if self.strides == 1 else None

  def back_to_second(self) -> None:
    """The call from the first operand and the result's cotangent to the second's: there is none."""
    return None


@dataclasses.dataclass(frozen=True)
class Product:
  """The product of two matrices, (A, B) and (B, C) to (A, C).

  Attributes:
    transpose_first: Whether the first operand comes as (B, A).
    transpose_second: Whether the second operand comes as (C, B).
  """

  transpose_first: bool = False
  transpose_second: bool = False

  rank: ClassVar[int] = 2

  def shape(self, first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The result's, for operands of these shapes."""
    return first[int(self.transpose_first)], second[int(not self.transpose_second)]

  def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
    """XLA's call."""
    told = {'transpose_a': self.transpose_first, 'transpose_b': self.transpose_second}
    shape = self.shape(first.shape, second.shape)
    return _call('matmul', {'onednn_matmul_config': told}, shape, first, second)

  @property
  def keeps_rows(self) -> bool:
    """Whether rows (the first axis) of the first operand give those of the result, however many."""
    return not self.transpose_first

  def back_to_first(self) -> Product | None:
    """The call from the result's cotangent and the second operand to the first's; None for none."""
    return None if self.transpose_first else Product(False, not self.transpose_second)

  def back_to_second(self) -> Product | None:
    """The call from the first operand and the result's cotangent to the second's; None for none."""
    return None if self.transpose_second else Product(not self.transpose_first, False)


def _call(
  name: str, told: dict[str, Any], shape: tuple[int, ...], *operands: jax.Array
) -> jax.Array:
  called = jax.ffi.ffi_call(
    TARGET + name,
    jax.ShapeDtypeStruct(shape, operands[0].dtype),
    custom_call_api_version=2,
    legacy_backend_config=json.dumps(told),
  )
  return called(*operands)
