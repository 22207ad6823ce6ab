"""Sources: the bundled digits, arrays, and prepared tensorflow-datasets sets."""

import importlib.resources.abc
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbam_jax.data import eval_batches, open_source, train_batches
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.sources import ArraySource, digits
from cbam_jax.data.transforms import train_transform
from cbam_jax.errors import MissingExtraError, UserError

# ---- the digits ------------------------------------------------------------------------------


def test_digits_have_the_documented_sizes_and_types():
  for split, size in (('train', 1437), ('test', 360)):
    source = digits(split)
    assert len(source) == size
    assert source.images.shape == (size, 8, 8, 1)
    assert source.images.dtype == np.uint8
    assert set(source.labels) == set(range(10))
    # The 17 grey levels reach from black to white.
    assert source.images.min() == 0
    assert source.images.max() == 255
    assert len(np.unique(source.images)) == 17


def test_digits_hold_out_a_fifth_of_each_class():
  train, test = (np.bincount(digits(split).labels) for split in ('train', 'test'))
  np.testing.assert_allclose(test, (train + test) / 5, atol=1)


def test_digits_are_split_the_same_at_every_call_and_without_overlap():
  from sklearn.datasets import load_digits

  train, test = digits('train'), digits('test')
  np.testing.assert_array_equal(digits('test').images, test.images)
  np.testing.assert_array_equal(digits('test').labels, test.labels)

  # Together they are every scan, as often as scikit-learn has it.
  scans, labels = load_digits(return_X_y=True)
  everything = np.column_stack([np.round(scans * (255 / 16)), labels]).astype(int)
  parts = [np.column_stack([s.images.reshape(-1, 64), s.labels]) for s in (train, test)]
  assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, everything))


def test_the_split_does_not_change_between_releases():
  # A comparison of two runs is worth something only on the same test set.
  assert digits('test').labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
  assert int(digits('test').images.astype(np.int64).sum()) == 1_790_819


# ---- arrays ----------------------------------------------------------------------------------


def test_array_source_gives_its_examples():
  images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
  source = ArraySource(images, np.array([7, 1], np.int64))
  assert len(source) == 2
  np.testing.assert_array_equal(source[1]['image'], images[1])
  assert source[1]['label'] == 1
  assert type(source[1]['label']) is int


@pytest.mark.parametrize(
  ('images', 'labels', 'named'),
  [
    (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int), 'float32 (2, 4, 4, 1)'),
    (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), 'uint8 (2, 4, 4)'),
    (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), 'labels (3,)'),
  ],
)
def test_array_source_refuses_other_arrays(images, labels, named):
  with pytest.raises(UserError, match=r'give uint8 images \(n, H, W, C\)') as error:
    ArraySource(images, labels)
  assert named in str(error.value)


# ---- names -----------------------------------------------------------------------------------


def test_unknown_split_and_name_are_refused():
  with pytest.raises(UserError, match=r"'validation'; allowed: train, test"):
    open_source('digits', 'validation')
  with pytest.raises(UserError, match=r"'imagenet2012'; allowed: 'digits', 'folder' for"):
    open_source('imagenet2012', 'train')


@pytest.mark.parametrize(
  ('package', 'name'), [('sklearn', 'digits'), ('tensorflow_datasets', 'tfds:mnist')]
)
def test_a_missing_package_names_its_extra(monkeypatch, package, name):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'cbam-jax\[train\]'"):
    open_source(name, 'train')


# ---- noise -----------------------------------------------------------------------------------


def test_synthetic_images_are_noise_of_any_size_the_same_at_every_call():
  train, test = (open_source('synthetic:6,3', split) for split in ('train', 'test'))
  assert (len(train), len(test), train.num_classes) == (1_281_167, 50_000, 3)
  records = [train[i] for i in range(300)]
  assert {record['label'] for record in records} == {0, 1, 2}
  for record in records:
    assert record['image'].shape == (6, 6, 3)
    assert record['image'].dtype == np.uint8
  assert len({record['image'].tobytes() for record in [*records, test[0], train[10**6]]}) == 302
  assert 120 < np.mean([record['image'] for record in records]) < 135
  np.testing.assert_array_equal(
    open_source('synthetic:6,3', 'train')[7]['image'], train[7]['image']
  )


def test_synthetic_images_are_as_large_as_imagenets_unless_told():
  source = open_source('synthetic', 'test')
  assert source[0]['image'].shape == (224, 224, 3)
  assert source.num_classes == 1000


@pytest.mark.parametrize('name', ['synthetic:0,10', 'synthetic:32,0'])
def test_synthetic_images_of_no_size_are_refused(name):
  with pytest.raises(UserError, match="give numbers of at least 1, as in 'synthetic:32,10'"):
    open_source(name, 'train')


@pytest.mark.parametrize('name', ['synthetic:32', 'synthetic:-1,10', 'synthetic:a,b'])
def test_synthetic_sizes_have_one_form(name):
  with pytest.raises(UserError, match=f"'{name}'; allowed: .*'synthetic:SIDE,CLASSES'"):
    open_source(name, 'train')


# ---- tensorflow-datasets ---------------------------------------------------------------------


def jpeg(level: int) -> io.BytesIO:
  """A grey picture 8 wide and 6 high."""
  file = io.BytesIO()
  Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(file, 'JPEG')
  file.seek(0)
  return file


def examples(name: str, size: int):
  """What the sets below are prepared from: image i is of level 10 i and has label i."""
  for i in range(size):
    if name == 'imagenet2012':
      yield str(i), {'image': jpeg(10 * i), 'label': i, 'file_name': f'{i}.JPEG'}
    else:
      yield str(i), {'text': 'An example without an image.', 'label': i % 2}


def prepare(name: str, folder: Path) -> None:
  """Prepares a miniature of `name`, as its own builder would if it had what it downloads."""
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=folder, file_format='array_record')
  sizes = {'train': 12, 'validation': 3}
  with pytest.MonkeyPatch.context() as patch:
    make = lambda self, downloads: {s: examples(name, n) for s, n in sizes.items()}  # noqa: E731
    patch.setattr(type(builder), '_split_generators', make)
    # The backport that tensorflow-datasets asks for, in an environment that does without it.
    patch.setitem(sys.modules, 'importlib_resources', importlib.resources)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory) -> str:
  """A folder that holds a miniature ImageNet."""
  pytest.importorskip('tensorflow_datasets')
  folder = tmp_path_factory.mktemp('tfds')
  prepare('imagenet2012', folder)
  return str(folder)


def test_tfds_gives_encoded_images_and_labels(prepared):
  train = open_source('tfds:imagenet2012', 'train', prepared)
  assert len(train) == 12
  assert sorted(train[i]['label'] for i in range(12)) == list(range(12))
  record = train[0]
  assert record['image'][:2] == b'\xff\xd8'  # a JPEG file, not yet decoded
  assert type(record['label']) is int
  assert 'tensorflow' not in sys.modules


def test_tfds_tests_on_the_validation_split(prepared):
  source = open_source('tfds:imagenet2012', 'test', prepared)
  assert sorted(source[i]['label'] for i in range(len(source))) == [0, 1, 2]


def test_tfds_takes_a_version(prepared):
  import tensorflow_datasets as tfds

  version = tfds.builder('imagenet2012', data_dir=prepared).version
  assert len(open_source(f'tfds:imagenet2012:{version}', 'train', prepared)) == 12


def test_tfds_reads_a_set_that_it_has_no_code_for(prepared, tmp_path):
  (info,) = Path(prepared).rglob('dataset_info.json')
  folder = tmp_path / 'own_pictures' / info.parent.name
  folder.mkdir(parents=True)
  for file in info.parent.iterdir():
    shutil.copy(file, folder / file.name.replace('imagenet2012', 'own_pictures'))
  own = folder / info.name
  own.write_text(own.read_text().replace('"imagenet2012"', '"own_pictures"'))
  source = open_source('tfds:own_pictures', 'train', str(tmp_path))
  assert sorted(source[i]['label'] for i in range(12)) == list(range(12))


def test_tfds_images_become_batches(prepared):
  source = open_source('tfds:imagenet2012', 'train', prepared)
  (batch,) = eval_batches(source, Preprocessing(image_size=4, resized_side=5), 12)
  assert batch['image'].shape == (12, 4, 4, 3)
  np.testing.assert_allclose(batch['image'].mean((1, 2, 3)), 10 * batch['label'], atol=1)


def test_tfds_is_read_by_other_processes(prepared):
  source = open_source('tfds:imagenet2012', 'train', prepared)
  transform = train_transform('crop_flip', size=4)
  steps = {'seed': 0, 'start_step': 1, 'stop_step': 4}
  here, there = (
    list(train_batches(source, transform, 4, workers=workers, **steps)) for workers in (0, 1)
  )
  assert len(here) == len(there) == 3
  for one, other in zip(here, there, strict=True):
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_tfds_refuses_an_unknown_set_without_looking_on_the_network(monkeypatch, tmp_path):
  import socket

  def refuse(*args, **kwargs):
    raise AssertionError('a connection was tried')

  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  with pytest.raises(UserError, match=r"no set 'imagnet2012'.*Did you mean 'imagenet2012' or"):
    open_source('tfds:imagnet2012', 'train', str(tmp_path))


@pytest.mark.parametrize('name', ['imagenet2012:99.0.0', 'imagenet2012/small'])
def test_tfds_refuses_an_unknown_version_or_variant(tmp_path, name):
  with pytest.raises(UserError, match=f"'{name}' is no version or variant of"):
    open_source(f'tfds:{name}', 'train', str(tmp_path))


def test_tfds_says_how_to_prepare_a_set(tmp_path):
  with pytest.raises(UserError, match='no train split prepared') as error:
    open_source('tfds:imagenet2012', 'train', str(tmp_path))
  for part in (str(tmp_path), 'cbam-jax prepare imagenet2012 --data-dir', '--config.data.dir'):
    assert part in str(error.value)


def test_tfds_says_that_a_set_is_prepared_in_another_format(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  (info,) = tmp_path.rglob('dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UserError, match='not as ArrayRecord') as error:
    open_source('tfds:imagenet2012', 'train', str(tmp_path))
  command = (
    f'tfds convert_format --dataset_version_dir={info.parent} --out_file_format=array_record'
  )
  assert str(error.value).splitlines()[-1] == command


def test_tfds_refuses_a_set_without_images(tmp_path):
  prepare('imdb_reviews', tmp_path)
  with pytest.raises(UserError, match='the examples of imdb_reviews have no image; choose a set'):
    open_source('tfds:imdb_reviews', 'train', str(tmp_path))
