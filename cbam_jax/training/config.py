"""What a run is made of: every key with its default, and the checks before any work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from cbam_jax.errors import UserError, check_choice, near
from cbam_jax.models import create_model
from cbam_jax.models.base import Classifier
from cbam_jax.models.registry import ATTENTIONS, MODELS, named_attention
from cbam_jax.training.keys import KEYS, KINDS, is_a, shown

# Fields of the network that are not given among `model.fields`, and the key of each.
OWN_KEYS = {'dtype': 'dtype'} | {
  field: f'model.{field}'
  for field in ('name', 'attention', 'num_classes', 'stem', 'group_size', 'remat')
}


def default_config() -> ml_collections.ConfigDict:
  """Every key of a run's configuration, with the paper's recipe as defaults.

  A file of `configs/` starts from this and changes what its experiment needs; a key that is not
  here cannot be set.
  """
  config = ml_collections.ConfigDict(
    {
      'seed': 0,
      'init_from': ml_collections.config_dict.placeholder(str),  # trained weights; None: random
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
        'num_classes': 1000,  # None: as many as the training set has
        'stem': 'imagenet',
        'group_size': ml_collections.config_dict.placeholder(int),  # None: the global batch
        'remat': False,  # compute each block again in the backward pass; gains nothing on a CPU
        'fields': {},  # further fields of the network, such as {'width': 0.7}
      },
      'data': {
        'name': 'tfds:imagenet2012',
        'dir': ml_collections.config_dict.placeholder(str),
        'image_size': 224,
        'resized_side': 256,  # of test images, before the central crop; None: no crop
        'interpolation': 'bilinear',  # or bicubic: how test images are resized
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


def choose_network(config: ml_collections.ConfigDict, variant: str) -> None:
  """Sets network and attention by a variant such as 'resnet50,cbam'.

  Raises:
    UserError: If it is not two names with a comma between.
  """
  names = variant.split(',')
  if len(names) != 2 or not all(names):
    raise UserError(
      f"the variant is {variant!r}; write 'network,attention', such as 'resnet50,cbam'."
    )
  config.model.name, config.model.attention = names


def build_model(config: ml_collections.ConfigDict) -> Classifier:
  """The network that `config.model` describes, computing in `config.dtype`.

  Raises:
    UserError: On an unknown network, attention or field, or a field of the wrong type.
  """
  model = config.model
  check_choice('model.name', model.name, MODELS)
  check_choice('model.attention', model.attention, ATTENTIONS)
  _check_fields(config, 'name', 'fields', MODELS[model.name])
  _check_fields(config, 'attention', 'attention_fields', ATTENTIONS[model.attention])
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
  given = set(flattened(config))
  if missing := sorted(KEYS.keys() - given):
    raise UserError(
      f'the configuration has no {", ".join(missing)}; begin get_config() with '
      'config = cbam_jax.training.default_config(), which has every key.'
    )
  if unknown := sorted(given - KEYS.keys()):
    raise UserError(
      f'the configuration has {unknown[0]!r}, which means nothing here.{near(unknown[0], KEYS)} '
      'Remove it.'
    )
  for name, value in flattened(config).items():
    KEYS[name].check(name, value)
  size, resized = config.data.image_size, config.data.resized_side
  if resized is not None and resized < size:
    raise UserError(
      f'data.resized_side is {resized} but data.image_size is {size}; the crop cannot be larger '
      'than the image it is cut from.'
    )
  if len(config.data.mean) != len(config.data.std):
    raise UserError(
      f'data.mean is {config.data.mean} and data.std {config.data.std}; give one number a channel '
      'in each.'
    )
  _check_division(config)
  for field in config.model.fields:
    if field in OWN_KEYS:
      raise UserError(
        f'model.fields has {field!r}, which has a key of its own; set {OWN_KEYS[field]} instead.'
      )
  if config.model.num_classes is not None:
    build_model(config)


def flattened(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Every key, with dots, and its value; the two dictionaries of fields count as values."""

  def walk(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in tree:
      key, value = f'{prefix}{name}', tree[name]
      inner = isinstance(value, ml_collections.ConfigDict) and KEYS.get(key) is None
      yield from walk(value, f'{key}.') if inner else [(key, value)]

  return dict(walk(config, ''))


def _check_fields(config: ml_collections.ConfigDict, name: str, key: str, factory: Any) -> None:
  """Refuses fields that the module called by `name` does not have, or has with another type."""
  while isinstance(factory, functools.partial):
    factory = factory.func
  declared = {field.name: field for field in dataclasses.fields(factory)} if factory else {}
  taken = sorted(declared.keys() - {'name', 'parent', 'attention'})
  for field, value in config.model[key].items():
    if field not in taken:
      raise UserError(
        f'model.{key}.{field} is no field of {config.model[name]!r}; it takes '
        f'{", ".join(taken) or "none"}.{near(field, taken)}'
      )
    for kind, words in KINDS.items():
      if declared[field].type in (kind, kind.__name__) and not is_a(kind, value):
        raise UserError(
          f'model.{key}.{field} is {shown(value)}; it must be {words}, such as '
          f'{declared[field].default!r}.'
        )


def _check_division(config: ml_collections.ConfigDict) -> None:
  """What must divide what: devices, parts and groups the batch."""
  devices, parts = jax.device_count(), config.accumulate
  for key, parts_of_it in (('batch_size', parts), ('eval_batch_size', 1)):
    if config[key] % (devices * parts_of_it):
      each = f' in each of the accumulate={parts} parts' if parts_of_it > 1 else ''
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
  if group is not None and config.batch_size // parts % group:
    raise UserError(
      f'model.group_size is {group}, which does not divide batch_size={config.batch_size}'
      f'{f" / accumulate={parts}" if parts > 1 else ""}; choose a divisor, or None to normalise '
      'over the global batch.'
    )
