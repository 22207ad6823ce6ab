"""CIFAR-10 from tensorflow-datasets: cifar10:resnet18,cbam names network and attention.

The paper's recipe, stretched over twice its epochs, with the stem for small images, the usual
shifts and flips, and the usual decay and batch size of this data set.
"""

import ml_collections

from cbam_jax.training import default_config
from cbam_jax.training.config import choose_network


def get_config(variant: str = 'resnet18,cbam') -> ml_collections.ConfigDict:
  config = default_config()
  choose_network(config, variant)
  config.epochs = 180.0
  config.batch_size = 128

  config.model.num_classes = 10
  config.model.stem = 'cifar'

  config.data.name = 'tfds:cifar10'
  config.data.image_size = 32
  config.data.resized_side = None
  config.data.augmentation = 'shift_flip'
  config.data.mean = (0.4914, 0.4822, 0.4465)
  config.data.std = (0.2470, 0.2435, 0.2616)

  config.optimizer.step_epochs = 60.0
  config.optimizer.weight_decay = 5e-4
  return config
