"""The maps that attention computes, out of any network it stands in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from cbam_jax.attention import BAM, CBAM, ChannelAttention, SpatialAttention, SqueezeExcitation


class _Part(NamedTuple):
  """What computes a map: the method that gives its logits, its name, and how it is laid out."""

  module: type[nn.Module]
  method: str
  name: str
  shaped: Callable[[jax.Array], jax.Array]


def _whole(logits: jax.Array) -> jax.Array:
  return logits


def _of_channels(logits: jax.Array) -> jax.Array:
  return jnp.squeeze(logits, range(1, logits.ndim - 1))


def _of_positions(logits: jax.Array) -> jax.Array:
  return jnp.squeeze(logits, -1)


# CBAM's parts are taken where the plain and the fused implementation meet.
PARTS = (
  _Part(ChannelAttention, 'logits_of', 'channel', _whole),
  _Part(SpatialAttention, 'logits_of', 'spatial', _of_positions),
  _Part(SqueezeExcitation, 'logits', 'channel', _of_channels),
  _Part(BAM, 'logits', 'joint', _whole),
)


def attention_maps(
  model: nn.Module, variables: Any, images: jax.Array
) -> dict[str, dict[str, jax.Array]]:
  """Every attention's maps in eval mode, after the sigmoid.

  Args:
    model: Any linen module called with `(images, train=...)` that has attention of this package, or
      of subclasses, anywhere in it: a network of `create_model`, your own, or the attention alone.
    variables: Its variables.
    images: What it is called with, (N, H, W, C).

  Returns:
    By the path of the attention, such as 'stage1/block1/attention' or 'stage2/stage_attention' (''
    for the attention alone), its maps, all in (0, 1), float32 at the least:
      'channel': (N, C), of CBAM's channel attention or squeeze-and-excitation.
      'spatial': (N, *spatial), of CBAM's spatial attention.
      'joint': (N, *spatial, C), BAM's. Its features are multiplied by 1 + this map.
    They are factors of the features, but for BAM's and for those of CBAM with `order='parallel'`:
    there the factor is the sigmoid of both logits' sum, and each map is the sigmoid of its own.
    Of an attention that is called more than once the maps are those of the last call. A network
    without attention has no maps, and the result is empty.

  Raises:
    UserError: On images of a wrong rank or type.
  """
  owners: dict[tuple[str, ...], tuple[str, _Part]] = {}

  def is_map(module: nn.Module, method: str) -> bool:
    for part in PARTS:
      if isinstance(module, part.module) and method == part.method:
        path = module.path[:-1] if isinstance(module.parent, CBAM) else module.path
        owners[*module.path, method] = '/'.join(path), part
        return True
    return False

  _, captured = model.apply(
    variables, images, train=False, capture_intermediates=is_map, mutable=['intermediates']
  )
  logits = flatten_dict(captured.get('intermediates', {}))
  maps: dict[str, dict[str, jax.Array]] = {}
  for path, (owner, part) in owners.items():
    maps.setdefault(owner, {})[part.name] = nn.sigmoid(part.shaped(logits[path][-1]))
  return maps
