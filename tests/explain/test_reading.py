import numpy as np
import pytest
from PIL import Image

from cbam_jax import UserError
from cbam_jax.data.boxes import BoxedImage
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.explain.reading import read_picture
from cbam_jax.explain.scoring import score_networks
from tests.cli.trained import network

PREPROCESSING = Preprocessing(32, 36)


@pytest.fixture
def file(tmp_path):
  Image.new('RGB', (50, 40), 'red').save(tmp_path / 'red.png')
  return tmp_path / 'red.png'


def wrong(pixels):
  raise TypeError(f'wrong with {pixels.shape}')


def test_a_picture_is_what_the_network_sees(file):
  picture = read_picture(file, PREPROCESSING)
  assert (picture.path, picture.size, picture.error) == (file, (40, 50), '')
  np.testing.assert_array_equal(picture.seen, np.full((32, 32, 3), (255, 0, 0), np.uint8))


def test_what_the_file_causes_is_told_of_the_file(tmp_path):
  Image.new('L', (60_000, 1)).save(tmp_path / 'strip.png')
  (tmp_path / 'text.png').write_text('none')
  strip, text, missing = (
    read_picture(tmp_path / name, Preprocessing()) for name in ('strip.png', 'text.png', 'no.png')
  )
  assert '1 x 60000 pixels' in strip.error
  assert text.error == 'it is no picture of a known kind'
  assert 'No such file' in missing.error
  assert strip.seen is text.seen is missing.seen is None


def test_wrong_preprocessing_is_not_told_of_the_file(file):
  with pytest.raises(TypeError, match=r'wrong with \(40, 50, 3\)'):
    read_picture(file, wrong)
  boxed = BoxedImage(file, np.array([[0.0, 0, 9, 9]]), ('cat',))
  with pytest.raises(TypeError, match='wrong with'):
    score_networks([network()._replace(preprocessing=wrong)], [boxed])


def test_a_damaged_picture_is_passed_over(file, caplog):
  file.write_text('none')
  boxed = BoxedImage(file, np.array([[0.0, 0, 9, 9]]), ('cat',))
  with pytest.raises(UserError, match='no box lies in'):
    score_networks([network()], [boxed])
  assert caplog.messages == [f'{file} cannot be read: it is no picture of a known kind']
