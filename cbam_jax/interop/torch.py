"""Variables from a PyTorch state dict, and back.

What corresponds to what is in `tables`, how an array is laid out in `forms`. Here the two trees
are laid side by side, and nothing may be missing, left over or of another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cbam_jax.errors import UserError, check_choice, check_problems
from cbam_jax.interop.forms import AS_IS, Form
from cbam_jax.interop.state_dict import plain
from cbam_jax.interop.tables import LEAVES, READ_AXES, READ_INPUT, Rows, tables
from cbam_jax.models.base import Classifier

COUNTER = 'num_batches_tracked'


def from_torch(
  model: nn.Module, state_dict: Mapping[str, Any], layout: str | None = None
) -> dict[str, Any]:
  """The variables of `model` with the values of a PyTorch state dict.

  timm's CBAM has no biases in its MLP: in a CBAM with biases they become 0; one with
  `use_bias=False` has none either.

  Args:
    model: A network of `create_model`, or an attention module alone.
    state_dict: Arrays (NumPy's, JAX's or PyTorch's) by PyTorch name, in PyTorch's layout; or a
      checkpoint that holds such a mapping as 'state_dict' or 'model'. `module.` prefixes are
      taken off, and `num_batches_tracked` is passed over.
    layout: Whose names they are: 'official' (the paper authors'), 'torchvision' or 'timm'; None
      finds it from the names.

  Returns:
    `{'params': ..., 'batch_stats': ...}` as `model.init` makes it, JAX arrays of the same types.

  Raises:
    UserError: If entries are missing, left over, of the wrong shape or not floating point, naming
      them all; or if there is no table for `model` or its attention in `layout`.
  """
  given = {k: v for k, v in plain(state_dict).items() if k.rpartition('.')[2] != COUNTER}
  layouts = tables(model)
  layout = _recognised(layouts, given) if layout is None else layout
  rows = _rows(model, layouts, layout)
  kernels = {
    row.ours: _reordered(given[weight].shape)
    for row in rows
    if (weight := f'{row.torch}.weight') in given
  }
  entries = _entries(model, rows, kernels)
  wanted = {entry.name: entry.torch_shape for entry in entries if entry.in_torch}
  found = [name for name in wanted if name in given]
  left_over = [name for name in given if name not in wanted]
  check_problems(
    f'the state dict, read in the layout {layout!r}, does not fit {type(model).__name__}',
    {
      'missing': [name for name in wanted if name not in given],
      'left over': left_over,
      'of the wrong shape': [
        f'{name} {given[name].shape} instead of {wanted[name]}'
        for name in found
        if given[name].shape != wanted[name]
      ],
      'not floating point': [
        f'{name} ({given[name].dtype})'
        for name in found
        if not jnp.issubdtype(given[name].dtype, jnp.floating)
      ],
    },
    f'{_attention_in(left_over)}Make the network as the one that wrote it: its name, attention, '
    f'stem, num_classes and width; or name the layout: {", ".join(layouts)}.',
  )
  flat = {}
  for entry in entries:
    if entry.in_torch:
      # NumPy's copy, for JAX would compile each conversion, and share memory where it can.
      array = entry.form.to_ours(given[entry.name]).astype(entry.dtype, order='C')
      flat[entry.path] = jnp.asarray(array)
    else:
      flat[entry.path] = jnp.zeros(entry.shape, entry.dtype)
  return unflatten_dict(flat)


def _attention_in(left_over: Sequence[str]) -> str:
  """The sentence that tells of an attention in names that a network has no place for."""
  parts = {part for name in left_over for part in name.split('.')}
  # timm calls its CBAM 'se' too.
  if 'cbam' in parts or {'se', 'channel', 'spatial'} <= parts:
    attention = 'cbam'
  elif 'bam1' in parts:
    attention = 'bam'
  elif 'se' in parts:
    attention = 'se'
  else:
    return ''
  return f'What is left over looks like attention={attention!r}. '


def to_torch(
  model: nn.Module, variables: Mapping[str, Any], layout: str | None = None
) -> dict[str, np.ndarray]:
  """The PyTorch state dict of `variables`, the inverse of `from_torch`.

  It loads with `load_state_dict(strict=True)` after `torch.from_numpy`. Gradients go in as
  `{'params': gradients}` and come out as parameters alone.

  timm's CBAM has no biases in its MLP. In its layout, variables may have none there but 0, and
  gradients without batch statistics lose those of the biases.

  Args:
    model: The network or attention module that `variables` belong to.
    variables: `{'params': ..., 'batch_stats': ...}`, or `{'params': ...}` alone.
    layout: Whose names to give: 'official', 'torchvision' or 'timm'. None stands for 'official'
      for ResNets and attention modules, 'torchvision' for VGG16 and 'timm' for MobileNetV1.

  Returns:
    NumPy arrays of the types in `variables`, in PyTorch's order and layout. Each batch norm with
    statistics has a `num_batches_tracked` of 0.

  Raises:
    UserError: If arrays are missing, left over or of the wrong shape, naming them all; if a bias
      is not 0 where `layout` has none; or if there is no table for `model` or its attention in
      `layout`.
  """
  if not isinstance(variables, Mapping) or 'params' not in variables:
    raise UserError(
      "the variables are no mapping with 'params'; give {'params': ..., 'batch_stats': ...}, or "
      "{'params': gradients}."
    )
  given = flatten_dict(dict(variables))
  layouts = tables(model)
  layout = next(iter(layouts)) if layout is None else layout
  kernels = {
    '/'.join(path[1:-1]): jnp.shape(array) for path, array in given.items() if path[-1] == 'kernel'
  }
  entries = _entries(model, _rows(model, layouts, layout), kernels)
  collections = {path[0] for path in given}
  whole = collections >= {entry.path[0] for entry in entries}
  wanted = {entry.path: entry for entry in entries if entry.path[0] in collections | {'params'}}
  check_problems(
    f'the variables do not fit {type(model).__name__}',
    {
      'missing': ['/'.join(path) for path in wanted if path not in given],
      'left over': ['/'.join(path) for path in given if path not in wanted],
      'of the wrong shape': [
        f'{"/".join(path)} {jnp.shape(given[path])} instead of {entry.shape}'
        for path, entry in wanted.items()
        if path in given and jnp.shape(given[path]) != entry.shape
      ],
      'not 0, and without a place in this layout': [
        '/'.join(path)
        for path, entry in wanted.items()
        if whole and not entry.in_torch and path in given and np.any(given[path])
      ],
    },
    'Give what the init of this very model returns, with other values, or its gradients as '
    f"{{'params': ...}}; for biases that {layout!r} has no place for, name another layout "
    f'({", ".join(layouts)}) or train with use_bias=False.',
  )
  state_dict = {}
  for path, entry in wanted.items():
    if entry.in_torch:
      # Copied, for PyTorch takes neither read-only memory nor negative strides.
      state_dict[entry.name] = np.array(entry.form.to_torch(np.asarray(given[path])), order='C')
    if path[-1] == 'var':
      state_dict[f'{entry.name.rpartition(".")[0]}.{COUNTER}'] = np.zeros((), np.int64)
  return state_dict


def count_classes(model: Classifier, state_dict: Mapping[str, Any]) -> int | None:
  """How many classes a PyTorch state dict of the kind of `model` tells apart; None if unknown."""
  given = plain(state_dict)
  heads = (row.torch for rows in tables(model).values() for row in rows if row.ours == 'head')
  weights = (given[f'{head}.weight'] for head in heads if f'{head}.weight' in given)
  return next((weight.shape[0] for weight in weights if weight.ndim), None)


class _Entry(NamedTuple):
  """One array, here and in PyTorch."""

  path: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: Any
  name: str
  form: Form
  in_torch: bool

  @property
  def torch_shape(self) -> tuple[int, ...]:
    """The shape in PyTorch, without making the array."""
    ours = jax.ShapeDtypeStruct(self.shape, self.dtype)
    return self.shape if self.form is AS_IS else jax.eval_shape(self.form.to_torch, ours).shape


def _entries(model: nn.Module, rows: Rows, kernels: Mapping[str, tuple[int, ...]]) -> list[_Entry]:
  """Every array of `model`, in PyTorch's order.

  `kernels` has the shapes of those at hand, by path: an attention module alone, or a network for
  other than colour images, is told by nothing else how many channels (and axes) it is for.
  """
  channels = next((kernels[k][-2] for k in READ_INPUT if len(kernels.get(k, ())) > 1), 3)
  axes = next((len(kernels[k]) - 2 for k in READ_AXES if 3 <= len(kernels.get(k, ())) <= 5), 2)
  side = 32 if isinstance(model, Classifier) else 1
  x = jax.ShapeDtypeStruct((1, *(side,) * axes, channels), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)

  parts = [row.torch.split('.')[0] for row in rows]
  entries = {}
  unmapped = []
  for path, leaf in flatten_dict(variables).items():
    layer = '/'.join(path[1:-1])
    matches = ((i, row, row.match(layer)) for i, row in enumerate(rows))
    i, row, numbers = next((m for m in matches if m[2] is not None), (0, None, None))
    if row is None or numbers is None or path[-1] not in LEAVES:
      unmapped.append('/'.join(path))
      continue
    # PyTorch goes part by part, within a part block by block, within a block row by row.
    order = (parts.index(parts[i]), *numbers.values(), i, list(LEAVES).index(path[-1]))
    entries[order] = _Entry(
      path=path,
      shape=leaf.shape,
      dtype=leaf.dtype,
      name=f'{row.torch_name(numbers)}.{LEAVES[path[-1]]}',
      form=row.form if path[-1] == 'kernel' else AS_IS,
      in_torch=row.form.biases or path[-1] != 'bias',
    )
  check_problems(
    f'{type(model).__name__} has arrays with no name in PyTorch',
    {'unmapped': unmapped},
    'Tables exist for the attention of this package only; convert these by hand, and the rest '
    "with the same network and attention='none'.",
  )
  return [entries[order] for order in sorted(entries)]


def _rows(model: nn.Module, layouts: Mapping[str, Rows], layout: str) -> Rows:
  check_choice(f'the layout of {type(model).__name__}', layout, layouts)
  return layouts[layout]


def _recognised(layouts: Mapping[str, Rows], names: Iterable[str]) -> str:
  """The layout that knows most of `names`; the first of those that know as many."""
  layers = {name.rpartition('.')[0] for name in names}

  def known(layout: str) -> int:
    return sum(any(row.matches_torch(layer) for row in layouts[layout]) for layer in layers)

  return max(layouts, key=known)


def _reordered(shape: tuple[int, ...]) -> tuple[int, ...]:
  """(out, in, *spatial) as (*spatial, in, out)."""
  return (*shape[2:], *shape[1::-1])
