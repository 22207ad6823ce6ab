"""A network as a folder: config.json and its arrays, as one uploads them to a model hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cbam_jax.errors import (
  ChannelsError,
  MissingExtraError,
  UserError,
  check_choice,
  check_problems,
  first_line,
  require,
)
from cbam_jax.files import whole_folder
from cbam_jax.interop.state_dict import read_safetensors
from cbam_jax.models.base import Classifier
from cbam_jax.models.description import blaming_fields, describe, from_description

if TYPE_CHECKING:
  from cbam_jax.data.preprocessing import Preprocessing

CONFIG = 'config.json'

FORMATS = {'safetensors': 'model.safetensors', 'orbax': 'variables'}
"""The name of what holds the arrays, by its format: a file, or a folder that orbax writes."""

DESCRIPTION = ('model', 'attention', 'attention_fields', 'fields')
"""The keys of config.json that tell the network."""


Arrays: TypeAlias = Mapping[tuple[str, ...], Any]
"""By path, such as ('params', 'head', 'bias')."""

Shapes: TypeAlias = Mapping[tuple[str, ...], tuple[int, ...]]


class Pretrained(NamedTuple):
  """A network and all that is needed to use it.

  Attributes:
    model: The network.
    variables: Its variables, `{'params': ..., 'batch_stats': ...}`.
    preprocessing: What it takes of a picture.
    classes: Names of its classes in the order of its logits; None if they are not known.
  """

  model: Classifier
  variables: dict[str, Any]
  preprocessing: Preprocessing
  classes: tuple[str, ...] | None


def save_pretrained(
  folder: str | os.PathLike[str],
  model: Classifier,
  variables: Mapping[str, Any],
  *,
  preprocessing: Preprocessing | None = None,
  classes: Sequence[str] | None = None,
  format: str = 'safetensors',
) -> None:
  """Writes a network to `folder`: `config.json`, and the arrays as they are.

  The folder appears whole or not at all, in place of one that this wrote before.

  Args:
    folder: Where to.
    model: A network of `create_model` with attention of this package.
    variables: Its variables.
    preprocessing: What it takes of a picture; None for ImageNet's usual.
    classes: Names of its classes, in the order of its logits.
    format: 'safetensors' for one file, `model.safetensors`, in which an array's name is its path,
      such as 'params.stage1.block1.conv1.kernel'; 'orbax' for the folder `variables`, which any
      `orbax.checkpoint.StandardCheckpointer` restores.

  Raises:
    UserError: If the network cannot be described, the variables are not its own, there is not one
      name a class, or `folder` holds something else.
    MissingExtraError: If the package that writes it is not installed.
    RunError: If the disk is full or the folder cannot be written.
  """
  from cbam_jax.data.preprocessing import Preprocessing  # not for those who import a module alone

  check_choice('the format', format, FORMATS)
  description = describe(model)
  from_description(description)  # what cannot be read again is not written
  _check_arrays(model, flatten_dict(dict(variables)))
  _check_classes(model, classes)
  config = {
    **description,
    'preprocessing': (preprocessing or Preprocessing()).to_dict(),
    'classes': None if classes is None else list(classes),
  }
  names = (CONFIG, *FORMATS.values())
  with whole_folder(Path(folder).expanduser(), names, _is_ours) as partial:
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + '\n')
    write = _write_safetensors if format == 'safetensors' else _write_orbax
    write(partial / FORMATS[format], jax.device_get(dict(variables)))


def from_pretrained(name: str | os.PathLike[str]) -> Pretrained:
  """Reads what `save_pretrained` wrote.

  Args:
    name: The folder; or OWNER/NAME of a model hub, where huggingface_hub is installed.

  Raises:
    UserError: If there is no such folder, or what it holds is damaged or not a network.
    MissingExtraError: If the package that reads it is not installed.
  """
  from cbam_jax.data.preprocessing import Preprocessing

  folder = Path(name).expanduser()
  if not folder.is_dir():
    folder = _from_hub(str(name))
  config = read_config(folder)
  if {'optimizer', 'data'} <= config.keys():
    raise UserError(
      f'{folder} is the folder of a run; write its best checkpoint to one of its own first, '
      f'`cbam-jax convert {folder} FOLDER`, and read that; or use cbam_jax.training.load_run.'
    )
  model = from_description({key: config.get(key) for key in DESCRIPTION})
  arrays = _read_arrays(folder)
  _check_arrays(model, arrays)
  classes = config.get('classes')
  _check_classes(model, classes)
  return Pretrained(
    model,
    unflatten_dict({path: jnp.asarray(array) for path, array in arrays.items()}),
    Preprocessing.from_dict(config.get('preprocessing')),
    None if classes is None else tuple(classes),
  )


def check_images(network: Pretrained) -> None:
  """Asks whether a network takes what its preprocessing makes of a picture.

  Raises:
    UserError: If it was made for images of other channels.
  """
  side, channels = network.preprocessing.image_size, network.preprocessing.channels

  def takes(channels: int) -> bool:
    images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    try:
      jax.eval_shape(lambda v, x: network.model.apply(v, x, train=False), network.variables, images)
    except ChannelsError:
      return False
    return True

  if takes(channels):
    return
  other = 1 if channels == 3 else 3
  if takes(other):
    raise UserError(
      f'the network takes images of {other} channels, but mean is {network.preprocessing.mean} and '
      f'std {network.preprocessing.std}; give those that it was trained with, one number a channel '
      '(--mean, --std).'
    )
  raise UserError(
    f'the network takes images of neither {channels} nor {other} channels, and pictures have no '
    'other; use it from Python.'
  )


def _read_arrays(folder: Path) -> Arrays:
  """The arrays in a folder, in whichever format it has them."""
  if (file := folder / FORMATS['safetensors']).is_file():
    arrays = read_safetensors(file)
    return {tuple(name.split('.')): array for name, array in arrays.items()}
  if (tree := folder / FORMATS['orbax']).is_dir():
    ocp = require('orbax.checkpoint', 'train')
    try:
      # As NumPy arrays: those of another machine's devices are of no use here.
      with ocp.PyTreeCheckpointer() as checkpointer:
        return flatten_dict(checkpointer.restore(tree.absolute()))
    except Exception as error:  # orbax raises nearly anything on a damaged file
      raise UserError(
        f'{tree} is damaged or no orbax checkpoint ({first_line(error)}); save it again.'
      ) from error
  raise UserError(
    f'{folder} has {CONFIG} but no {" and no ".join(FORMATS.values())}; fetch or save it again.'
  )


def _write_safetensors(file: Path, variables: dict[str, Any]) -> None:
  safetensors = require('safetensors.numpy', 'torch')
  flat = flatten_dict(variables)
  arrays = {'.'.join(path): np.ascontiguousarray(array) for path, array in flat.items()}
  # Not by its save_file, whose files their owner alone may read.
  file.write_bytes(safetensors.save(arrays, metadata={'format': 'cbam_jax'}))


def _write_orbax(folder: Path, variables: dict[str, Any]) -> None:
  ocp = require('orbax.checkpoint', 'train')
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder.absolute(), variables)


def read_config(folder: Path) -> dict[str, Any]:
  """The `config.json` of a folder of `save_pretrained`.

  Raises:
    UserError: If it is not there or damaged.
  """
  try:
    config = json.loads((folder / CONFIG).read_text())
    if not isinstance(config, dict):
      raise ValueError(f'it holds a {type(config).__name__}')
  except FileNotFoundError:
    raise UserError(
      f'{folder} has no {CONFIG}; name a folder that save_pretrained or `cbam-jax convert` wrote.'
    ) from None
  except (OSError, RecursionError, ValueError) as error:
    raise UserError(
      f'{folder / CONFIG} cannot be read ({error}); fetch or save it again.'
    ) from error
  return config


def _is_ours(folder: Path) -> bool:
  """Whether `save_pretrained` wrote a folder; other libraries' have a `config.json` as well."""
  try:
    return read_config(folder).keys() >= {*DESCRIPTION}
  except UserError:
    return False


def _check_arrays(model: Classifier, given: Arrays) -> None:
  """Raises `UserError`, naming all that is wrong, unless these are the arrays of `model`."""
  shapes = {path: jnp.shape(array) for path, array in given.items()}
  wanted = _shapes(model, shapes)
  check_problems(
    f'the variables do not fit {type(model).__name__}',
    {
      'missing': ['/'.join(path) for path in wanted if path not in given],
      'left over': ['/'.join(path) for path in given if path not in wanted],
      'of the wrong shape': [
        f'{"/".join(path)} {shapes[path]} instead of {shape}'
        for path, shape in wanted.items()
        if path in given and shapes[path] != shape
      ],
      'not floating point': [
        f'{"/".join(path)} ({jnp.result_type(array)})'
        for path, array in given.items()
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating)
      ],
    },
    'Give what the init of this very model returns, with other values.',
  )


def _shapes(model: Classifier, given: Shapes) -> Shapes:
  """The shape of every array of `model`; those `given` tell how many channels its images have."""
  first = [given.get(('params', *path, 'kernel'), ()) for path in FIRST_CONVOLUTIONS]
  channels = next((kernel[-2] for kernel in first if len(kernel) == 4), 3)
  image = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
  with blaming_fields(model):
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
  return {path: array.shape for path, array in flatten_dict(variables).items()}


FIRST_CONVOLUTIONS = (('stem', 'conv'), ('stage1', 'conv1'))
"""What reads the images, in one network or another."""


def _check_classes(model: Classifier, classes: Any) -> None:
  if classes is None:
    return
  # A text is a sequence of texts itself.
  sequence = isinstance(classes, Sequence) and not isinstance(classes, str)
  if not sequence or not all(isinstance(name, str) for name in classes):
    raise UserError(
      f'the class names are {classes!r:.100}; give a list of texts, one for each class in the '
      'order of its logits, or None where they are not known.'
    )
  if len(classes) != model.num_classes:
    raise UserError(
      f'there are {len(classes)} class names for a network of {model.num_classes} classes; give '
      'one for each, in the order of its logits.'
    )


def _from_hub(name: str) -> Path:
  """The folder of a model hub's repository, fetched unless it is at hand."""
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', name):
    raise UserError(
      f'there is no folder {name!r}; name one that save_pretrained wrote, or OWNER/NAME of a model '
      'hub.'
    )
  try:
    hub = require('huggingface_hub', 'hub')
  except MissingExtraError as error:
    raise MissingExtraError(
      f'there is no folder or file {name!r}; check the path. If it is the name of a repository of '
      f'a model hub: {error}'
    ) from error
  try:
    return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, FORMATS['safetensors']]))
  except Exception as error:  # of nearly any kind: the network is in between
    raise UserError(
      f"there is no folder {name!r}, and it cannot be fetched as a hub's repository "
      f'({type(error).__name__}: {error}); check the name and the connection.'
    ) from error
