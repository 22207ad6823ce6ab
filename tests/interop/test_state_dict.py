"""Reading PyTorch checkpoints from files, with and without PyTorch."""

import io
import pickle
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy

from cbam_jax import CBAM, UserError
from cbam_jax.errors import MissingExtraError
from cbam_jax.interop import from_torch, load_state_dict

ARRAYS = {
  'fc.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'fc.bias': np.array([1, 2], np.float64),
  'bn.num_batches_tracked': np.array(7, np.int64),
}


def assert_arrays(actual, expected):
  assert sorted(actual) == sorted(expected)
  for name in expected:
    assert actual[name].dtype == expected[name].dtype
    np.testing.assert_array_equal(actual[name], expected[name])


def test_safetensors_need_no_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  safetensors.numpy.save_file(ARRAYS, tmp_path / 'a.safetensors')
  assert_arrays(load_state_dict(tmp_path / 'a.safetensors'), ARRAYS)
  assert_arrays(load_state_dict(str(tmp_path / 'a.safetensors')), ARRAYS)


def test_bfloat16_safetensors(tmp_path):
  arrays = {'module.weight': jnp.arange(4, dtype=jnp.bfloat16)}
  safetensors.flax.save_file(arrays, tmp_path / 'a.safetensors')
  assert_arrays(
    load_state_dict(tmp_path / 'a.safetensors'), {'weight': np.arange(4).astype(jnp.bfloat16)}
  )


def test_safetensors_of_an_unknown_type(tmp_path):
  arrays = {'weight': jnp.zeros(4, jnp.float8_e4m3fn)}
  safetensors.flax.save_file(arrays, tmp_path / 'a.safetensors')
  with pytest.raises(UserError, match=r'weight in .* of type F8_E4M3; readable are F64'):
    load_state_dict(tmp_path / 'a.safetensors')


@pytest.mark.parametrize('keep', [0, 4, 100, -1])
def test_truncated_safetensors(tmp_path, keep):
  path = tmp_path / 'a.safetensors'
  safetensors.numpy.save_file(ARRAYS, path)
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=r'a\.safetensors is damaged.*fetch it again'):
    load_state_dict(path)


def test_files_that_cannot_be(tmp_path):
  with pytest.raises(UserError, match=r'there is no file .*missing\.pth'):
    load_state_dict(tmp_path / 'missing.pth')
  with pytest.raises(UserError, match='there is no file'):
    load_state_dict(tmp_path)
  (tmp_path / 'weights.h5').touch()
  with pytest.raises(UserError, match=r"ends in '\.h5'; readable are \.safetensors, \.pth"):
    load_state_dict(tmp_path / 'weights.h5')


@pytest.mark.parametrize(
  ('package', 'file'), [('torch', 'a.pth'), ('safetensors', 'a.safetensors')]
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, file):
  monkeypatch.setitem(sys.modules, package, None)
  (tmp_path / file).touch()
  with pytest.raises(MissingExtraError, match=rf'{package} cannot .*cbam-jax\[torch\]'):
    load_state_dict(tmp_path / file)


# ---------------------------------------------------------------------------------- with PyTorch


@pytest.fixture
def torch():
  return pytest.importorskip('torch')


@pytest.mark.parametrize('file', ['a.pth', 'a.pt', 'a.bin', 'a.pth.tar'])
def test_torch_files(tmp_path, torch, file):
  tensors = {f'module.{k}': torch.from_numpy(v.copy()) for k, v in ARRAYS.items()}
  torch.save({'epoch': 1, 'best_prec1': 77.6, 'state_dict': tensors}, tmp_path / file)
  assert_arrays(load_state_dict(tmp_path / file), ARRAYS)


def test_bfloat16_torch_file(tmp_path, torch):
  torch.save({'weight': torch.arange(4).to(torch.bfloat16)}, tmp_path / 'a.pth')
  assert_arrays(load_state_dict(tmp_path / 'a.pth'), {'weight': np.arange(4).astype(jnp.bfloat16)})


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('keep', [0, 10, 0.5, -1])
def test_truncated_torch_files(tmp_path, torch, legacy, keep):
  buffer = io.BytesIO()
  tensors = {k: torch.from_numpy(v.copy()) for k, v in ARRAYS.items()}
  torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
  written = buffer.getvalue()
  path = tmp_path / 'a.pth'
  path.write_bytes(written[: int(keep * len(written)) if keep == 0.5 else keep])
  with pytest.raises(UserError, match=r'a\.pth is damaged.*[Ff]etch it again'):
    load_state_dict(path)


class Hostile:
  """Unpickled, it makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


@pytest.mark.parametrize('how', ['pickle', 'torch'])
def test_a_hostile_pickle_is_not_executed(tmp_path, torch, how):
  path, touched = tmp_path / 'a.pth', tmp_path / 'touched'
  if how == 'pickle':
    path.write_bytes(pickle.dumps({'weight': Hostile(touched)}, protocol=2))
  else:
    torch.save({'weight': Hostile(touched)}, path)
  with pytest.raises(UserError, match=r'a\.pth .*not safe to load.*state_dict\(\), path'):
    load_state_dict(path)
  assert not touched.exists()


def test_a_file_of_something_else(tmp_path, torch):
  torch.save(torch.zeros(3), tmp_path / 'a.pth')
  with pytest.raises(UserError, match='give a mapping'):
    load_state_dict(tmp_path / 'a.pth')


def test_a_published_file_from_disk_to_variables(tmp_path, torch):
  module = CBAM(reduction=4, order='channel_only')
  state_dict = {
    'module.ChannelGate.mlp.1.weight': torch.ones(2, 8),
    'module.ChannelGate.mlp.1.bias': torch.ones(2),
    'module.ChannelGate.mlp.3.weight': torch.ones(8, 2),
    'module.ChannelGate.mlp.3.bias': torch.ones(8),
  }
  torch.save({'state_dict': state_dict}, tmp_path / 'a.pth')
  variables = from_torch(module, load_state_dict(tmp_path / 'a.pth'))
  assert variables['params']['channel']['mlp']['fc1']['kernel'].shape == (8, 2)
