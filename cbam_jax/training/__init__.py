"""Training and evaluation: one loop, compiled over a mesh of all devices."""

from cbam_jax.errors import require

# Asked for here, so that whichever is missing, and whatever is imported first, the extra is named.
for _module in (
  'grain',
  'matplotlib',
  'ml_collections',
  'optax',
  'orbax.checkpoint',
  'rich',
  'tensorboardX',
):
  require(_module, 'train')
