"""PyTorch state dicts as plain NumPy arrays, from memory or from a file, with or without torch."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cbam_jax.errors import UserError, first_line, require

WRAPPERS = ('state_dict', 'model')
PREFIXES = ('module.', '_orig_mod.')  # of DataParallel, and of torch.compile

TORCH_SUFFIXES = ('.pth', '.pt', '.bin', '.tar')

_SAFETENSORS_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads a PyTorch state dict from a file.

  Args:
    path: A `.safetensors` file, read without PyTorch; or a `.pth`, `.pt`, `.bin` or `.tar` file,
      read by PyTorch with `weights_only=True`, so that nothing in the file is executed.

  Returns:
    What `from_torch` takes: NumPy arrays by PyTorch name, of the types in the file (bfloat16 is
    `ml_dtypes`'), without `module.` prefixes, out of a surrounding `state_dict`.

  Raises:
    UserError: If the file is missing, damaged, of another suffix, or holds other than tensors.
    MissingExtraError: If the package that reads it is not installed.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise UserError(f'there is no file {path}; give the path of a PyTorch checkpoint.')
  if path.suffix == '.safetensors':
    return plain(read_safetensors(path))
  if path.suffix in TORCH_SUFFIXES:
    return plain(_read_torch(path))
  raise UserError(
    f'{path} ends in {path.suffix!r}; readable are .safetensors, {", ".join(TORCH_SUFFIXES)}. '
    'Rename the file if it is one of these.'
  )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
  """The arrays of a `.safetensors` file by name, as they are there.

  Raises:
    UserError: If it is damaged, or holds a type that JAX has not.
    MissingExtraError: If safetensors is not installed.
  """
  safetensors = require('safetensors', 'torch')
  try:
    tensors = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise UserError(
      f'{path} is damaged or not a safetensors file ({error}); fetch it again.'
    ) from error
  arrays = {}
  for name, tensor in tensors:
    dtype = _SAFETENSORS_DTYPES.get(tensor['dtype'])
    if dtype is None:
      raise UserError(
        f'{name} in {path} is of type {tensor["dtype"]}; readable are '
        f'{", ".join(_SAFETENSORS_DTYPES)}. Save it as one of these.'
      )
    arrays[name] = np.frombuffer(tensor['data'], dtype).reshape(tensor['shape'])
  return arrays


def _read_torch(path: Path) -> Any:
  torch = require('torch', 'torch')
  try:
    return torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    # Not PyTorch's own words, which advise to load it all the same.
    called = re.search(r'GLOBAL (\S+)', str(error))
    raise UserError(
      f'{path} is damaged, or holds Python objects that are not safe to load'
      f'{f": it would call {called[1]}" if called else ""}. Fetch it again, or save the tensors '
      'alone where you trust it: torch.save(model.state_dict(), path).'
    ) from error
  except Exception as error:  # a damaged file makes torch raise nearly anything
    raise UserError(
      f'{path} is damaged or not a PyTorch file ({type(error).__name__}: {first_line(error)}); '
      'fetch it again.'
    ) from error


def plain(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """`state_dict` as NumPy arrays by PyTorch name.

  Args:
    state_dict: Arrays or tensors by name; or a checkpoint that holds such a mapping as
      'state_dict' or 'model'. `module.` prefixes are taken off.

  Returns:
    The arrays, in the order of `state_dict`.

  Raises:
    UserError: If `state_dict` is no mapping, holds two state dicts, or two entries of one name.
  """
  if not isinstance(state_dict, Mapping):
    raise UserError(
      f'the state dict is of type {type(state_dict).__name__}; give a mapping of names to arrays: '
      'module.state_dict() of PyTorch, or cbam_jax.interop.load_state_dict(path).'
    )
  wrapped = [key for key in WRAPPERS if isinstance(state_dict.get(key), Mapping)]
  if len(wrapped) > 1:
    raise UserError(f'the checkpoint holds {" and ".join(wrapped)}; give one of these mappings.')
  arrays: dict[str, np.ndarray] = {}
  for key, value in state_dict[wrapped[0]].items() if wrapped else state_dict.items():
    name = _without_prefix(key)
    if name in arrays:
      raise UserError(f'the state dict has {name} with and without a prefix; remove one of them.')
    arrays[name] = _as_numpy(value)
  return arrays


def _without_prefix(name: str) -> str:
  for prefix in PREFIXES:
    if name.startswith(prefix):
      return _without_prefix(name.removeprefix(prefix))
  return name


def _as_numpy(value: Any) -> np.ndarray:
  if hasattr(value, 'detach'):  # a tensor of PyTorch, which is not imported for its sake
    value = value.detach().cpu()
    if str(value.dtype) == 'torch.bfloat16':  # NumPy has no such type; JAX's package has
      return value.float().numpy().astype(jnp.bfloat16)
    return value.numpy()
  return np.asarray(value)
