"""Pictures of your own, as in folder.py, from weights that someone has trained on ImageNet:

  cbam-jax train --config=finetune:resnet50,cbam --config.init_from=FILE \\
    --config.data.dir=PICTURES --workdir=runs/mine

FILE is a PyTorch checkpoint of the authors, torchvision or timm, or a folder of save_pretrained. If
its network has no attention, that is put in so that nothing changes at first; if it has other
classes, its last layer is left out. docs/finetune.md tells more.
"""

import ml_collections

from cbam_jax.training import default_config
from cbam_jax.training.config import choose_network


def get_config(variant: str = 'resnet50,cbam') -> ml_collections.ConfigDict:
  config = default_config()
  choose_network(config, variant)
  config.epochs = 20.0
  config.batch_size = 64
  config.eval_batch_size = 64
  config.log_every_steps = 20

  config.model.num_classes = None

  config.data.name = 'folder'
  config.data.workers = 2

  config.optimizer.learning_rate = 0.01
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.decay = 'kernels'
  config.label_smoothing = 0.1
  return config
