"""What is done to a picture before a network sees it."""

import io
import json

import numpy as np
import PIL.Image
import pytest

from cbam_jax import UserError
from cbam_jax.data.preprocessing import Preprocessing

RNG = np.random.default_rng


def picture(height=30, width=40, channels=3):
  return RNG(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(pixels):
  buffer = io.BytesIO()
  PIL.Image.fromarray(pixels.squeeze()).save(buffer, 'PNG')
  return buffer.getvalue()


def test_interpolations_differ():
  bilinear, bicubic = (Preprocessing(16, 20, name)(picture()) for name in ('bilinear', 'bicubic'))
  assert np.any(bilinear != bicubic)


def test_resize_and_crop_as_pillow_does_them():
  seen = Preprocessing(16, 20, 'bicubic')(png(picture()))
  whole = PIL.Image.fromarray(picture()).resize((26, 20), PIL.Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(seen, np.asarray(whole)[2:18, 5:21])


def test_without_a_resized_side_the_whole_picture_is_resized():
  seen = Preprocessing(16, None)(picture())
  whole = PIL.Image.fromarray(picture()).resize((16, 16), PIL.Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(seen, np.asarray(whole))
  assert Preprocessing(30, None)(picture(30, 30)) is not None
  np.testing.assert_array_equal(Preprocessing(30, None)(picture(30, 30)), picture(30, 30))


def test_channels_follow_the_network():
  grey = Preprocessing(30, None, mean=(0.5,), std=(0.5,))
  colour = Preprocessing(30, None)
  # White, and green by ITU-R 601: 0.587 of 255.
  assert grey(np.full((30, 30, 3), 255, np.uint8))[0, 0] == 255
  assert grey(np.full((30, 30, 3), (0, 255, 0), np.uint8))[0, 0] == 150
  assert grey(png(picture(30, 30))).shape == (30, 30, 1)
  spread = colour(picture(30, 30, 1))
  np.testing.assert_array_equal(spread, np.repeat(picture(30, 30, 1), 3, -1))


def test_normalize_by_hand():
  images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
  preprocessing = Preprocessing(1, None, mean=(0.5, 0.25, 0.2), std=(0.5, 0.25, 0.1))
  normalized = preprocessing.normalize(images)
  assert normalized.dtype == np.float32
  np.testing.assert_allclose(normalized[0, 0, 0], [-1, 3, 0], atol=1e-6)
  np.testing.assert_array_equal(preprocessing.normalize(images[0]), normalized[0])


def test_a_long_strip_is_refused_before_it_fills_the_memory():
  strip = np.zeros((4, 16_000, 3), np.uint8)
  with pytest.raises(ValueError, match='4 x 16000 pixels come to 256 x 1024000'):
    Preprocessing()(strip)


def test_json_keeps_it():
  preprocessing = Preprocessing(10, None, 'bicubic', (0.1,), (0.2,))
  kept = Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict())))
  assert kept == preprocessing


def test_it_reads_as_a_line():
  assert str(Preprocessing()) == (
    'shorter side to 256 (bilinear), centre 224x224, mean (0.485, 0.456, 0.406), '
    'std (0.229, 0.224, 0.225)'
  )
  assert str(Preprocessing(8, None, mean=(0.3,), std=(0.37,))) == (
    '8x8, bilinear, mean (0.3), std (0.37)'
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'image_size': 0}, 'a crop of 0 pixels'),
    ({'image_size': 300}, 'a crop of 300 pixels from a side of 256'),
    ({'resized_side': 0}, 'from a side of 0'),
    ({'image_size': 28.5}, 'must be whole numbers'),
    ({'interpolation': 'nearest'}, "the interpolation is 'nearest'; allowed: bilinear, bicubic"),
    ({'mean': (0.5,)}, 'give one number each for grey images, or three'),
    ({'std': (1, 0, 1)}, 'std not 0'),
    ({'mean': (float('nan'),) * 3}, 'must be finite'),
    ({'size': 3}, 'its fields are image_size, resized_side'),
    ({'image_size': 'big'}, 'a crop of big pixels'),
    ({'mean': 3}, 'mean'),
    ({'mean': ('a', 'b', 'c')}, 'mean'),
  ],
)
def test_what_cannot_be_done_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    Preprocessing.from_dict(fields)


def test_no_preprocessing_at_all():
  with pytest.raises(UserError, match='the preprocessing is None'):
    Preprocessing.from_dict(None)
