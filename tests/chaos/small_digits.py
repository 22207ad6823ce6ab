"""configs/digits.py by a network so small, with so many saves, that faults are quick to meet."""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
  config = digits.get_config()
  config.epochs = 1.0
  config.log_every_steps = 3
  config.checkpoints.every_steps = 2
  config.model.fields = {'width': 0.25, 'stage_sizes': (1, 1)}
  return config
