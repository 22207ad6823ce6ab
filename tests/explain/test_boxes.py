import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbam_jax import UserError
from cbam_jax.data.boxes import read_coco, read_voc, through
from cbam_jax.data.preprocessing import Preprocessing


def picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', (64, 48)).save(path)
  return path


# ---- COCO --------------------------------------------------------------------------------------


def coco():
  """As instances_val2017.json, with what the reader has no use for."""
  return {
    'info': {'description': 'COCO 2017 Dataset'},
    'licenses': [],
    'images': [
      {'license': 4, 'file_name': '000000397133.jpg', 'height': 48, 'width': 64, 'id': 397133},
      {'license': 1, 'file_name': '000000037777.jpg', 'height': 48, 'width': 64, 'id': 37777},
      {'license': 1, 'file_name': 'crowd.jpg', 'height': 48, 'width': 64, 'id': 5},
      {'license': 1, 'file_name': 'bare.jpg', 'height': 48, 'width': 64, 'id': 6},
    ],
    'annotations': [
      annotation(37777, 44, [10.25, 5, 20.5, 30.0], id=82445, segmentation=[[1.0, 2.0]]),
      annotation(397133, 1, [0, 0, 64, 48], id=82446),
      annotation(37777, 1, [1, 2, 3, 4], id=82447),
      annotation(5, 1, [0, 0, 9, 9], id=9, iscrowd=1),
    ],
    'categories': [
      {'supercategory': 'person', 'id': 1, 'name': 'person'},
      {'supercategory': 'kitchen', 'id': 44, 'name': 'bottle'},
    ],
  }


def annotation(image, category, bbox, **more):
  return {'image_id': image, 'category_id': category, 'bbox': bbox, 'iscrowd': 0, **more}


@pytest.fixture
def coco_folder(tmp_path):
  for name in ('000000397133.jpg', '000000037777.jpg'):
    picture(tmp_path / 'val2017' / name)
  return tmp_path / 'val2017'


def stored(folder, content):
  file = folder.parent / 'instances.json'
  file.write_text(content if isinstance(content, str) else json.dumps(content))
  return file


def test_coco(coco_folder):
  first, second = read_coco(stored(coco_folder, coco()), str(coco_folder))
  assert first.path == coco_folder / '000000037777.jpg'
  assert first.names == ('bottle', 'person')
  assert first.boxes.dtype == np.float64
  np.testing.assert_array_equal(first.boxes, [[10.25, 5, 30.75, 35], [1, 2, 4, 6]])
  assert second.path == coco_folder / '000000397133.jpg'
  np.testing.assert_array_equal(second.boxes, [[0, 0, 64, 48]])


def changed(where, value):
  """The file with what stands at `where`, a list of keys, replaced, or taken out by None."""
  content = coco()
  *parents, last = where
  place = content
  for key in parents:
    place = place[key]
  if value is None:
    del place[last]
  else:
    place[last] = value
  return content


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    ('{"images": [', ['JSONDecodeError', '"file_name"', '[left, top, width, height]']),
    ('', ['JSONDecodeError']),
    ('[' * 100_000, ['RecursionError']),
    ('[]', ['TypeError']),
    (changed(['images'], None), ["'images'"]),
    (changed(['categories'], None), ["'categories'"]),
    (changed(['images', 0, 'file_name'], None), ["'file_name'"]),
    (changed(['images', 0, 'file_name'], 7), ['TypeError']),
    (changed(['annotations', 0, 'bbox'], None), ["'bbox'"]),
    (changed(['annotations', 0, 'bbox'], [1, 2, 3]), ['not enough values']),
    (changed(['annotations', 0, 'bbox'], [1, 2, 3, 'x']), ["'x'"]),
    (changed(['annotations', 0, 'bbox'], [1, 2, 3, 10**400]), ['OverflowError']),
    (changed(['annotations', 0, 'image_id'], 99), ['99']),
    (changed(['annotations', 0, 'category_id'], 99), ['99']),
    (changed(['annotations', 0, 'category_id'], []), ['unhashable']),
    (changed(['annotations'], ['x']), ['AttributeError']),
  ],
)
def test_damaged_coco_is_refused(coco_folder, content, parts):
  file = stored(coco_folder, content)
  with pytest.raises(UserError) as error:
    read_coco(file, coco_folder)
  for part in ('cannot be read as COCO', str(file), *parts):
    assert part in str(error.value)


def test_missing_coco_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'none\.json cannot be read as COCO \(FileNotFoundError'):
    read_coco(tmp_path / 'none.json', tmp_path)


@pytest.mark.parametrize('extent', [[0, 4], [3, 0], [-1, 4], [3, float('nan')], [float('inf'), 4]])
def test_coco_boxes_without_extent_are_refused(coco_folder, extent):
  file = stored(coco_folder, changed(['annotations', 0, 'bbox'], [5, 6, *extent]))
  with pytest.raises(UserError, match=r"'bottle' in .*37777\.jpg has no extent \(left 5, top 6"):
    read_coco(file, coco_folder)


def test_missing_pictures_are_named(coco_folder):
  (coco_folder / '000000037777.jpg').unlink()
  with pytest.raises(UserError, match=r'1 pictures that are not in .*val2017: .*000000037777\.jpg'):
    read_coco(stored(coco_folder, coco()), coco_folder)
  with pytest.raises(UserError, match='2 pictures'):
    read_coco(stored(coco_folder, coco()), coco_folder / 'none')


# ---- VOC ---------------------------------------------------------------------------------------

# As in VOC2007, where people have parts with boxes of their own.
VOC = """<annotation>
  <folder>VOC2007</folder>
  <filename>000001.jpg</filename>
  <size><width>64</width><height>48</height><depth>3</depth></size>
  <segmented>0</segmented>
  <object>
    <name>dog</name>
    <pose>Left</pose>
    <truncated>1</truncated>
    <difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>64</xmax><ymax>40</ymax></bndbox>
  </object>
  <object>
    <name>person</name>
    <difficult>1</difficult>
    <part><name>head</name>
      <bndbox><xmin>9</xmin><ymin>9</ymin><xmax>12</xmax><ymax>12</ymax></bndbox>
    </part>
    <bndbox><xmin>8.5</xmin><ymin>12</ymin><xmax>8.5</xmax><ymax>20</ymax></bndbox>
  </object>
</annotation>
"""

# As in ILSVRC: file names without a suffix, coordinates from 0.
IMAGENET = """<?xml version="1.0" encoding="UTF-8"?>
<annotation>
  <folder>n01440764</folder>
  <filename>n01440764_18</filename>
  <object>
    <name>n01440764</name>
    <bndbox><xmin>0</xmin><ymin>5</ymin><xmax>63</xmax><ymax>30</ymax></bndbox>
  </object>
</annotation>
"""


@pytest.fixture
def voc(tmp_path):
  """The folders of annotations and of pictures."""
  annotations, images = tmp_path / 'Annotations', tmp_path / 'JPEGImages'
  annotations.mkdir()
  picture(images / '000001.jpg')
  (annotations / '000001.xml').write_text(VOC)
  return annotations, images


def test_voc(voc):
  (record,) = read_voc(*voc)
  assert record.path == voc[1] / '000001.jpg'
  assert record.names == ('dog', 'person')
  np.testing.assert_array_equal(record.boxes, [[0, 1, 64, 40], [7.5, 11, 8.5, 20]])


def test_imagenet_with_folders_or_without(voc):
  annotations, images = voc
  for folder in ('n01440764', 'n02'):
    (annotations / folder).mkdir()
    (annotations / folder / 'a.b_18.xml').write_text(IMAGENET)
    picture(images / folder / 'a.b_18.JPEG')
  # Only below other folders than its annotation's.
  (annotations / 'ILSVRC2012_val_00000007.xml').write_text('\ufeff' + IMAGENET, 'utf-8')
  picture(images / 'n01440764' / 'ILSVRC2012_val_00000007.JPEG')
  found = {str(record.path.relative_to(images)): record for record in read_voc(*map(str, voc))}
  assert list(found) == [
    '000001.jpg',
    'n01440764/ILSVRC2012_val_00000007.JPEG',
    'n01440764/a.b_18.JPEG',
    'n02/a.b_18.JPEG',
  ]
  np.testing.assert_array_equal(found['n02/a.b_18.JPEG'].boxes, [[0, 4, 63, 30]])


def test_pictures_without_objects_are_passed_over(voc):
  (voc[0] / 'empty.xml').write_text('<annotation><filename>empty.jpg</filename></annotation>')
  assert [record.path.name for record in read_voc(*voc)] == ['000001.jpg']


LAUGHS = """<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


@pytest.mark.parametrize(
  ('content', 'parts'),
  [
    (VOC[:200], ['no element found']),
    ('', ['no element found']),
    ('<annotation>&dog;</annotation>', ['undefined entity']),
    (VOC.replace('annotation>', 'note>'), ['about <note>']),
    (VOC.replace('<name>dog</name>', ''), ['has no name']),
    (VOC.replace('<name>dog</name>', '<name> </name>'), ['has no name']),
    (VOC.replace('<xmax>64</xmax>', ''), ['has no bndbox/xmax']),
    (VOC.replace('<xmax>64', '<xmax>wide'), ["'wide'"]),
    (LAUGHS, ['document type', 'without a DOCTYPE']),
    (LAUGHS.encode('utf-16'), ['decode']),
    (VOC.encode('utf-16'), ['decode', 'UTF-8']),
  ],
)
def test_damaged_voc_is_refused(voc, content, parts):
  file = voc[0] / '000001.xml'
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError) as error:
    read_voc(*voc)
  for part in (f'{file} cannot be read as VOC', '<bndbox>', *parts):
    assert part in str(error.value)


def test_a_declared_encoding_hides_no_document_type(voc):
  # In EBCDIC, as its first line says it is, this is a document type; as UTF-8 it is no text.
  first = b'<?xml version="1.0" encoding="cp037"?>'
  (voc[0] / '000001.xml').write_bytes(first + LAUGHS.partition('?>')[2].encode('cp037'))
  with pytest.raises(UserError, match='cannot be read as VOC'):
    read_voc(*voc)


@pytest.mark.parametrize(('old', 'new'), [('<xmax>64', '<xmax>0'), ('<ymax>40', '<ymax>nan')])
def test_voc_boxes_without_extent_are_refused(voc, old, new):
  (voc[0] / '000001.xml').write_text(VOC.replace(old, new))
  with pytest.raises(UserError, match=r"'dog' in .*000001\.jpg has no extent \(left 0, top 1"):
    read_voc(*voc)


def test_missing_or_ambiguous_pictures_are_named(voc):
  annotations, images = voc
  picture(images / '000001.png')
  with pytest.raises(UserError, match=r'000001\.xml may be about .*000001\.jpg or .*000001\.png'):
    read_voc(*voc)
  for file in images.iterdir():
    file.unlink()
  with pytest.raises(UserError, match=r'1 pictures that are not in .*JPEGImages'):
    read_voc(*voc)
  with pytest.raises(UserError, match='no XML files'):
    read_voc(images, images)


# ---- through preprocessing ---------------------------------------------------------------------


def painted(preprocessing, box, height, width):
  """Where the preprocessing takes a box that is painted white on black: rows and columns."""
  left, top, right, bottom = box
  image = np.zeros((height, width, 3), np.uint8)
  image[top:bottom, left:right] = 255
  bright = preprocessing(image)[..., 0] > 127
  return [np.flatnonzero(bright.any(axis)) for axis in (1, 0)]


preprocessings = st.one_of(
  st.tuples(st.integers(8, 64), st.integers(0, 32)).map(lambda s: Preprocessing(s[0], sum(s))),
  st.integers(8, 64).map(lambda size: Preprocessing(size, None)),
)


@settings(max_examples=200)
@given(data=st.data(), preprocessing=preprocessings)
def test_a_painted_box_goes_where_its_box_does(data, preprocessing):
  height, width = (data.draw(st.integers(20, 90)) for _ in range(2))
  left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
  right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
  box = (left, top, right, bottom)
  moved, kept = through(preprocessing, np.array([box], float), height, width)
  seen = painted(preprocessing, box, height, width)
  assert kept.shape == (1,)
  if not kept[0]:
    # Antialiasing takes half of a pixel's light from its neighbours at the most.
    assert not all(len(pixels) > 1 for pixels in seen)
    return
  assert np.all((moved >= 0) & (moved <= preprocessing.image_size))
  # Where both sides are large enough that their ends do not blur into each other.
  if min(moved[0, 2:] - moved[0, :2]) > 3:
    rows, columns = seen
    ends = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(moved[0], ends, atol=1)


def test_through_by_hand():
  # 200 x 100 to 80 x 40, of which the crop has rows 28 to 52 and columns 8 to 32.
  preprocessing = Preprocessing(24, 40)
  boxes = np.array(
    [
      [0, 0, 100, 200],  # all of it
      [30, 80, 50, 100],  # inside: (12, 32, 20, 40) less (8, 28)
      [0, 0, 30, 80],  # partly: (0, 0, 12, 32)
      [0, 0, 100, 70],  # above: its bottom comes to 28
      [85, 0, 100, 200],  # to the right: its left comes to 34
    ],
    float,
  )
  moved, kept = through(preprocessing, boxes, 200, 100)
  np.testing.assert_array_equal(kept, [True, True, True, False, False])
  np.testing.assert_allclose(moved, [[0, 0, 24, 24], [4, 4, 12, 12], [0, 0, 4, 4]])
  # The whole picture to 24 x 24: columns by 0.24, rows by 0.12.
  moved, kept = through(Preprocessing(24, None), boxes[1:], 200, 100)
  assert kept.all()
  np.testing.assert_allclose(moved[0], [7.2, 9.6, 12, 12])
  np.testing.assert_allclose(moved[3], [20.4, 0, 24, 24])


def test_no_boxes_stay_none():
  moved, kept = through(Preprocessing(), np.zeros((0, 4)), 300, 400)
  assert moved.shape == (0, 4)
  assert kept.shape == (0,)
