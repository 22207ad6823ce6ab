"""Weights in and out: PyTorch state dicts, and folders that hold a whole network."""

from cbam_jax.interop.pretrained import Pretrained, from_pretrained, save_pretrained
from cbam_jax.interop.state_dict import load_state_dict
from cbam_jax.interop.torch import from_torch, to_torch

__all__ = [
  'Pretrained',
  'from_pretrained',
  'from_torch',
  'load_state_dict',
  'save_pretrained',
  'to_torch',
]
