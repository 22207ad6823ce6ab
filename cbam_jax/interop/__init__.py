"""Weights in and out: PyTorch state dicts of the networks that others have published."""

from cbam_jax.interop.state_dict import load_state_dict
from cbam_jax.interop.torch import from_torch, to_torch

__all__ = ['from_torch', 'load_state_dict', 'to_torch']
