"""From --config and its overrides to a configuration."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbam_jax.errors import UserError, near, require

if TYPE_CHECKING:
  from ml_collections import ConfigDict

PACKAGE = Path(__file__).resolve().parents[1]

# Overridden field by field: the keys that hold fields of the network and of its attention.
FIELDS = ('model.fields', 'model.attention_fields')


def load_config(file: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The configuration of `file` with overrides applied.

  Args:
    file: A Python file with `get_config()`, or the name of one that comes with this package, such
      as 'digits'; what follows a colon is the function's argument.
    overrides: `--config.key=value`, each value of the type of the one it replaces.

  Raises:
    UserError: If the file cannot be used, or on an unknown key or a value of the wrong type.
  """
  ml_collections = require('ml_collections', 'train')
  name, colon, variant = file.partition(':')
  path = _find(name)
  try:
    get_config = _load(path).get_config
    _check_variant(get_config, file, variant if colon else None)
    config = get_config(variant) if colon else get_config()
  except UserError as error:
    raise UserError(f'{file} cannot be loaded: {error}') from error
  except Exception as error:  # the file is the user's own code: it may raise anything
    # The message may be a whole traceback, of which the last line says what went wrong.
    reason = (str(error).strip().splitlines() or [repr(error)])[-1]
    raise UserError(f'{file} cannot be loaded: {reason}; mend the file.') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'{file} cannot be loaded: its get_config() returned a {type(config).__name__}; return '
      'what cbam_jax.training.default_config() returns, changed as you need.'
    )
  for override in overrides:
    _override(config, override)
  return config


def shipped() -> dict[str, Path]:
  """The configuration files that come with this package, by name."""
  inside = PACKAGE / 'configs'  # an installed wheel
  folder = inside if inside.is_dir() else PACKAGE.parent / 'configs'  # a checkout
  return {path.stem: path for path in sorted(folder.glob('*.py'))}


def _find(name: str) -> Path:
  path = Path(name)
  if path.is_file():
    return path
  known = shipped()
  if path in (Path(path.stem), Path('configs', f'{path.stem}.py')) and path.stem in known:
    return known[path.stem]
  raise UserError(
    f'there is no configuration file {name!r}; name one that exists, or one of those that come '
    f'with this package: {", ".join(known)}.{near(path.stem, known)} What follows a colon is its '
    'argument, as in imagenet:resnet50,cbam.'
  )


def _load(path: Path) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location(f'cbam_jax configuration {path}', path)
  if spec is None or spec.loader is None:
    raise UserError(f'{path} is not a Python file; name one that ends in .py.')
  module = importlib.util.module_from_spec(spec)
  sys.modules[module.__name__] = module  # where a dataclass of the file looks for its own types
  spec.loader.exec_module(module)
  return module


def _check_variant(get_config: Any, file: str, variant: str | None) -> None:
  parameters = inspect.signature(get_config).parameters.values()
  if variant is not None and not parameters:
    raise UserError(
      f'it takes no argument, but {variant!r} follows the colon; write {file.partition(":")[0]}.'
    )
  if variant is None and any(p.default is p.empty for p in parameters):
    raise UserError(f'it needs an argument; write it after a colon, as in {file}:ARGUMENT.')


def _override(config: ConfigDict, override: str) -> None:
  from cbam_jax.training.config import flattened
  from cbam_jax.training.keys import KEYS, literal

  name, equals, text = override.partition('=')
  key = name.removeprefix('--config.')
  if not name.startswith('--config.') or not equals:
    raise UserError(f'cannot use {override!r}; an override is written --config.key=value.')
  *parents, last = key.split('.')
  parent = '.'.join(parents)
  known = {known for known in flattened(config) if known in KEYS}
  if parent in FIELDS and parent in known and last:
    value = {**_get(config, parents), last: literal(text)}
    *parents, last = parents
  elif key in known:
    value = KEYS[key].read(key, text)
  else:
    raise UserError(
      f'the configuration has no key {key!r}.{near(key, known)} Choose one of '
      f'{", ".join(sorted(known))}.'
    )
  with config.unlocked():
    _get(config, parents)[last] = value


def _get(config: Any, names: Sequence[str]) -> Any:
  for name in names:
    config = config[name]
  return config
