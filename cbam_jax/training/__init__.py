"""Training and evaluation: one loop, compiled over a mesh of all devices.

`train(config, workdir)`, `evaluate(workdir)` and `default_config()` are the way in. They need the
extra `train`; the step itself (`state`, `step`, `optimizer`) needs optax alone.
"""

from __future__ import annotations

import importlib
from typing import Any

from cbam_jax.errors import require

require('optax', 'train')

_HOMES = {
  'train': 'loop',
  'evaluate': 'evaluation',
  'evaluate_network': 'evaluation',
  'load_run': 'evaluation',
  'default_config': 'config',
}

_EXTRA = ('grain', 'matplotlib', 'ml_collections', 'orbax.checkpoint', 'rich', 'tensorboardX')


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  for module in _EXTRA:
    require(module, 'train')
  return getattr(importlib.import_module(f'cbam_jax.training.{_HOMES[name]}'), name)
