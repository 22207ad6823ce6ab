"""What a run is made of: every key with its default, and the checks before any work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from cbam_jax.data.transforms import AUGMENTATIONS
from cbam_jax.errors import UserError, check_choice
from cbam_jax.models import create_model
from cbam_jax.models.base import Classifier
from cbam_jax.models.registry import named_attention
from cbam_jax.training.mixing import MIXINGS
from cbam_jax.training.optimizer import DECAYS, SCHEDULES

DTYPES = ('float32', 'bfloat16')

# Fields of the network that are not given among `model.fields`, and the key of each.
OWN_KEYS = {'dtype': 'dtype'} | {
  field: f'model.{field}'
  for field in ('name', 'attention', 'num_classes', 'stem', 'group_size', 'remat')
}

# Key, what is allowed, and the check of it.
RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
  ('seed', 'from 0 to under 2**32', lambda v: 0 <= v < 2**32),
  ('epochs', 'above 0', lambda v: 0 < v < math.inf),
  ('batch_size', '1 or more', lambda v: v >= 1),
  ('eval_batch_size', '1 or more', lambda v: v >= 1),
  ('eval_every_epochs', 'above 0', lambda v: 0 < v < math.inf),
  ('log_every_steps', '1 or more', lambda v: v >= 1),
  ('label_smoothing', 'from 0 to under 1', lambda v: 0 <= v < 1),
  ('data.image_size', '1 or more', lambda v: v >= 1),
  ('data.workers', '0 or more', lambda v: v >= 0),
  ('optimizer.learning_rate', 'finite and above 0', lambda v: 0 < v < math.inf),
  ('optimizer.momentum', 'from 0 to under 1', lambda v: 0 <= v < 1),
  ('optimizer.weight_decay', 'finite and 0 or more', lambda v: 0 <= v < math.inf),
  ('optimizer.step_epochs', 'above 0', lambda v: 0 < v < math.inf),
  ('optimizer.warmup_epochs', 'finite and 0 or more', lambda v: 0 <= v < math.inf),
  ('checkpoints.keep', '1 or more', lambda v: v >= 1),
  ('checkpoints.every_minutes', 'above 0', lambda v: v > 0),
  ('checkpoints.every_steps', '1 or more, or None', lambda v: v is None or v >= 1),
  ('accumulate', '1 or more', lambda v: v >= 1),
  ('skip_nonfinite', '0 or more', lambda v: v >= 0),
  ('data.mixing_alpha', 'finite and above 0', lambda v: 0 < v < math.inf),
  ('data.bad_share', 'from 0 to 1', lambda v: 0 <= v <= 1),
  ('optimizer.clip_norm', 'above 0, or None', lambda v: v is None or v > 0),
  ('average_decay', 'between 0 and 1, or None', lambda v: v is None or 0 < v < 1),
  ('mesh.fsdp', '1 or more', lambda v: v >= 1),
)


def default_config() -> ml_collections.ConfigDict:
  """Every key of a run's configuration, with the paper's recipe as defaults.

  A file of `configs/` starts from this and changes what its experiment needs; a key that is not
  here cannot be set.
  """
  config = ml_collections.ConfigDict(
    {
      'seed': 0,
      'epochs': 90.0,
      'batch_size': 256,  # over all devices
      'eval_batch_size': 256,
      'eval_every_epochs': 1.0,
      'log_every_steps': 100,
      'dtype': 'float32',  # or bfloat16: the type of features, not of parameters
      'accumulate': 1,  # parts that a batch is taken in, to save memory
      'skip_nonfinite': 0,  # steps in a row without a finite loss and gradient that are passed over
      'model': {
        'name': 'resnet50',
        'attention': 'cbam',
        'attention_fields': {},  # fields of the attention, such as {'order': 'parallel'}
        'num_classes': 1000,
        'stem': 'imagenet',
        'group_size': ml_collections.config_dict.placeholder(int),  # None: the global batch
        'remat': False,  # compute each block again in the backward pass, to save memory
        'fields': {},  # further fields of the network, such as {'width': 0.7}
      },
      'data': {
        'name': 'tfds:imagenet2012',
        'dir': ml_collections.config_dict.placeholder(str),
        'image_size': 224,
        'resized_side': 256,  # of test images, before the central crop; None: left alone
        'augmentation': 'crop_flip',
        'mixing': 'none',  # or mixup, cutmix, mixup_or_cutmix
        'mixing_alpha': 0.2,
        'mean': (0.485, 0.456, 0.406),  # of pixels in [0, 1]
        'std': (0.229, 0.224, 0.225),
        'workers': 0,  # processes that decode; 0: threads of this one
        'bad_share': 0.001,  # of the images read, which may be unreadable before the run stops
      },
      'optimizer': {
        'learning_rate': 0.1,
        'momentum': 0.9,
        'nesterov': False,
        'weight_decay': 1e-4,  # coupled
        'decay': 'all',  # or kernels: leaves scales and biases alone
        'clip_norm': ml_collections.config_dict.placeholder(float),  # of the gradient; None: not
        'schedule': 'step',  # or cosine
        'step_epochs': 30.0,  # step: times 0.1 every so many epochs
        'warmup_epochs': 0.0,
      },
      'average_decay': ml_collections.config_dict.placeholder(float),  # of the weights; None: not
      'mesh': {'fsdp': 1},  # devices that share one copy of the state
      'label_smoothing': 0.0,
      'checkpoints': {
        'keep': 2,  # the latest ones; the best is kept beside them
        'every_minutes': 10.0,  # beside one after each evaluation
        'every_steps': ml_collections.config_dict.placeholder(int),
      },
    }
  )
  return config.lock()


def build_model(config: ml_collections.ConfigDict) -> Classifier:
  """The network that `config.model` describes, computing in `config.dtype`.

  Raises:
    UserError: On an unknown network, attention or field.
  """
  model = config.model
  attention = named_attention(model.attention, **model.attention_fields)
  return create_model(
    model.name,
    attention=attention or 'none',
    num_classes=model.num_classes,
    stem=model.stem,
    group_size=model.group_size,
    remat=model.remat,
    dtype=config.dtype,
    **dict(model.fields),
  )


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises `UserError` on a value that would fail only once a run is under way."""
  check_choice('dtype', config.dtype, DTYPES)
  check_choice('optimizer.schedule', config.optimizer.schedule, SCHEDULES)
  check_choice('data.augmentation', config.data.augmentation, AUGMENTATIONS)
  check_choice('data.mixing', config.data.mixing, MIXINGS)
  check_choice('optimizer.decay', config.optimizer.decay, DECAYS)
  for key, allowed, valid in RANGES:
    value = functools.reduce(lambda node, name: node[name], key.split('.'), config)
    if not valid(value):
      raise UserError(f'{key} is {value!r}; it must be {allowed}.')
  size, resized = config.data.image_size, config.data.resized_side
  if resized is not None and resized < size:
    raise UserError(
      f'data.resized_side is {resized} but data.image_size is {size}; the crop cannot be larger '
      'than the image it is cut from.'
    )
  if len(config.data.mean) != len(config.data.std) or 0 in config.data.std:
    raise UserError(
      f'data.mean is {config.data.mean} and data.std {config.data.std}; give one number a channel '
      'in each, none of std zero.'
    )
  _check_division(config)
  for field in config.model.fields:
    if field in OWN_KEYS:
      raise UserError(
        f'model.fields has {field!r}, which has a key of its own; set {OWN_KEYS[field]} instead.'
      )
  build_model(config)


def _check_division(config: ml_collections.ConfigDict) -> None:
  """What must divide what: devices, parts and groups the batch."""
  devices, parts = jax.device_count(), config.accumulate
  for key, parts_of_it in (('batch_size', parts), ('eval_batch_size', 1)):
    if config[key] % (devices * parts_of_it):
      each = f' in each of the {parts} parts' if parts_of_it > 1 else ''
      raise UserError(
        f'{key} is {config[key]}, which the {devices} devices do not divide{each}; choose a '
        f'multiple of {devices * parts_of_it}.'
      )
  if config.data.mixing != 'none' and config.batch_size // parts % 2:
    raise UserError(
      f'data.mixing pairs the examples of a batch, but there are {config.batch_size // parts}; '
      'choose an even batch size.'
    )
  if devices % config.mesh.fsdp:
    raise UserError(
      f'mesh.fsdp is {config.mesh.fsdp}, which does not divide the {devices} devices; choose one '
      'that does, or 1 to keep the state on each.'
    )
  group = config.model.group_size
  if group is not None and (group < 1 or config.batch_size // parts % group):
    raise UserError(
      f'model.group_size is {group}, which does not divide batch_size={config.batch_size}'
      f'{f" / accumulate={parts}" if parts > 1 else ""}; choose a divisor, or None to normalise '
      'over the global batch.'
    )
