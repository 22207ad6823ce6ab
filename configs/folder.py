"""Pictures of your own, one folder a class: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg.

  cbam-jax train --config=folder --config.data.dir=DIR --workdir=runs/mine

folder:resnet50,cbam names network and attention. There are as many classes as there are folders;
--config.model.num_classes=12 leaves room for more, and refuses a folder that has more.
"""

import ml_collections

from cbam_jax.training import default_config
from cbam_jax.training.config import choose_network


def get_config(variant: str = 'resnet18,cbam') -> ml_collections.ConfigDict:
  config = default_config()
  choose_network(config, variant)
  config.batch_size = 64
  config.eval_batch_size = 64
  config.log_every_steps = 20

  config.model.num_classes = None

  config.data.name = 'folder'
  config.data.workers = 2

  config.optimizer.learning_rate = 0.05
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.decay = 'kernels'
  config.label_smoothing = 0.1
  return config
