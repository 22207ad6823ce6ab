"""The network that a subcommand is to use: from anyone's weights, a folder or a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.transforms import RESAMPLINGS
from cbam_jax.errors import UserError, near
from cbam_jax.interop import from_torch, load_state_dict
from cbam_jax.interop.pretrained import Pretrained, check_images, from_pretrained
from cbam_jax.interop.state_dict import TORCH_SUFFIXES
from cbam_jax.interop.torch import count_classes
from cbam_jax.models import create_model, list_models
from cbam_jax.models.description import blaming_fields, from_names
from cbam_jax.models.registry import ATTENTIONS

LAYOUTS = ('official', 'torchvision', 'timm')


def add_network_arguments(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
  """Declares which network, and what it takes of a picture.

  Args:
    parser: Gets the arguments.
    positional: Whether the place of the weights is an argument without a name, of any kind.
  """
  network = parser.add_argument_group('the network')
  weights = (
    'a PyTorch state dict (.pth, .safetensors), with --model; or what `cbam-jax convert` or '
    'save_pretrained wrote, or OWNER/NAME of a model hub'
  )
  if positional:
    parser.add_argument('weights', metavar='IN', help=f'{weights}; or the folder of a run')
    parser.set_defaults(workdir=None)
  else:
    source = network.add_mutually_exclusive_group(required=True)
    source.add_argument('--weights', metavar='FILE|DIR', help=weights)
    source.add_argument('--workdir', metavar='DIR', help='a run, whose best checkpoint is taken')
  network.add_argument('--model', metavar='NAME', help=', '.join(list_models()))
  network.add_argument('--attention', metavar='NAME', help=f'{", ".join(ATTENTIONS)}')
  network.add_argument('--layout', metavar='NAME', help=f'{", ".join(LAYOUTS)}; found by itself')
  network.add_argument(
    '--field',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='a field of the network, such as stem=cifar or width=0.7; may be repeated',
  )
  network.add_argument(
    '--attention-field',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help='a field of its attention, such as order=parallel; may be repeated',
  )
  network.add_argument(
    '--class-names', metavar='FILE', help='one a line, in the order of the logits'
  )
  picture = parser.add_argument_group(
    'what it takes of a picture',
    "by default ImageNet's usual, or what is stored beside the weights",
  )
  picture.add_argument('--image-size', type=int, metavar='PIXELS', help='of the central crop')
  picture.add_argument(
    '--resized-side',
    metavar='PIXELS',
    help='of the shorter side before the crop, or none to resize the whole picture to the crop',
  )
  picture.add_argument('--interpolation', metavar='NAME', help=' or '.join(RESAMPLINGS))
  picture.add_argument('--mean', type=float, nargs='+', metavar='X', help='of pixels in [0, 1]')
  picture.add_argument('--std', type=float, nargs='+', metavar='X', help='likewise')


def load_network(arguments: argparse.Namespace, attention: str | None = None) -> Pretrained:
  """The network that the arguments name.

  Args:
    arguments: Of a parser that `add_network_arguments` has seen.
    attention: Takes the place of '--attention', and of '{attention}' in the path, where several
      networks are compared.

  Raises:
    UserError: If there is none there, or not as the arguments tell.
  """
  attention = attention or arguments.attention
  where = arguments.weights or arguments.workdir
  if '{attention}' in where:
    if attention is None:
      raise UserError(f'{where!r} stands for several networks; choose one with --attention.')
    where = where.replace('{attention}', attention)
  if arguments.weights and Path(where).expanduser().is_file():
    network = _from_file(where, attention, arguments)
  else:
    network = _from_folder(where, arguments)
  network = network._replace(
    preprocessing=_preprocessing(network.preprocessing, arguments),
    classes=_class_names(arguments, network) or network.classes,
  )
  check_images(network)
  return network


def _from_folder(where: str, arguments: argparse.Namespace) -> Pretrained:
  path = Path(where).expanduser()
  is_file = arguments.weights and path.suffix in ('.safetensors', *TORCH_SUFFIXES)
  if is_file and not path.exists():
    beside = [entry.name for entry in path.parent.glob('*')]
    raise UserError(
      f'there is no file {where}; check the path of the weights.{near(path.name, beside)}'
    )
  told = [name for name in told_arguments(arguments, NETWORK_OPTIONS) if name != '--attention']
  if arguments.attention and '{attention}' not in (arguments.weights or arguments.workdir):
    told.append('--attention')
  if told:
    raise UserError(
      f'{where} is no file, and tells its network itself; leave out {", ".join(told)}, or name a '
      '.pth or .safetensors file.'
    )
  if arguments.weights and not (path / 'checkpoints').is_dir():
    return from_pretrained(where)
  from cbam_jax.training import load_run

  return load_run(where).network


def _from_file(path: str, attention: str | None, arguments: argparse.Namespace) -> Pretrained:
  if arguments.model is None:
    raise UserError(
      f'{path} holds arrays alone; tell the network that they are of with --model and --attention. '
      f'Networks: {", ".join(list_models())}.'
    )
  state_dict = load_state_dict(path)
  if any(name.startswith('params.') for name in state_dict):
    raise UserError(f'{path} is a part of a folder; name the folder, {Path(path).parent}.')
  fields = _fields('--field', arguments.field)
  if 'num_classes' not in fields:
    found = count_classes(create_model(arguments.model), state_dict)
    fields |= {} if found is None else {'num_classes': found}
  attention_fields = _fields('--attention-field', arguments.attention_field)
  model = from_names(arguments.model, attention or 'none', attention_fields, fields)
  try:
    with blaming_fields(model):
      variables = from_torch(model, state_dict, arguments.layout)
  except UserError as error:
    raise UserError(
      f'{path} does not hold {arguments.model} with --attention {attention or "none"}: {error}'
    ) from error
  return Pretrained(model, variables, Preprocessing(), None)


NETWORK_OPTIONS = ('model', 'attention', 'layout', 'field', 'attention_field')
PICTURE_OPTIONS = ('image_size', 'resized_side', 'interpolation', 'mean', 'std')


def told_arguments(
  arguments: argparse.Namespace, names: Sequence[str] = (*NETWORK_OPTIONS, *PICTURE_OPTIONS)
) -> list[str]:
  """Which options of those called `names` were given."""
  given = (name for name in names if getattr(arguments, name) not in (None, []))
  return [f'--{name.replace("_", "-")}' for name in given]


def _fields(option: str, assignments: Sequence[str]) -> dict[str, Any]:
  """The names and values of assignments such as 'width=0.7'."""
  from cbam_jax.training.keys import literal

  fields = {}
  for assignment in assignments:
    name, equals, text = assignment.partition('=')
    if not equals or not name:
      raise UserError(f'{option} is {assignment!r}; write NAME=VALUE, such as width=0.7.')
    fields[name] = literal(text)
  return fields


def _preprocessing(stored: Preprocessing, arguments: argparse.Namespace) -> Preprocessing:
  """What is stored, with what the arguments change."""
  told = {
    name: value
    for name in ('image_size', 'interpolation', 'mean', 'std')
    if (value := getattr(arguments, name)) is not None
  }
  if arguments.resized_side is not None:
    text = arguments.resized_side
    if text.lower() != 'none' and not text.isdecimal():
      raise UserError(f'--resized-side is {text!r}; give a number of pixels, or none.')
    told['resized_side'] = None if text.lower() == 'none' else int(text)
  return dataclasses.replace(stored, **told)


def _class_names(arguments: argparse.Namespace, network: Pretrained) -> tuple[str, ...] | None:
  if arguments.class_names is None:
    return None
  try:
    names = tuple(Path(arguments.class_names).expanduser().read_text().splitlines())
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'--class-names={arguments.class_names} cannot be read ({error}); name a text file.'
    ) from error
  if len(names) != network.model.num_classes:
    raise UserError(
      f'{arguments.class_names} has {len(names)} lines for {network.model.num_classes} classes; '
      'write one name a line, in the order of the logits.'
    )
  return names
