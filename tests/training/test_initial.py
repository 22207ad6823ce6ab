"""Runs that begin with trained weights: which values they get, and what is refused before."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from cbam_jax import create_model, from_torch, graft, load_state_dict, to_torch
from cbam_jax.errors import UserError
from cbam_jax.interop.pretrained import save_pretrained
from cbam_jax.training import loop
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.workdir import Workdir
from tests.layers.random_variables import random_variables
from tests.marks import first

FIELDS = {'width': 0.125, 'stage_sizes': (1,)}


def network(attention='none', channels=1, name='resnet18', **fields):
  """A network for the tiny images, and random variables of it."""
  fields = {'num_classes': 3, 'stem': 'cifar', **FIELDS, **fields}
  model = create_model(name, attention=attention, **fields)
  return model, random_variables(model, np.zeros((1, 6, 6, channels), np.float32), train=False)


@pytest.fixture
def weights(tmp_path):
  """Writes a file of random weights of `network(...)`, and returns its name and the network."""

  def write(*args, **fields):
    file = tmp_path / 'weights.safetensors'
    save_file(to_torch(*network(*args, **fields)), file)
    return str(file)

  return write


@pytest.fixture
def config(tiny_config):
  """One epoch of a ResNet with CBAM, and the average of its weights."""
  tiny_config.epochs = 1
  tiny_config.model.name = 'resnet18'
  tiny_config.model.attention = 'cbam'
  tiny_config.model.stem = 'cifar'
  tiny_config.model.fields = FIELDS
  tiny_config.average_decay = 0.9
  return tiny_config


def train(config, workdir):
  """What `loop.train` returns and shows."""
  shown = io.StringIO()
  return loop.train(config, str(workdir), Console(file=shown)), shown.getvalue()


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))


# ---- weights of the very network -------------------------------------------------------------


@pytest.mark.slow
def test_a_run_begins_with_the_weights_and_goes_on_without_their_file(config, weights, tmp_path):
  config.init_from = weights('cbam')
  state = Experiment(config).new_state()
  model, _ = network('cbam')
  expected = from_torch(model, load_state_dict(config.init_from))
  assert_same({'params': state.params, 'batch_stats': state.batch_stats}, expected)
  assert_same(state.average, expected['params'])

  workdir = tmp_path / 'run'
  result, shown = train(config, workdir)
  assert np.isfinite(result['loss'])
  assert f'starting from {config.init_from}, 4 steps' in shown.replace('\n', '')
  assert Workdir(workdir).config().init_from == config.init_from

  (tmp_path / 'weights.safetensors').unlink()
  config.epochs = 2
  result, shown = train(config, workdir)
  assert 'going on from step 4' in shown
  assert [entry['step'] for entry in Workdir(workdir).metrics() if entry['split'] == 'test'] == [
    4,
    8,
  ]


def test_weights_live_where_the_state_does(config, weights, monkeypatch):
  monkeypatch.setattr('cbam_jax.training.sharding.SMALLEST_SPLIT', 1)
  config.mesh.fsdp = 2
  config.init_from = weights('cbam')
  experiment = Experiment(config)
  state = experiment.new_state()
  shardings = jax.tree.map(lambda array: array.sharding, state)
  assert shardings == jax.tree.map(lambda array: array.sharding, experiment.abstract_state)
  assert not all(s.is_fully_replicated for s in jax.tree.leaves(shardings.params))
  # A step may consume both.
  pointers = [
    array.addressable_shards[0].data.unsafe_buffer_pointer()
    for tree in (state.params, state.average)
    for array in jax.tree.leaves(tree)
  ]
  assert len(set(pointers)) == len(pointers)


# ---- weights of the plain network ------------------------------------------------------------


@pytest.mark.parametrize('kind', first(1, ['file', 'folder']))
def test_attention_put_into_a_plain_network_changes_nothing_at_first(
  config, weights, tmp_path, kind
):
  model, variables = network()
  if kind == 'file':
    config.init_from = weights()
  else:
    config.init_from = str(tmp_path / 'saved')
    save_pretrained(config.init_from, model, variables)
  experiment = Experiment(config)
  assert experiment.initial.origin == f'{config.init_from} (cbam put in)'
  state = experiment.new_state()
  grafted = graft(experiment.model, variables, key=jax.random.key(config.seed))
  assert_same({'params': state.params, 'batch_stats': state.batch_stats}, grafted)

  config.model.attention = 'none'
  expected = Experiment(config).evaluate(variables)
  found = experiment.evaluate(state.variables)
  assert found['count'] == expected['count'] == 20
  assert found['top1'] == expected['top1']
  assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5)


def test_another_seed_gives_other_attention(config, weights):
  config.init_from = weights()
  states = []
  for config.seed in (0, 1):
    states.append(Experiment(config).new_state().params['stage1']['block1']['attention'])
  kernels = [state['spatial']['conv']['kernel'] for state in states]
  assert not np.array_equal(*kernels)


# ---- weights for other classes ---------------------------------------------------------------


@pytest.mark.parametrize('attention', ['none', 'cbam'])
def test_a_head_for_other_classes_is_left_out(config, weights, attention):
  fresh = Experiment(config).new_state()
  config.init_from = weights(attention, num_classes=5)
  experiment = Experiment(config)
  state = experiment.new_state()
  assert experiment.initial.origin.endswith('a new head for 3 classes in place of 5)')
  assert_same(state.params['head'], fresh.params['head'])
  assert_same(state.average['head'], fresh.params['head'])
  _, variables = network(attention, num_classes=5)
  for layer in ('conv', 'norm'):
    assert_same(state.params['stem'][layer], variables['params']['stem'][layer])
  assert_same(state.batch_stats['stem'], variables['batch_stats']['stem'])
  assert not np.array_equal(
    state.params['stem']['conv']['kernel'], fresh.params['stem']['conv']['kernel']
  )


# ---- weights that cannot be used -------------------------------------------------------------


def refusal(config, tmp_path):
  """What is said about a run that is refused before anything is written."""
  before = sorted(tmp_path.iterdir())
  with pytest.raises(UserError) as error:
    train(config, tmp_path / 'run')
  assert sorted(tmp_path.iterdir()) == before
  return str(error.value)


def test_a_file_of_another_network_is_refused(config, weights, tmp_path):
  config.init_from = weights('cbam', stage_sizes=(2,))
  message = refusal(config, tmp_path)
  assert message.startswith(f'init_from is {config.init_from!r}, but the state dict')
  assert 'left over' in message
  assert 'layer1.1.conv1.weight' in message


def test_a_plain_file_of_another_network_is_refused(config, weights, tmp_path):
  config.init_from = weights(width=0.25)
  message = refusal(config, tmp_path)
  assert 'layer1.0.conv1.weight (16, 64, 3, 3) instead of (8, 64, 3, 3)' in message
  # A plain file is not told that it has no attention.
  assert 'cbam' not in message


def test_a_file_with_other_attention_is_refused(config, weights, tmp_path):
  config.init_from = weights('se')
  message = refusal(config, tmp_path)
  assert 'left over (4): ' in message
  assert 'layer1.0.se.fc1.bias' in message
  assert 'missing' not in message


def test_weights_for_other_images_are_refused(config, weights, tmp_path):
  config.init_from = weights('cbam', channels=3)
  message = refusal(config, tmp_path)
  assert 'params/stem/conv/kernel (3, 3, 3, 64) instead of (3, 3, 1, 64)' in message


def test_a_file_that_is_missing_is_refused(config, tmp_path):
  config.init_from = str(tmp_path / 'missing.safetensors')
  assert 'there is no file' in refusal(config, tmp_path)
  config.init_from = str(tmp_path / 'missing')
  assert 'there is no folder' in refusal(config, tmp_path)


def test_a_folder_of_another_network_is_refused(config, tmp_path):
  """Its arrays may fit all the same."""
  config.init_from = str(tmp_path / 'saved')
  config.model.attention_fields = {'order': 'parallel', 'norm_momentum': 0.9}
  save_pretrained(config.init_from, *network('cbam'))
  message = refusal(config, tmp_path)
  assert 'different (1): attention_fields.order is the default there, parallel here' in message
  config.model.attention_fields = {'norm_momentum': 0.9}
  assert Experiment(config).initial.origin == config.init_from
