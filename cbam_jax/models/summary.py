"""What a network costs: parameters and multiply-adds, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from cbam_jax.errors import UserError
from cbam_jax.layers import any_platform
from cbam_jax.models.base import Classifier


@dataclasses.dataclass(frozen=True)
class StageSummary:
  """One row: a stage of the network, or its stem or head.

  Attributes:
    name: The submodule's name, 'stem', 'stage1', ..., 'head'.
    output_shape: (h, w, c) of a stage's output for one image; None for what is not a stage.
    params: Number of parameters.
    multiply_adds: Multiply-adds for one image.
  """

  name: str
  output_shape: tuple[int, ...] | None
  params: int
  multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a network costs for one image; `str()` is a table.

  Attributes:
    image_size: Side of the image, pixels.
    params: Number of parameters, the trained ones (batch statistics do not count).
    multiply_adds: Multiply-adds of convolutions and matrix products, the attention's included;
      the paper prints them as GFLOPs.
    stages: A row for each stage, the stem and the head; they add up to the whole.
  """

  image_size: int
  params: int
  multiply_adds: int
  stages: tuple[StageSummary, ...]

  def __str__(self) -> str:
    total = StageSummary('total', None, self.params, self.multiply_adds)
    header = f'{"stage":<12}{"output":>16}{"params":>14}{"multiply-adds":>18}'
    return '\n'.join([header, '-' * len(header), *map(_row, self.stages), _row(total)])


def summary(model: Classifier, image_size: int = 224, channels: int = 3) -> Summary:
  """Counts the parameters and multiply-adds of `model` for one image, without running it.

  Args:
    model: A network of `create_model`.
    image_size: Side of the square image, pixels.
    channels: Channels of the image.

  Returns:
    The counts, as Python integers.

  Raises:
    UserError: If `model` is another module, or `image_size` or `channels` is under 1.
  """
  if not isinstance(model, Classifier):
    raise UserError(
      f'summary got {type(model).__name__}; it takes a network of create_model, whose stages it '
      'tells apart.'
    )
  if image_size < 1 or channels < 1:
    raise UserError(
      f'an image of side {image_size} and {channels} channels has no pixels; both must be at '
      'least 1.'
    )
  image = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes: dict[str, tuple[int, ...]] = {}

  def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    result = call(*args, **kwargs)
    if context.method_name == 'features' and not context.module.path:
      shapes.update((name, tuple(features.shape[1:])) for name, features in result.items())
    return result

  # The network runs while its parameters are made, so one trace has all that is asked for. What
  # other platforms compute in their ways need not be traced.
  with any_platform(), nn.intercept_methods(note):
    run = functools.partial(model.init_with_output, train=False)
    jaxpr, (_, variables) = jax.make_jaxpr(run, return_shape=True)(key, image)

  params = {
    name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    for name, tree in variables['params'].items()
  }
  multiply_adds: Counter[str] = Counter()
  for scopes, count in _products(jaxpr.jaxpr):
    multiply_adds[next(scope for scope in scopes if scope in params)] += count
  stages = tuple(
    StageSummary(
      name,
      shapes.get(name),
      params[name],
      multiply_adds[name],
    )
    for name in sorted(params, key=_order)
  )
  return Summary(image_size, sum(params.values()), multiply_adds.total(), stages)


def _order(name: str) -> tuple[int, str]:
  """Stem, stages, dense layers, head."""
  rank = 0 if name == 'stem' else 1 if name.startswith('stage') else 3 if name == 'head' else 2
  return rank, name


def _row(stage: StageSummary) -> str:
  shape = 'x'.join(map(str, stage.output_shape or ()))
  return f'{stage.name:<12}{shape:>16}{stage.params:>14,}{stage.multiply_adds:>18,}'


def _products(jaxpr: core.Jaxpr, outer: str = '') -> Iterator[tuple[list[str], int]]:
  """The scope (as a path of submodules) and multiply-adds of each product in `jaxpr`."""
  for equation in jaxpr.eqns:
    scope = f'{outer}/{equation.source_info.name_stack}'
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      lhs = _shape(equation.invars[0])
      inner = math.prod(lhs[axis] for axis in contracted)
      yield scope.split('/'), math.prod(_shape(equation.outvars[0])) * inner
    elif equation.primitive.name == 'conv_general_dilated':
      kernel = _shape(equation.invars[1])
      out_axis = equation.params['dimension_numbers'].rhs_spec[0]
      taps = math.prod(kernel) // kernel[out_axis]
      yield scope.split('/'), math.prod(_shape(equation.outvars[0])) * taps
    params = equation.params
    # Of what is written for each platform, the last is what all others compute in their ways.
    by_platform = params.get('branches_platforms') is not None
    for value in [params['branches'][-1]] if by_platform else params.values():
      for inner_jaxpr in _sub_jaxprs(value):
        yield from _products(inner_jaxpr, scope)


def _shape(variable: Any) -> tuple[int, ...]:
  return tuple(variable.aval.shape)


def _sub_jaxprs(value: Any) -> Iterator[core.Jaxpr]:
  if isinstance(value, core.ClosedJaxpr):
    yield value.jaxpr
  elif isinstance(value, core.Jaxpr):
    yield value
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _sub_jaxprs(item)
