"""Configurations at random: whatever a key is set to, it works or the message is of use."""

import math
import re

import hypothesis
import hypothesis.strategies as st
import ml_collections
import pytest

from cbam_jax.cli.config_file import load_config
from cbam_jax.errors import UserError
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.keys import KEYS

# What a message tells its reader to do.
REMEDIES = re.compile(
  r'must be|allowed|[Cc]hoose|set |give |make |lower|change|write|Remove|name |it takes|begin|Use'
)

EXTREMES = [0, -1, 2**31, 2**64, -(2**63), 10**400, 1e308, 1e-320, math.inf, -math.inf, math.nan]
TEXTS = ['', ' ', 'None', 'true', 'abc', '[', '{}', '{[]: 1}', '(1,', '1e999', '0x10', '-', '\0']

values = st.one_of(
  st.sampled_from([None, True, False, *EXTREMES, *TEXTS, (), [], {}, {'width': 'x'}, {1: 2}]),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.tuples(st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=2))),
  st.dictionaries(st.text(max_size=3), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
)
keys = st.sampled_from(sorted(KEYS))
names = st.text(st.characters(exclude_characters='='), max_size=5)


@pytest.fixture(scope='module')
def digits() -> ml_collections.ConfigDict:
  return load_config('digits')


def works_or_tells(key: str, make) -> None:
  """Runs `make`, whose only error may be one that names `key` and what to do about it."""
  try:
    make()
  except UserError as error:
    message = str(error)
    assert repr(key)[1:-1] in message
    assert REMEDIES.search(message), message
    assert len(message) < 2000


@hypothesis.given(keys, values)
@hypothesis.settings(max_examples=300)
def test_any_value_in_python(digits, key, value):
  config = digits.copy_and_resolve_references()
  *parents, name = key.split('.')
  node = config
  for parent in parents:
    node = node[parent]
  try:
    with config.unlocked(), config.ignore_type():
      node[name] = value
  except (
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
  ):  # ml_collections' own, in a user's own file
    return
  works_or_tells(key, lambda: Experiment(config))


@hypothesis.given(
  st.one_of(keys, keys.map(lambda key: f'{key}.width'), names),
  values.map(str) | st.sampled_from(TEXTS),
)
@hypothesis.settings(max_examples=300)
def test_any_override(key, text):
  works_or_tells(key, lambda: Experiment(load_config('digits', [f'--config.{key}={text}'])))


FIELDS = ['width', 'stage_sizes', 'groups', 'group_width', 'bottleneck', 'stride_in_1x1', 'dtype']
ATTENTION_FIELDS = ['reduction', 'pools', 'spatial_kernel', 'order', 'use_bias', 'norm_momentum']


@hypothesis.given(
  st.sampled_from(
    [f'model.fields.{name}' for name in FIELDS]
    + [f'model.attention_fields.{name}' for name in ATTENTION_FIELDS]
  ),
  values.map(str) | st.sampled_from(['(1,)', '(0,)', "('two',)", '7', '0.5', 'parallel']),
)
@hypothesis.settings(max_examples=30)
def test_any_field_of_the_network(key, text):
  """Down to the shapes of all its arrays."""

  def make():
    overrides = [f'--config.{key}={text}', '--config.model.num_classes=10']
    _ = Experiment(load_config('digits', overrides)).abstract_state

  works_or_tells(key.split('.')[-1], make)


@hypothesis.given(st.text(max_size=12))
def test_any_name_of_a_file(name):
  hypothesis.assume(name.partition(':')[0] not in ('digits', 'imagenet', 'cifar10', 'folder'))
  works_or_tells(name.partition(':')[0], lambda: load_config(name))


@hypothesis.given(st.text(st.characters(codec='ascii'), max_size=12))
def test_any_variant(variant):
  works_or_tells(variant, lambda: load_config(f'imagenet:{variant}'))
