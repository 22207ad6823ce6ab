"""ImageNet: imagenet:resnet50,cbam names network and attention, imagenet:resnet50,cbam,modern the
recipe as well.

`paper`, the default: SGD at 0.1, times 0.1 every 30 of 90 epochs, batch 256, weight decay 1e-4 on
every parameter, and batch norm over 64 examples, as each of the paper's four devices saw.

`modern`: 200 epochs in bfloat16 at batch 1024, the rate scaled with it, warm-up and cosine, label
smoothing, mixup or cutmix, RandAugment, the average of the weights, and no decay of scales and
biases. Each part is common practice; the whole is no row of the paper.
"""

import ml_collections

from cbam_jax.errors import check_choice
from cbam_jax.training import default_config
from cbam_jax.training.config import choose_network


def get_config(variant: str = 'resnet50,cbam') -> ml_collections.ConfigDict:
  names = variant.split(',')
  network, recipe = (names[:2], names[2]) if len(names) == 3 else (names, 'paper')
  check_choice('the recipe', recipe, ('paper', 'modern'))
  config = default_config()  # its defaults are the paper's recipe
  choose_network(config, ','.join(network))
  config.model.group_size = 64
  config.data.workers = 8
  if recipe == 'modern':
    make_modern(config)
  return config


def make_modern(config: ml_collections.ConfigDict) -> None:
  config.dtype = 'bfloat16'
  config.epochs = 200.0
  config.batch_size = 1024
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 5e-5
  config.optimizer.decay = 'kernels'
  config.average_decay = 0.9999
  config.label_smoothing = 0.1
  config.data.mixing = 'mixup_or_cutmix'
  config.data.augmentation = 'crop_flip_randaugment'
