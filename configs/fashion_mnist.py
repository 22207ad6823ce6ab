"""Fashion-MNIST from tensorflow-datasets, 28x28 in grey: fashion_mnist:resnet18,cbam names network
and attention."""

import ml_collections

from cbam_jax.training import default_config
from cbam_jax.training.config import choose_network


def get_config(variant: str = 'resnet18,cbam') -> ml_collections.ConfigDict:
  config = default_config()
  choose_network(config, variant)
  config.epochs = 60.0
  config.batch_size = 128

  config.model.num_classes = 10
  config.model.stem = 'cifar'

  config.data.name = 'tfds:fashion_mnist'
  config.data.image_size = 28
  config.data.resized_side = None
  config.data.augmentation = 'shift_flip'
  config.data.mean = (0.2860,) * 3  # the files are grey, and read as RGB
  config.data.std = (0.3530,) * 3

  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 2.0
  config.optimizer.weight_decay = 5e-4
  return config
