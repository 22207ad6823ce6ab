"""How the arrays of a layer are laid out in PyTorch, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Form(NamedTuple):
  """The two directions of one layout; both take and return arrays of NumPy or of JAX.

  Attributes:
    to_torch: From our array (a kernel's last axes are in, out) to PyTorch's.
    to_ours: Its inverse.
    biases: Whether the layer has a bias in PyTorch, should it have one here.
  """

  to_torch: Callable[[Any], Any]
  to_ours: Callable[[Any], Any]
  biases: bool = True


def _to_torch(kernel: Any) -> Any:
  """(*spatial, in, out) to (out, in, *spatial): a convolution's kernel, or a dense layer's."""
  *spatial, inputs, outputs = range(kernel.ndim)
  return kernel.transpose(outputs, inputs, *spatial)


def _to_ours(weight: Any) -> Any:
  outputs, inputs, *spatial = range(weight.ndim)
  return weight.transpose(*spatial, inputs, outputs)


def _flattened_to_conv(kernel: Any) -> Any:
  return kernel.reshape(7, 7, -1, kernel.shape[-1]).transpose(3, 2, 0, 1)


def _flattened_to_ours(weight: Any) -> Any:
  outputs = weight.shape[0]
  return weight.reshape(outputs, -1, 7, 7).transpose(2, 3, 1, 0).reshape(-1, outputs)


AS_IS = Form(lambda vector: vector, lambda vector: vector)
"""A bias, or a vector of a norm."""

KERNEL = Form(_to_torch, _to_ours)
"""A convolution or a dense layer, as nearly every row has it."""

POINTWISE = Form(
  lambda kernel: _to_torch(kernel)[..., None, None],
  lambda weight: _to_ours(weight.reshape(weight.shape[:2])),
)
"""A dense layer that PyTorch has as a 1x1 convolution over images."""

POINTWISE_UNBIASED = POINTWISE._replace(biases=False)
"""The same without a bias."""

REVERSED = Form(
  lambda kernel: _to_torch(kernel)[:, ::-1],
  lambda weight: _to_ours(weight[:, ::-1]),
)
"""A convolution whose input channels come in the opposite order."""

FLATTENED = Form(
  lambda kernel: _flattened_to_conv(kernel).reshape(kernel.shape[-1], -1),
  _flattened_to_ours,
)
"""A dense layer over 7x7 features, flattened as (H, W, C) here and as (C, H, W) in PyTorch."""

FLATTENED_AS_CONV = Form(_flattened_to_conv, _flattened_to_ours)
"""The same, as a 7x7 convolution in PyTorch."""
