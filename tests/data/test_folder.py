"""A folder of classes of pictures."""

import os

import pytest

from cbam_jax.data.folder import FolderSource
from cbam_jax.errors import UserError


def lay_out(root, *names):
  for name in names:
    (root / name).mkdir(parents=True)
    (root / name / 'a.jpg').touch()


def test_labels_are_the_places_of_the_trained_classes(tmp_path):
  lay_out(tmp_path, 'train/cat', 'train/dog', 'train/newt', 'val/newt')
  source = FolderSource(tmp_path, 'test')
  assert source.classes == ['cat', 'dog', 'newt']
  assert [source[i]['label'] for i in range(len(source))] == [2]


def test_test_pictures_alone_can_be_evaluated(tmp_path):
  lay_out(tmp_path, 'val/cat', 'val/dog')
  source = FolderSource(tmp_path, 'test')
  assert source.classes == ['cat', 'dog']
  with pytest.raises(UserError, match="has no folder 'train'"):
    FolderSource(tmp_path, 'train')


def test_a_class_that_was_not_trained_is_refused(tmp_path):
  lay_out(tmp_path, 'train/cat', 'test/cat', 'test/dog')
  with pytest.raises(UserError, match='has not: dog'):
    FolderSource(tmp_path, 'test')


def test_a_name_that_is_no_text_is_refused(tmp_path):
  lay_out(tmp_path, 'train/cat', os.fsdecode(b'train/caf\xe9'))
  with pytest.raises(UserError, match=r"called 'caf\\udce9', which is no text in UTF-8; rename it"):
    FolderSource(tmp_path, 'train')
