"""Mixup and cutmix, on the device and within the jitted step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MIXINGS = ('none', 'mixup', 'cutmix', 'mixup_or_cutmix')


def mix(
  images: jax.Array, targets: jax.Array, key: jax.Array, kind: str, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes each example with its neighbour, by one share for the whole batch.

  Batches are shuffled already, so that a neighbour is as good as any; and it is on the same
  device, where a permutation of the whole batch would send every image through the network.

  Args:
    images: (N, H, W, C), normalised; N even.
    targets: Probabilities of the classes, (N, classes).
    key: Random key.
    kind: 'mixup' (Zhang et al., ICLR 2018) blends images; 'cutmix' (Yun et al., ICCV 2019) pastes
      a box; 'mixup_or_cutmix' tosses a coin.
    alpha: The share is drawn from Beta(alpha, alpha).

  Returns:
    Images and targets, mixed alike.
  """
  coin_key, share_key, box_key = jax.random.split(key, 3)
  share = jax.random.beta(share_key, alpha, alpha)
  mixed = {
    'mixup': lambda: _mixup(images, share),
    'cutmix': lambda: _cutmix(images, share, box_key),
  }
  if kind == 'mixup_or_cutmix':
    new_images, kept = jax.lax.cond(jax.random.bernoulli(coin_key), *mixed.values())
  else:
    new_images, kept = mixed[kind]()
  kept = kept.astype(targets.dtype)
  return new_images, kept * targets + (1 - kept) * _partners(targets)


def _partners(x: jax.Array) -> jax.Array:
  """The second of each pair before the first."""
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _mixup(images: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
  return (share * images + (1 - share) * _partners(images)).astype(images.dtype), share


def _cutmix(images: jax.Array, share: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A box of (1 - share) of the area comes from the partner; the share kept is what is left."""
  _, height, width, _ = images.shape
  side = jnp.sqrt(1 - share)
  y, x = jax.random.uniform(key, (2,))

  def inside(centre: jax.Array, size: int) -> jax.Array:
    low = jnp.clip(jnp.round((centre - side / 2) * size), 0, size)
    high = jnp.clip(jnp.round((centre + side / 2) * size), 0, size)
    at = jnp.arange(size)
    return (at >= low) & (at < high)

  box = inside(y, height)[:, None] & inside(x, width)[None, :]
  kept = 1 - jnp.mean(box.astype(share.dtype))
  return jnp.where(box[None, :, :, None], _partners(images), images), kept
