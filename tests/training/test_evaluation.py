"""Whose class a label is."""

import pytest

from cbam_jax.errors import UserError
from cbam_jax.training.evaluation import _check_classes


@pytest.mark.parametrize(
  ('network', 'data_set'),
  [
    (None, ['cat', 'dog']),
    (['cat', 'dog'], None),
    (['cat', 'dog'], ['cat', 'dog']),
    (['cat', 'dog', 'class 2'], ['cat', 'dog']),
    (['cat', 'dog'], ['n02121808', 'n02084071']),
  ],
)
def test_names_that_agree_or_tell_nothing_pass(network, data_set):
  _check_classes(network, data_set, 'folder')


@pytest.mark.parametrize('data_set', [['dog', 'cat'], ['ant', 'cat', 'dog']])
def test_names_in_other_places_are_refused(data_set):
  with pytest.raises(UserError, match=f"class 0 is 'cat' to the network and '{data_set[0]}'"):
    _check_classes(['cat', 'dog'], data_set, 'folder')
