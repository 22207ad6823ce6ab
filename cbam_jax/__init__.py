"""CBAM, the Convolutional Block Attention Module, for JAX and Flax linen."""

import importlib
from typing import TYPE_CHECKING, Any

from cbam_jax.attention import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation
from cbam_jax.errors import UserError
from cbam_jax.interop import from_torch, load_state_dict, to_torch
from cbam_jax.layers import compiler_options, in_parts
from cbam_jax.models import Summary, create_model, list_models, summary

if TYPE_CHECKING:
  from cbam_jax import explain
  from cbam_jax.interop.pretrained import from_pretrained, save_pretrained
  from cbam_jax.models.graft import graft

__version__ = '0.1.0'

__all__ = [
  'BAM',
  'CBAM',
  'ChannelAttention',
  'SpatialAttention',
  'SqueezeExcitation',
  'Summary',
  'UserError',
  'compiler_options',
  'create_model',
  'explain',
  'from_pretrained',
  'from_torch',
  'graft',
  'in_parts',
  'list_models',
  'load_state_dict',
  'save_pretrained',
  'summary',
  'to_torch',
]

# Imported when they are first asked for, so that whoever wants the module alone does not wait.
_HOMES = {
  'from_pretrained': 'cbam_jax.interop.pretrained',
  'graft': 'cbam_jax.models.graft',
  'save_pretrained': 'cbam_jax.interop.pretrained',
}


def __getattr__(name: str) -> Any:
  if name == 'explain':
    return importlib.import_module('cbam_jax.explain')
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
