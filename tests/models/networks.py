"""The networks at sizes that a test can afford, and the sizes that still test something."""

import jax.numpy as jnp

from cbam_jax import create_model, list_models

ATTENTIONS = ('none', 'se', 'bam', 'cbam')
ALL = [(name, attention) for name in list_models() for attention in ATTENTIONS]

# Maps of 28, 14, 7 and 4 in the ResNets' stages and the like in the others': over a single
# position a maximum has no choice, and at even sides XLA may not show what it does to one.
IMAGE_SIDES = {'mobilenet_v1': 56, 'vgg16': 40}


def make(name, attention='none', *, dtype=jnp.float32, param_dtype=jnp.float32, **fields):
  fields = {'num_classes': 5, **fields}
  return create_model(name, attention=attention, dtype=dtype, param_dtype=param_dtype, **fields)


def image_shape(name):
  # Three images: two values have a variance whose derivative is zero but for epsilon, and BAM
  # normalises one value of each.
  side = IMAGE_SIDES.get(name, 112)
  return (3, side, side, 3)
