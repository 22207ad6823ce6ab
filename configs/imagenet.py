"""ImageNet with the paper's recipe; configs/imagenet.py:resnet50,cbam names network and attention.

SGD at 0.1, times 0.1 every 30 of 90 epochs, batch 256, weight decay 1e-4 on every parameter, and
batch norm over 64 examples, as each of the paper's four devices saw.
"""

import ml_collections

from cbam_jax.errors import UserError
from cbam_jax.training import default_config


def get_config(variant: str = 'resnet50,cbam') -> ml_collections.ConfigDict:
  network, comma, attention = variant.partition(',')
  if not comma:
    raise UserError(
      f"the variant is {variant!r}; write 'network,attention', such as 'resnet50,cbam'."
    )
  config = default_config()  # its defaults are the paper's recipe
  config.model.name = network
  config.model.attention = attention
  config.model.group_size = 64
  config.data.workers = 8
  return config
