"""Weights in and out: PyTorch state dicts, folders of networks, and artifacts that run alone."""

from cbam_jax.interop.state_dict import load_state_dict
from cbam_jax.interop.torch import from_torch, to_torch

__all__ = ['from_torch', 'load_state_dict', 'to_torch']
