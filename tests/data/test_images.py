"""Decoding: what files become, and that a crop decoded alone is the same as one cut out."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cbam_jax.data.images import decode, decode_box, image_size, resize_bilinear
from cbam_jax.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng


def encode(picture: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  picture.save(file, kind, **options)
  return file.getvalue()


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
  """Something with colours, edges and noise, of which JPEG keeps most."""
  rng = RNG(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
  smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
  noisy = smooth + rng.integers(-20, 21, smooth.shape)
  return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def with_pillow(data: bytes) -> np.ndarray:
  with Image.open(io.BytesIO(data)) as picture:
    return np.asarray(picture.convert('RGB'))


# ---- decoding --------------------------------------------------------------------------------


def test_pixels_are_left_alone():
  image = np.zeros((2, 2, 1), np.uint8)
  assert decode(image) is image


@pytest.mark.parametrize(
  ('mode', 'colour', 'kind', 'expected'),
  [
    ('RGB', (200, 100, 50), 'JPEG', (200, 100, 50)),
    ('L', 90, 'JPEG', (90, 90, 90)),
    ('CMYK', (0, 255, 255, 0), 'JPEG', (255, 0, 0)),
    ('RGB', (200, 100, 50), 'PNG', (200, 100, 50)),
    ('RGBA', (200, 100, 50, 10), 'PNG', (200, 100, 50)),  # the alpha is dropped, not blended
    ('LA', (90, 10), 'PNG', (90, 90, 90)),
    ('1', 1, 'PNG', (255, 255, 255)),
  ],
)
def test_files_become_rgb(mode, colour, kind, expected):
  image = decode(encode(Image.new(mode, (5, 3), colour), kind))
  assert image.shape == (3, 5, 3)
  assert image.dtype == np.uint8
  tolerance = 2 if kind == 'JPEG' else 0
  np.testing.assert_allclose(image, np.broadcast_to(expected, (3, 5, 3)), atol=tolerance)


@pytest.mark.parametrize('transparency', [None, 1, bytes([0, 128, 255])])
def test_palettes_become_rgb(transparency):
  palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
  picture = Image.new('P', (3, 1))
  picture.putpalette([level for colour in palette for level in colour])
  picture.putdata([2, 0, 1])
  options = {} if transparency is None else {'transparency': transparency}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    image = decode(encode(picture, 'PNG', **options))
  np.testing.assert_array_equal(image, [[palette[2], palette[0], palette[1]]])


def test_a_missing_pillow_names_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL.Image', None)
  with pytest.raises(MissingExtraError, match=r"pip install 'cbam-jax\[train\]'"):
    decode(b'')


JPEGS = {
  '4:2:0': {'subsampling': '4:2:0'},
  '4:2:2': {'subsampling': '4:2:2'},
  '4:4:4': {'subsampling': '4:4:4'},
  'progressive': {'progressive': True},
  'restart markers': {'restart_marker_blocks': 3},
  'optimised': {'optimize': True, 'quality': 30},
  'RGB': {'keep_rgb': True},
}


@pytest.fixture(params=[*JPEGS, 'grey', 'thumbnail', 'trailing bytes', 'strip'])
def jpeg(request) -> bytes:
  """A file of each kind that there is, 93 wide and 117 high."""
  picture = photo(117, 93)
  if request.param in JPEGS:
    return encode(picture, 'JPEG', **JPEGS[request.param])
  if request.param == 'grey':
    return encode(picture.convert('L'), 'JPEG')
  if request.param == 'trailing bytes':
    return encode(picture, 'JPEG') + b'\0\0'
  if request.param == 'strip':
    return encode(photo(117, 3), 'JPEG')
  # A camera's preview is a JPEG file of its own within the first segments.
  preview = encode(picture.resize((16, 16)), 'JPEG')
  return encode(picture, 'JPEG', exif=b'Exif\0\0' + preview)


def test_a_jpeg_is_what_pillow_makes_of_it(jpeg):
  expected = with_pillow(jpeg)
  assert image_size(jpeg) == expected.shape[:2]
  np.testing.assert_array_equal(decode(jpeg), expected)


def test_a_box_is_what_would_be_cut_out_of_the_whole(jpeg):
  whole, rng = with_pillow(jpeg), RNG(0)
  height, width, _ = whole.shape
  for bottom in range(1, height + 1, 5):
    top = int(rng.integers(bottom))
    left = int(rng.integers(width))
    right = int(rng.integers(left, width)) + 1
    box = decode_box(jpeg, (left, top, right, bottom), least=100)
    np.testing.assert_array_equal(box, whole[top:bottom, left:right])


@pytest.mark.parametrize(('least', 'shrink'), [(70, 1), (40, 2), (20, 4), (9, 8), (1, 8)])
def test_a_box_is_halved_as_often_as_its_least_side_allows(least, shrink):
  data = encode(photo(160, 240), 'JPEG', quality=95)
  box = (16, 8, 16 + 96, 8 + 80)
  for image in (data, decode(data)):
    pixels = decode_box(image, box, least)
    assert pixels.shape == (80 // shrink, 96 // shrink, 3)
    # Means over squares, which a JPEG's transform only comes near to.
    cut = decode(data)[8:88, 16:112].astype(float)
    means = cut.reshape(80 // shrink, shrink, 96 // shrink, shrink, 3).mean((1, 3))
    if image is data:
      assert abs(pixels - means).mean() < 3
    else:
      np.testing.assert_allclose(pixels, means, atol=0.5)


@given(st.integers(0, 3), st.data())
def test_a_halved_box_does_not_depend_on_what_is_not_decoded(power, data):
  jpeg = encode(photo(61, 47, seed=3), 'JPEG', subsampling='4:2:0')
  shrink = 2**power
  bottom = data.draw(st.integers(shrink, 61))
  whole = decode_box(jpeg, (0, 0, 47, 61), 47 // shrink)
  part = decode_box(jpeg, (0, 0, 47, bottom), min(47, bottom) // shrink)
  if part.shape[1] == whole.shape[1]:  # halved alike
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_the_rows_below_a_box_may_be_missing_or_damaged():
  data = encode(photo(200, 160), 'JPEG')
  whole = with_pillow(data)
  damaged = data[: len(data) // 2] + b'\xff\xd9'
  np.testing.assert_array_equal(decode_box(damaged, (10, 0, 100, 40), 100), whole[:40, 10:100])


@given(st.data())
def test_damaged_bytes_are_judged_as_pillow_judges_them(data):
  file = bytearray(encode(photo(33, 41, seed=1), 'JPEG'))
  for _ in range(data.draw(st.integers(1, 4))):
    file[data.draw(st.integers(2, len(file) - 1))] = data.draw(st.integers(0, 255))
  results = []
  for decoder in (decode, with_pillow):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      try:
        results.append(decoder(bytes(file)).tobytes())
      except Exception:
        results.append(None)
  assert results[0] == results[1]


def test_a_truncated_file_is_an_error():
  data = encode(photo(100, 100), 'JPEG')
  with pytest.raises(OSError, match='truncated'):
    decode(data[:-500])
  with pytest.raises(OSError, match='truncated'):
    decode_box(data[:-500], (0, 0, 10, 10), 10)


# ---- bombs -----------------------------------------------------------------------------------


def claiming(height: int, width: int, kind: str) -> bytes:
  """A file of a few hundred bytes that claims a size."""
  data = bytearray(encode(Image.new('RGB', (8, 8)), kind))
  if kind == 'JPEG':
    at = data.index(b'\xff\xc0') + 5
    data[at : at + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
  else:
    import zlib

    data[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
  return bytes(data)


@pytest.mark.parametrize('filters', ['error', 'ignore'])
@pytest.mark.parametrize(
  ('kind', 'height', 'width'),
  [('JPEG', 65500, 65500), ('JPEG', 8193, 8192), ('PNG', 100_000, 100_000), ('PNG', 8193, 8192)],
)
def test_a_file_that_claims_too_many_pixels_is_refused(kind, height, width, filters):
  bomb = claiming(height, width, kind)
  for read in (decode, image_size, lambda image: decode_box(image, (0, 0, 8, 8), 8)):
    with warnings.catch_warnings():
      warnings.simplefilter(filters)
      with pytest.raises(Exception, match=r'claims|exceeds limit'):
        read(bomb)


def test_a_bomb_takes_no_memory():
  code = """
import resource
from cbam_jax.data.images import decode, decode_box
from tests.data.test_images import claiming
decode(claiming(8, 8, 'JPEG')), decode(claiming(8, 8, 'PNG'))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in (claiming(65500, 65500, 'JPEG'), claiming(100_000, 100_000, 'PNG')):
  for read in (decode, lambda image: decode_box(image, (0, 0, 60_000, 60_000), 224)):
    try:
      read(bomb)
    except Exception as error:
      assert 'pixels' in str(error)
    else:
      raise SystemExit('decoded')
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes
raise SystemExit(grown > 20_000 and grown)
"""
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# ---- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('image', 'named'),
  [
    (np.zeros((4, 4), np.uint8), 'uint8 (4, 4)'),
    (np.zeros((4, 4, 3), np.float32), 'float32 (4, 4, 3)'),
    (np.zeros((0, 4, 3), np.uint8), 'uint8 (0, 4, 3)'),
  ],
)
def test_pixels_of_another_kind_are_refused(image, named):
  for read in (decode, image_size):
    with pytest.raises(ValueError, match='rather than uint8') as error:
      read(image)
    assert named in str(error.value)


def test_resizing_by_hand():
  image = np.array([0, 40, 80, 120], np.uint8).reshape(1, 4, 1)
  # Centres of two pixels in place of four lie between each pair.
  np.testing.assert_array_equal(resize_bilinear(image, 1, 2).ravel(), [20, 100])
  # Eight in place of four lie a quarter to either side, the outermost beyond the last centre.
  expected = [0, 10, 30, 50, 70, 90, 110, 120]
  np.testing.assert_array_equal(resize_bilinear(image, 1, 8).ravel(), expected)


SUMS = """
import hashlib
import numpy as np
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.transforms import train_transform
from tests.data.test_images import encode, photo
digest = hashlib.sha256()
for seed in range(20):
  data = encode(photo(97 + 31 * seed, 130 + 17 * seed, seed), 'JPEG')
  for transform in (train_transform('crop_flip', 96), Preprocessing(96, 110)):
    digest.update(transform(data, np.random.default_rng(seed)).tobytes())
print(digest.hexdigest())
"""


def test_a_processor_without_vector_instructions_gives_the_same_bits():
  plain = {
    'JSIMD_FORCENONE': '1',
    'OPENCV_IPP': 'disabled',
    'OPENCV_CPU_DISABLE': 'SSE4.1,SSE4.2,AVX,FP16,AVX2,FMA3,AVX512-SKX',
  }
  sums = [
    subprocess.run(
      [sys.executable, '-c', SUMS],
      cwd=ROOT,
      env=os.environ | variables,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for variables in ({}, plain)
  ]
  assert sums[0] == sums[1] != ''
