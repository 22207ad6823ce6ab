"""What a network makes of pictures: its classes, where it sees them, and its attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.errors import UserError, check_choice
from cbam_jax.explain.cams import eigen_cam, grad_cam, grad_cam_plus_plus
from cbam_jax.explain.maps import attention_maps
from cbam_jax.layers import compiler_options, in_parts

if TYPE_CHECKING:
  from cbam_jax.interop.pretrained import Pretrained

METHODS: dict[str, Callable[..., jax.Array]] = {
  'grad_cam': grad_cam,
  'grad_cam_plus_plus': grad_cam_plus_plus,
  'eigen_cam': eigen_cam,
}

BATCH_SIZE = 8


class ClassMap(NamedTuple):
  """Where a network sees a class.

  Attributes:
    name: Of the class; or 'no class' of a map of what stands out alone.
    probability: What the network gives it; None of no class.
    cam: The map, (h, w), not normalised.
  """

  name: str
  probability: float | None
  cam: np.ndarray

  @property
  def percent(self) -> str:
    """The probability as text, with a comma before it to follow the name."""
    return '' if self.probability is None else f', {self.probability:.1%}'


class AttentionMap(NamedTuple):
  """One attention's gates, between 0 and 1; None where it has none of the kind.

  Attributes:
    name: Its path in the network, such as 'stage1/block1'.
    spatial: Of each position, (h, w).
    channel: Of each channel, (C,).
  """

  name: str
  spatial: np.ndarray | None
  channel: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class View:
  """What one network makes of one picture.

  Attributes:
    network: What the network is called.
    top: Its most probable classes, name and probability.
    class_maps: Of the most probable class, and of another one if that was asked for.
    attention: Of every attention, in the order of the network.
  """

  network: str
  top: tuple[tuple[str, float], ...]
  class_maps: tuple[ClassMap, ...]
  attention: tuple[AttentionMap, ...]


def view(
  network: Pretrained,
  title: str,
  images: Sequence[np.ndarray],
  *,
  chosen: int | None = None,
  stage: str | None = None,
  method: str = 'grad_cam',
  top: int = 5,
) -> Iterator[View]:
  """What `network` makes of each of `images`.

  Args:
    network: The network.
    title: What to call it.
    images: What its preprocessing gives for the pictures, uint8 (H, W, C) each.
    chosen: A class to look for beside the most probable one; None for none.
    stage: At whose output the class maps are taken; None for the last stage.
    method: A name of `METHODS`.
    top: How many classes to tell the probabilities of.

  Raises:
    UserError: On an unknown stage, method or class.
  """
  check_choice('the method', method, METHODS)
  stage = stage or last_stage(network, images[0])
  classes = network.model.num_classes
  if chosen is not None and not 0 <= chosen < classes:
    raise UserError(f'the class is {chosen}; {title} has classes 0 to {classes - 1}.')

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def look(variables: Any, batch: jax.Array) -> dict[str, Any]:
    return in_parts(functools.partial(_look, network, stage, method, chosen, variables), batch)

  for start in range(0, len(images), BATCH_SIZE):
    some = images[start : start + BATCH_SIZE]
    size = BATCH_SIZE if len(images) > 1 else 1
    batch = np.stack([*some, *[np.zeros_like(some[0])] * (size - len(some))])
    seen = jax.device_get(look(network.variables, batch))
    for i in range(len(some)):
      yield _view(network, title, jax.tree.map(lambda a, i=i: a[i], seen), method, chosen, top)


def _look(
  network: Pretrained, stage: str, method: str, chosen: int | None, variables: Any, batch: jax.Array
) -> dict[str, Any]:
  """Probabilities (N, classes), maps of the classes, and gates of the attention."""
  model, images = network.model, network.preprocessing.normalize(batch)
  logits: Any = model.apply(variables, images, train=False)

  def cam(classes: jax.Array) -> jax.Array:
    if method == 'eigen_cam':  # which knows no classes
      return eigen_cam(model, variables, images, stage=stage)
    return METHODS[method](model, variables, images, classes, stage=stage)

  found = jnp.argmax(logits, -1)
  return {
    'probabilities': jax.nn.softmax(logits),
    'found': cam(found),
    'chosen': None if chosen is None else cam(jnp.full_like(found, chosen)),
    'attention': attention_maps(model, variables, images),
  }


def last_stage(network: Pretrained, image: np.ndarray) -> str:
  """The name of the network's last stage, for an image as its preprocessing gives it."""
  images = jax.ShapeDtypeStruct((1, *image.shape), jnp.float32)
  outputs: Any = jax.eval_shape(
    lambda v, x: network.model.apply(v, x, train=False, method='features'),
    network.variables,
    images,
  )
  return list(outputs)[-1]


def _view(
  network: Pretrained, title: str, seen: dict[str, Any], method: str, chosen: int | None, top: int
) -> View:
  probabilities = seen['probabilities']
  order = [int(index) for index in np.argsort(-probabilities, kind='stable')[:top]]

  def named(index: int) -> tuple[str, float]:
    return class_name(network, index), float(probabilities[index])

  name, probability = ('no class', None) if method == 'eigen_cam' else named(order[0])
  class_maps = [ClassMap(name, probability, seen['found'])]
  if chosen is not None and chosen != order[0]:
    class_maps.append(ClassMap(*named(chosen), seen['chosen']))
  attention = tuple(_attention(name, gates) for name, gates in seen['attention'].items())
  return View(title, tuple(named(index) for index in order), tuple(class_maps), attention)


def _attention(path: str, gates: dict[str, np.ndarray]) -> AttentionMap:
  name = path.removesuffix('/attention').removesuffix('/stage_attention')
  if 'joint' in gates:  # BAM's gate is of each channel at each position: shown are its means
    return AttentionMap(name, gates['joint'].mean(-1), gates['joint'].mean((0, 1)))
  return AttentionMap(name, gates.get('spatial'), gates.get('channel'))


def class_name(network: Pretrained, index: int) -> str:
  """The name of a class, or its number where the names are not known."""
  return f'class {index}' if network.classes is None else network.classes[index]
