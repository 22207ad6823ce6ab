"""Networks scored on pictures with boxes: do their class maps lie where the objects are?"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cbam_jax.data.boxes import BoxedImage, through
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError, check_choice
from cbam_jax.explain.reading import read_picture, shown
from cbam_jax.explain.score import TOLERANCE, Score, score
from cbam_jax.explain.views import BATCH_SIZE, METHODS, last_stage
from cbam_jax.layers import compiler_options, in_parts

if TYPE_CHECKING:
  from cbam_jax.interop.pretrained import Pretrained

logger = logging.getLogger(__name__)


class _Object(NamedTuple):
  """What one map is scored on: an image, the boxes in it, and the number of their class."""

  image: np.ndarray
  boxes: np.ndarray
  label: int


def score_networks(
  networks: Sequence[Pretrained],
  boxed: Sequence[BoxedImage],
  *,
  stage: str | None = None,
  method: str = 'grad_cam',
  tolerance: float = TOLERANCE,
) -> list[list[Score]]:
  """The scores of each network, of the same maps in the same order.

  There is a map for each picture and each class of its boxes that the networks know by name; if
  they know none at all, one for each picture, of the class that each finds most probable. What the
  central crop leaves out does not count, and a picture that cannot be read is named in the log.

  Args:
    networks: They must take the same of a picture and have the same classes.
    boxed: The pictures.
    stage: At whose output the class maps are taken; None for the last stage.
    method: A name of `views.METHODS`.
    tolerance: Pixels that a maximum may miss a box by.

  Raises:
    UserError: If the networks differ, on an unknown method, or if there is nothing to score.
  """
  check_choice('the method', method, METHODS)
  first = networks[0]
  if any(n[2:] != first[2:] for n in networks[1:]):
    raise UserError(
      'the networks differ in their classes or in what they take of a picture; give them the same, '
      'with --class-names, --image-size and the like.'
    )
  known = {name: label for label, name in enumerate(first.classes or ())}
  named = any(name in known for picture in boxed for name in picture.names)
  scores: list[list[Score]] = [[] for _ in networks]
  looks: list[Any] = []
  batch: list[_Object] = []

  def flush() -> None:
    if not looks:
      looks.extend(_compiled(n, stage or last_stage(n, batch[0].image), method) for n in networks)
    filled = batch + [batch[0]] * (BATCH_SIZE - len(batch))
    images = np.stack([entry.image for entry in filled])
    labels = np.array([entry.label for entry in filled])
    for look, network, own in zip(looks, networks, scores, strict=True):
      cams = np.asarray(look(network.variables, images, labels), np.float64)
      own += [
        score(cam, entry.boxes, entry.image.shape[:2], tolerance)
        for cam, entry in zip(cams, batch, strict=False)
      ]
    batch.clear()

  for entry in _objects(boxed, first.preprocessing, known if named else None):
    batch.append(entry)
    if len(batch) == BATCH_SIZE:
      flush()
  if batch:
    flush()
  if not scores[0]:
    raise UserError('no box lies in what the networks see of a readable picture; check the boxes.')
  return scores


def _objects(
  boxed: Sequence[BoxedImage], preprocessing: Preprocessing, known: dict[str, int] | None
) -> Iterator[_Object]:
  """What is to be scored; without `known` names, all boxes of a picture together, of class -1."""
  for picture in boxed:
    _, size, image, error = read_picture(picture.path, preprocessing)
    if image is None:
      logger.warning('%s cannot be read: %s', shown(picture.path), error)
      continue
    names = np.array(picture.names)
    for name in sorted(set(picture.names)) if known is not None else ('',):
      if known is not None and name not in known:
        continue
      own = picture.boxes if known is None else picture.boxes[names == name]
      boxes, _ = through(preprocessing, own, *size)
      if len(boxes):
        yield _Object(image, boxes, -1 if known is None else known[name])


def _compiled(network: Pretrained, stage: str, method: str) -> Any:
  """From variables, uint8 images and labels to class maps; at -1, of the likeliest class."""

  def look(variables: Any, batch: jax.Array, labels: jax.Array) -> jax.Array:
    images = network.preprocessing.normalize(batch)
    if method == 'eigen_cam':  # which knows no classes
      return METHODS[method](network.model, variables, images, stage=stage)
    logits: Any = network.model.apply(variables, images, train=False)
    classes = jnp.where(labels < 0, jnp.argmax(logits, -1), labels)
    return METHODS[method](network.model, variables, images, classes, stage=stage)

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def look_at_all(variables: Any, batch: jax.Array, labels: jax.Array) -> jax.Array:
    return in_parts(functools.partial(look, variables), batch, labels)

  return look_at_all
