"""What a run begins with where it is not random: weights that were trained before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cbam_jax.errors import UserError, check_problems
from cbam_jax.interop import from_torch, load_state_dict, to_torch
from cbam_jax.interop.pretrained import from_pretrained
from cbam_jax.interop.state_dict import TORCH_SUFFIXES
from cbam_jax.interop.tables import tables
from cbam_jax.interop.torch import count_classes
from cbam_jax.models.base import Classifier
from cbam_jax.models.description import describe
from cbam_jax.models.graft import graft
from cbam_jax.training.state import TrainState

# Fields that change how a network is computed or trained, but not what its weights mean.
FREE_FIELDS = {
  'num_classes',
  'group_size',
  'dtype',
  'param_dtype',
  'remat',
  'implementation',
  'norm_momentum',
}


class Initial(NamedTuple):
  """The values that a run begins with.

  Attributes:
    variables: `{'params': ..., 'batch_stats': ...}` as NumPy arrays, without the head where that
      is for other classes.
    origin: Where they are from, in words.
  """

  variables: dict[str, Any]
  origin: str


def read_initial(
  name: str, model: Classifier, variables: Mapping[str, Any], key: jax.Array
) -> Initial:
  """Reads weights for `model`, and puts its attention into them where they have none.

  Args:
    name: A PyTorch checkpoint in any layout of `from_torch`; or what `from_pretrained` takes.
    model: The network.
    variables: Its variables, or their shapes.
    key: Random key of the values that new attention has.

  Raises:
    UserError: If the weights cannot be read, or are those of another network.
    MissingExtraError: If the package that reads them is not installed.
  """
  state_dict = _read(name, model)
  classes = count_classes(model, state_dict) or model.num_classes
  values, grafted = _fitted(name, model.clone(num_classes=classes), state_dict, key)
  notes = [f'{describe(model)["attention"]} put in'] if grafted else []
  if classes != model.num_classes:
    del values['params']['head']
    notes.append(f'a new head for {model.num_classes} classes in place of {classes}')
  _check_shapes(name, values, variables)
  origin = f'{name} ({", ".join(notes)})' if notes else name
  return Initial(jax.tree.map(np.asarray, values), origin)


def put_into(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
  """A state before its first step with `variables` in place of its own, as far as there are any."""
  params = {**state.params, **variables.get('params', {})}
  return state.replace(
    params=params,
    batch_stats={**state.batch_stats, **variables.get('batch_stats', {})},
    # As in create_state, a copy.
    average=None if state.average is None else jax.tree.map(jnp.copy, params),
  )


def _read(name: str, model: Classifier) -> dict[str, np.ndarray]:
  """The PyTorch state dict of a file, or of a folder's network."""
  path = Path(name).expanduser()
  if path.is_file() or path.suffix in ('.safetensors', *TORCH_SUFFIXES):
    return load_state_dict(path)
  saved = from_pretrained(name)
  _check_network(name, describe(saved.model), describe(model))
  return to_torch(saved.model, saved.variables)


def _fitted(
  name: str, model: Classifier, state_dict: Mapping[str, Any], key: jax.Array
) -> tuple[dict[str, Any], bool]:
  """The variables of `model`, and whether its attention had to be put in."""
  plain = model.clone(attention=None, stage_attention=None)
  has_attention = _knows(model, state_dict) - _knows(plain, state_dict)
  try:
    variables = from_torch(model if has_attention else plain, state_dict)
  except UserError as error:
    raise UserError(f'init_from is {name!r}, but {error}') from error
  if has_attention or model == plain:
    return variables, False
  return graft(model, variables, key=key), True


def _knows(model: Classifier, state_dict: Mapping[str, Any]) -> set[str]:
  """The layers of a PyTorch state dict that `model` has a name for, in one layout or another."""
  rows = [row for layout in tables(model).values() for row in layout]
  layers = {name.rpartition('.')[0] for name in state_dict}
  return {layer for layer in layers if any(row.matches_torch(layer) for row in rows)}


def _check_network(name: str, there: dict[str, Any], here: dict[str, Any]) -> None:
  """Raises `UserError` unless two descriptions are of one network, the first maybe a plain one."""
  was, now = _choices(there), _choices(here)
  if there['attention'] == 'none':
    was |= {key: value for key, value in now.items() if key.startswith('attention')}
  check_problems(
    f'init_from is {name!r}, which holds another network',
    {
      'different': [
        f'{key} is {was.get(key, "the default")} there, {now.get(key, "the default")} here'
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
      ]
    },
    'Set model.name, model.stem, model.attention and their fields as they are there.',
  )


def _choices(description: Mapping[str, Any]) -> dict[str, Any]:
  """What a description tells that the meaning of weights depends on, each under its own key."""
  fields = {f'fields.{name}': value for name, value in description['fields'].items()}
  of_attention = description['attention_fields'].items()
  fields |= {f'attention_fields.{name}': value for name, value in of_attention}
  kept = {key: v for key, v in fields.items() if key.partition('.')[2] not in FREE_FIELDS}
  return {'model': description['model'], 'attention': description['attention'], **kept}


def _check_shapes(name: str, values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises `UserError` if the first layer, the only one that data shapes, has other channels."""
  shapes = {path: leaf.shape for path, leaf in flatten_dict(dict(wanted)).items()}
  check_problems(
    f'init_from is {name!r}, which is for other images than the data',
    {
      'of the wrong shape': [
        f'{"/".join(path)} {leaf.shape} instead of {shapes[path]}'
        for path, leaf in flatten_dict(dict(values)).items()
        if leaf.shape != shapes[path]
      ]
    },
    'Grey and colour images need weights of their own: choose others, or other data.',
  )
