"""The handwritten digits that scikit-learn ships: a small CBAM ResNet-18, about a minute."""

import ml_collections

from cbam_jax.training import default_config


def get_config() -> ml_collections.ConfigDict:
  config = default_config()
  config.epochs = 40.0
  config.batch_size = 64
  config.eval_batch_size = 360
  config.eval_every_epochs = 2.0
  config.log_every_steps = 22

  config.model.name = 'resnet18'
  config.model.num_classes = 10
  config.model.stem = 'cifar'
  config.model.fields = {'width': 0.25}

  config.data.name = 'digits'
  config.data.image_size = 8
  config.data.resized_side = None
  config.data.augmentation = 'shift'
  config.data.mean = (0.3,)
  config.data.std = (0.37,)

  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 2.0
  config.optimizer.weight_decay = 5e-4
  config.label_smoothing = 0.1
  return config
