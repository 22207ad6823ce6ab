"""Odd and damaged images through the whole loader, and records of any bytes."""

import logging
import re
import resource
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbam_jax.data import eval_batches, open_source, train_batches
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.transforms import AUGMENTATIONS, train_transform
from cbam_jax.errors import RunError, UserError
from tests.data.test_images import claiming, encode, photo

# To start a worker takes seconds, of which most is the import of JAX.
WORKERS = [0, pytest.param(1, marks=pytest.mark.slow)]
CROPPED = train_transform('crop_flip', 8)
ODD = {
  'grey': encode(photo(20, 30).convert('L'), 'JPEG'),
  'cmyk': encode(photo(20, 30).convert('CMYK'), 'JPEG'),
  'pixel': encode(Image.new('RGB', (1, 1), (9, 90, 200)), 'JPEG'),
  'png': encode(photo(20, 30), 'PNG'),
  'progressive': encode(photo(20, 30), 'JPEG', progressive=True),
}
DAMAGED = {
  'truncated': encode(photo(20, 30), 'JPEG')[:-40],
  'half a png': encode(photo(20, 30), 'PNG')[:200],
  'text': b'<html>404</html>',
  'empty': b'',
  'jpeg bomb': claiming(65_500, 65_500, 'JPEG'),
  'png bomb': claiming(100_000, 100_000, 'PNG'),
}


class Records:
  """Records in memory, labelled by their place."""

  def __init__(self, images):
    self.images = list(images)
    self.num_classes = len(self.images)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    return {'image': self.images[index], 'label': index}


def train(source, batch_size=4, stop=6, **options):
  return train_batches(source, CROPPED, batch_size, seed=0, start_step=0, stop_step=stop, **options)


# ---- odd images ------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', WORKERS)
def test_odd_images_are_read(workers, caplog):
  source = Records(ODD.values())
  for batches in (
    train(source, len(ODD), stop=2, workers=workers),
    eval_batches(source, Preprocessing(8, 10), len(ODD), workers=workers),
  ):
    for batch in batches:
      assert batch['image'].shape == (len(ODD), 8, 8, 3)
      assert sorted(batch['label']) == list(range(len(ODD)))
      pixel = batch['image'][batch['label'].tolist().index(list(ODD).index('pixel'))]
      np.testing.assert_allclose(pixel.reshape(-1, 3), np.tile([9, 90, 200], (64, 1)), atol=4)
    assert batches.bad_images == 0
  assert not caplog.records


@pytest.mark.parametrize('workers', WORKERS)
def test_images_of_several_sizes_that_nothing_crops_are_refused(workers):
  source = Records([encode(photo(20, 30), 'JPEG'), encode(photo(21, 30), 'JPEG')])
  steps = {'seed': 0, 'start_step': 0, 'stop_step': 1}
  with pytest.raises(UserError, match=r'is an image of 2[01]x30x3 in a batch of 2[01]x30x3'):
    list(train_batches(source, train_transform('none', 8), 2, **steps, workers=workers))


# ---- damaged images --------------------------------------------------------------------------


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_image_is_named_counted_and_replaced_by_the_next(kind, caplog):
  images = [encode(photo(20, 30, seed), 'JPEG') for seed in range(4)]
  images[1] = DAMAGED[kind]
  source = Records(images)
  batches = train(source, bad_share=1, stop=3)
  with caplog.at_level(logging.WARNING):
    labels = [sorted(batch['label'].tolist()) for batch in batches]
  assert labels == [[0, 2, 2, 3]] * 3
  assert batches.bad_images == 3
  assert caplog.messages == ['image number 1 cannot be read; another takes its place'] * 3


@pytest.mark.parametrize('workers', [*WORKERS, pytest.param(2, marks=pytest.mark.slow)])
def test_a_replacement_depends_on_the_seed_and_the_step_alone(workers):
  images = [encode(photo(20, 30, seed), 'JPEG') for seed in range(12)]
  for bad in (2, 3, 11):  # two in a row, and the last, whose next is the first
    images[bad] = DAMAGED['truncated']
  runs = [list(train(Records(images), bad_share=1, workers=n)) for n in (0, workers)]
  later = train_batches(Records(images), CROPPED, 4, seed=0, start_step=2, stop_step=6, bad_share=1)
  runs.append([*runs[0][:2], *later])
  for run in runs[1:]:
    for one, other in zip(runs[0], run, strict=True):
      for key in one:
        np.testing.assert_array_equal(one[key], other[key])
  labels = np.concatenate([batch['label'] for batch in runs[0]])
  assert np.bincount(labels, minlength=12).tolist() == [4, 2, 0, 0, 6, *[2] * 6, 0]


def test_an_evaluation_leaves_damaged_images_out():
  images = [encode(photo(20, 30, seed), 'JPEG') for seed in range(5)]
  images[1] = images[4] = DAMAGED['text']
  batches = eval_batches(Records(images), Preprocessing(8, 10), 3, bad_share=1)
  counted = [batch['label'][batch['mask']].tolist() for batch in batches]
  assert counted == [[0, 2], [3]]
  assert batches.bad_images == 2


@pytest.mark.parametrize('workers', WORKERS)
def test_too_many_damaged_images_stop_the_run(workers):
  images = [encode(photo(20, 30, seed), 'JPEG') for seed in range(10)]
  images[3] = DAMAGED['empty']
  assert len(list(train(Records(images), 5, stop=2, bad_share=0.1, workers=workers))) == 2
  with pytest.raises(RunError, match=r'1 of \d+ images.*more than the allowed share of 9.00%'):
    list(train(Records(images), 5, stop=2, bad_share=0.09, workers=workers))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_set_of_damaged_images_stops_the_run(workers):
  with pytest.raises(RunError, match=r'100 images in a row from number .*check the data set'):
    list(train(Records([DAMAGED['truncated']] * 150), bad_share=1, workers=workers))


def test_a_file_that_is_gone_is_named(tmp_path, caplog):
  for number in range(4):
    file = tmp_path / 'train' / 'class' / f'{number}.jpg'
    file.parent.mkdir(parents=True, exist_ok=True)
    photo(20, 30, number).save(file)
  source = open_source('folder', 'train', str(tmp_path))
  file.unlink()
  with caplog.at_level(logging.WARNING):
    (batch,) = train(source, stop=1, bad_share=1)
  assert batch['image'].shape == (4, 8, 8, 3)
  assert caplog.messages == [f'image {file} cannot be read; another takes its place']


# ---- anything at all -------------------------------------------------------------------------

WHOLE = [*ODD.values(), encode(photo(40, 25), 'JPEG'), encode(photo(9, 9), 'WEBP')]
truncated = st.sampled_from(WHOLE).flatmap(
  lambda data: st.integers(0, len(data)).map(lambda end: data[:end])
)
arrays = st.builds(
  lambda shape, dtype: np.zeros(shape, dtype),
  st.lists(st.integers(0, 9), max_size=4),
  st.sampled_from([np.uint8, np.uint8, np.uint8, np.float32, np.int64, np.bool_]),
)


@settings(max_examples=60)
@given(
  st.lists(st.one_of(st.binary(max_size=300), truncated, arrays), min_size=2, max_size=6),
  st.sampled_from([*AUGMENTATIONS, 'eval', 'eval alone']),
  st.sampled_from([0.0, 1.0]),
)
def test_any_records_give_batches_or_this_projects_errors(images, name, bad_share):
  source = Records(images)
  steps = {'seed': 0, 'start_step': 0, 'stop_step': 2}
  if name in AUGMENTATIONS:
    batches = train_batches(source, train_transform(name, 6), 2, **steps, bad_share=bad_share)
  else:
    transform = Preprocessing(6, 7 if name == 'eval' else None)
    batches = eval_batches(source, transform, 2, bad_share=bad_share)
  # What each message says to do.
  remedies = 'mend the data set|check the data set|make them the same, or set data.augmentation'
  try:
    for batch in batches:
      np.testing.assert_equal((batch['image'].dtype, batch['image'].ndim), (np.uint8, 4))
  except (UserError, RunError) as raised:
    if not re.search(remedies, str(raised)):
      raise


# ---- the same whatever reads it --------------------------------------------------------------


@pytest.mark.parametrize('workers', [*WORKERS, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('count', [1, 2, 4])
def test_jpegs_are_the_same_whatever_number_of_workers_and_processes_reads_them(
  monkeypatch, count, workers
):
  source = Records([encode(photo(50 + seed, 70, seed), 'JPEG') for seed in range(9)])
  whole = list(train(source, stop=5))
  shares = []
  for index in range(count):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    monkeypatch.setattr(jax, 'process_count', lambda: count)
    shares.append(list(train(source, stop=5, workers=workers)))
  for expected, parts in zip(whole, zip(*shares, strict=True), strict=True):
    for key, array in expected.items():
      np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), array)


def grown_megabytes(source, batches: int, workers: int) -> float:
  """By how much memory grows from a tenth of the batches on to the last."""

  def used() -> float:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * resource.getpagesize() / 2**20

  before = 0.0
  for step, _ in enumerate(train(source, 8, stop=batches, workers=workers, bad_share=1)):
    if step == batches // 10:
      before = used()
  return used() - before


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize(
  ('batches', 'workers'),
  [
    (1000, 0),
    pytest.param(10_000, 0, marks=pytest.mark.slow),
    pytest.param(10_000, 2, marks=pytest.mark.slow),
  ],
)
def test_memory_does_not_grow(batches, workers):
  images = [encode(photo(40, 60, seed), 'JPEG') for seed in range(63)]
  source = Records([*images, DAMAGED['truncated']])  # failures must leave nothing behind either
  assert grown_megabytes(source, batches, workers) < 8
