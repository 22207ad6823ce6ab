"""Pictures with boxes around their objects, as COCO and Pascal VOC store them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from cbam_jax.data.folder import SUFFIXES
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import UserError, first_line

# Paths that an error shows; a wrong folder has thousands.
SHOWN = 5

COCO_FORMAT = (
  '"images" with "id" and "file_name", "categories" with "id" and "name", and "annotations" with '
  '"image_id" and "category_id" among those, and "bbox", [left, top, width, height]'
)
VOC_FORMAT = (
  '<annotation> with an <object> for each object, in it <name> and <bndbox> with <xmin>, <ymin>, '
  '<xmax> and <ymax>, encoded in UTF-8, without a DOCTYPE'
)


@dataclasses.dataclass(frozen=True, eq=False)
class BoxedImage:
  """A picture and the boxes around its objects, of which there is at least one.

  Attributes:
    path: The picture's file.
    boxes: (k, 4) float64: left, top, right and bottom, in pixels of the stored picture.
    names: The class of each box.
  """

  path: Path
  boxes: np.ndarray
  names: tuple[str, ...]


def read_coco(annotations: str | Path, images: str | Path) -> list[BoxedImage]:
  """The pictures of a file in COCO's format, in its order.

  Boxes of crowds (`iscrowd`) are passed over, and pictures without any box.

  Args:
    annotations: The JSON file, such as instances_val2017.json.
    images: The folder that its file names start from.

  Raises:
    UserError: If the file is missing, damaged or in another format, if a box has no extent, or if
      pictures are missing.
  """
  file, folder = Path(annotations).expanduser(), Path(images).expanduser()
  objects: dict[Path, list[tuple[str, Sequence[float]]]] = collections.defaultdict(list)
  try:
    content = json.loads(file.read_bytes())
    files = {image['id']: folder / image['file_name'] for image in content['images']}
    names = {category['id']: str(category['name']) for category in content['categories']}
    for thing in content['annotations']:
      if not thing.get('iscrowd'):
        left, top, width, height = map(float, thing['bbox'])
        box = (left, top, left + width, top + height)
        objects[files[thing['image_id']]].append((names[thing['category_id']], box))
  except (
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise UserError(
      f'{file} cannot be read as COCO ({type(error).__name__}: {first_line(error)}); it has to be '
      f'JSON of {COCO_FORMAT}.'
    ) from error
  _check_all_there(file, folder, [path for path in objects if not path.is_file()])
  return [_boxed(path, things) for path, things in objects.items()]


def read_voc(annotations: str | Path, images: str | Path) -> list[BoxedImage]:
  """The pictures of a folder of XML files in Pascal VOC's format, sorted by the XML's path.

  ImageNet's localisation boxes have this format too. A picture has the name of its XML file, in the
  same place below `images` as that has below `annotations`, or, being the only one of this name,
  in any. VOC counts pixels from 1 and includes the last, which is undone here; where others count
  from 0 (ImageNet), the first row and column of a box are too many. Objects that are marked as
  difficult count like any other, and pictures without objects are passed over.

  Args:
    annotations: The folder of the XML files, which may lie in folders of it.
    images: The folder of the pictures, likewise.

  Raises:
    UserError: If a folder holds no XML file, if one is damaged, in another format or declares a
      document type, if a box has no extent, or if pictures are missing.
  """
  folder, root = Path(annotations).expanduser(), Path(images).expanduser()
  files = sorted(folder.rglob('*.xml'))
  if not files:
    raise UserError(f'{folder} holds no XML files; name the folder of the annotations.')
  pictures: dict[str, list[Path]] = collections.defaultdict(list)
  for path in sorted(root.rglob('*')):
    if path.suffix.lower() in SUFFIXES:
      pictures[path.stem].append(path)
  found, missing = [], []
  for file in files:
    if not (things := _voc_objects(file)):
      continue
    place = file.relative_to(folder).with_suffix('')
    same_name = pictures[file.stem]
    here = [path for path in same_name if path.relative_to(root).with_suffix('') == place]
    candidates = here or same_name
    if len(candidates) > 1:
      raise UserError(
        f'{file} may be about {" or ".join(map(str, candidates))}; lay the XML files out like the '
        'pictures, of which no two in a folder may differ in their suffix alone.'
      )
    if candidates:
      found.append(_boxed(candidates[0], things))
    else:
      missing.append(root / place)
  _check_all_there(folder, root, missing)
  return found


def through(
  preprocessing: Preprocessing, boxes: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Carries a picture's boxes to where its preprocessing takes what is in them.

  Args:
    preprocessing: What is done to the picture.
    boxes: (k, 4), in pixels of the picture.
    height: The picture's height.
    width: The picture's width.

  Returns:
    The boxes in pixels of the network's input, (j, 4), cut off where the crop ends and without
    those that lie outside; and whether each of `boxes` is among them, (k,).
  """
  size, side = preprocessing.image_size, preprocessing.resized_side
  h = w = size
  if side is not None:  # as in cbam_jax.data.transforms.centre_crop
    scale = side / min(height, width)
    h, w = max(side, int(height * scale)), max(side, int(width * scale))
  top, left = round((h - size) / 2), round((w - size) / 2)
  factors = np.array((w / width, h / height) * 2)
  moved = np.clip(boxes * factors - np.array((left, top) * 2), 0, size)
  kept = np.all(moved[:, 2:] > moved[:, :2], 1)
  return moved[kept], kept


def _voc_objects(file: Path) -> list[tuple[str, Sequence[float]]]:
  """Name and box of each object in an XML file."""
  try:
    text = file.read_text('utf-8-sig')
    if '<!DOCTYPE' in text or '<!ENTITY' in text:  # a few bytes of it can unfold to gigabytes
      raise ValueError('it declares a document type')
    root = ElementTree.fromstring(text)
    if root.tag != 'annotation':
      raise ValueError(f'it is about <{root.tag}>')
    return [(_text(thing, 'name'), _voc_box(thing)) for thing in root.iterfind('object')]
  except (OSError, ValueError, ElementTree.ParseError) as error:
    raise UserError(
      f'{file} cannot be read as VOC ({first_line(error)}); it has to be {VOC_FORMAT}.'
    ) from error


def _voc_box(thing: ElementTree.Element) -> tuple[float, float, float, float]:
  left, top, right, bottom = (
    float(_text(thing, f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax')
  )
  return max(0.0, left - 1), max(0.0, top - 1), right, bottom


def _text(thing: ElementTree.Element, path: str) -> str:
  text = (thing.findtext(path) or '').strip()
  if not text:
    raise ValueError(f'an <object> has no {path}')
  return text


def _boxed(path: Path, things: Sequence[tuple[str, Sequence[float]]]) -> BoxedImage:
  for name, (left, top, right, bottom) in things:
    box = (left, top, right, bottom)
    if not (all(map(math.isfinite, box)) and left < right and top < bottom):
      raise UserError(
        f'the box of {name!r} in {path} has no extent (left {left:g}, top {top:g}, right '
        f'{right:g}, bottom {bottom:g}); mend it or take it out of the annotations.'
      )
  return BoxedImage(path, np.array([box for _, box in things]), tuple(name for name, _ in things))


def _check_all_there(annotations: Path, folder: Path, missing: Sequence[Path]) -> None:
  """Raises `UserError` if any picture is missing."""
  if missing:
    shown = ', '.join(map(str, missing[:SHOWN])) + (', ...' if len(missing) > SHOWN else '')
    raise UserError(
      f'{annotations} has boxes for {len(missing)} pictures that are not in {folder}: {shown}. '
      'Name the folder that they are in.'
    )
