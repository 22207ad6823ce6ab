"""CBAM, the Convolutional Block Attention Module, for JAX and Flax linen."""

from cbam_jax import explain
from cbam_jax.attention import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation
from cbam_jax.errors import UserError
from cbam_jax.interop import (
  from_pretrained,
  from_torch,
  load_state_dict,
  save_pretrained,
  to_torch,
)
from cbam_jax.models import Summary, create_model, graft, list_models, summary

__version__ = '0.1.0'

__all__ = [
  'BAM',
  'CBAM',
  'ChannelAttention',
  'SpatialAttention',
  'SqueezeExcitation',
  'Summary',
  'UserError',
  'create_model',
  'explain',
  'from_pretrained',
  'from_torch',
  'graft',
  'list_models',
  'load_state_dict',
  'save_pretrained',
  'summary',
  'to_torch',
]
