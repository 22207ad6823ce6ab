"""A network as a folder."""

import json
import os
import stat
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cbam_jax import UserError
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.errors import MissingExtraError, RunError
from cbam_jax.interop.pretrained import from_pretrained, save_pretrained
from tests.cli.trained import CLASSES, PREPROCESSING, network
from tests.interop.variables import assert_same


@pytest.fixture(scope='module')
def trained():
  return network()


@pytest.fixture(params=['safetensors', 'orbax'])
def format(request):
  return request.param


def save(folder, trained, **options):
  save_pretrained(
    folder,
    trained.model,
    trained.variables,
    preprocessing=trained.preprocessing,
    classes=trained.classes,
    **options,
  )


def test_a_round_trip_changes_no_bit(tmp_path, trained, format):
  save(tmp_path / 'net', trained, format=format)
  read = from_pretrained(tmp_path / 'net')
  assert_same(read.variables, trained.variables)
  assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(read.variables))
  assert read.preprocessing == PREPROCESSING
  assert read.classes == CLASSES
  images = jnp.ones((2, 32, 32, 3))
  ours, theirs = (
    jax.jit(lambda v, n=n: n.model.apply(v, images, train=False))(n.variables)
    for n in (trained, read)
  )
  np.testing.assert_array_equal(ours, theirs)


def test_other_types_stay_what_they_are(tmp_path, trained):
  halved = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), trained.variables)
  save(tmp_path, trained._replace(variables=halved))
  assert_same(from_pretrained(tmp_path).variables, halved)


def test_what_is_left_out_is_imagenets_usual(tmp_path, trained):
  save_pretrained(tmp_path, trained.model, trained.variables)
  read = from_pretrained(str(tmp_path))
  assert read.preprocessing == Preprocessing()
  assert read.classes is None


def test_a_folder_is_replaced_whole(tmp_path, trained):
  save(tmp_path / 'net', trained, format='orbax')
  changed = jax.tree.map(lambda a: a + 1, trained.variables)
  save(tmp_path / 'net', trained._replace(variables=changed))
  assert_same(from_pretrained(tmp_path / 'net').variables, changed)
  assert [path.name for path in tmp_path.iterdir()] == ['net']
  assert len(list((tmp_path / 'net').iterdir())) == 2


def test_everyone_may_read_the_files(tmp_path, trained):
  before = os.umask(0o022)
  save(tmp_path / 'net', trained)
  os.umask(before)
  for file in (tmp_path / 'net').iterdir():
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_nobodys_files_are_lost(tmp_path, trained):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(UserError, match=r'holds thesis\.tex, which writing there would lose'):
    save(tmp_path, trained)
  with pytest.raises(UserError, match='is a file, where a folder is to be written'):
    save(tmp_path / 'thesis.tex', trained)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_the_network_of_another_library_is_not_lost(tmp_path, trained):
  (tmp_path / 'model.safetensors').write_bytes(b'theirs')
  for text in ('{"model_type": "bert"}', '[]', ''):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match='holds something else under the names config'):
      save(tmp_path, trained)
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match='holds something else'):
    save(tmp_path, trained)
  assert (tmp_path / 'model.safetensors').read_bytes() == b'theirs'


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
  tmp_path, trained, monkeypatch
):
  save(tmp_path / 'net', trained)
  replace = os.replace

  def failing(source, target):
    if source.name == 'new':
      raise OSError(5, 'Input/output error')
    replace(source, target)

  monkeypatch.setattr(os, 'replace', failing)
  changed = jax.tree.map(lambda a: a + 1, trained.variables)
  with pytest.raises(RunError, match='net cannot be written'):
    save(tmp_path / 'net', trained._replace(variables=changed))
  assert_same(from_pretrained(tmp_path / 'net').variables, trained.variables)
  assert [path.name for path in tmp_path.iterdir()] == ['net']


def test_a_failure_leaves_the_folder_as_it_was(tmp_path, trained, monkeypatch):
  save(tmp_path / 'net', trained)

  def full(*arguments, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('cbam_jax.interop.pretrained._write_safetensors', full)
  changed = jax.tree.map(lambda a: a + 1, trained.variables)
  with pytest.raises(RunError, match=r'net cannot be written .*No space left.*make room'):
    save(tmp_path / 'net', trained._replace(variables=changed))
  assert_same(from_pretrained(tmp_path / 'net').variables, trained.variables)
  assert [path.name for path in tmp_path.iterdir()] == ['net']


def test_variables_of_another_network_are_refused(tmp_path, trained):
  plain = network('none')
  with pytest.raises(UserError) as error:
    save(tmp_path / 'net', trained._replace(variables=plain.variables))
  assert 'the variables do not fit ResNet' in str(error.value)
  assert 'missing (' in str(error.value)
  assert 'params/stage1/block1/attention/channel/mlp/fc1/kernel' in str(error.value)
  with pytest.raises(UserError, match=r'left over \('):
    save(tmp_path / 'net', plain._replace(variables=trained.variables))
  wrong = jax.tree.map(lambda a: a[..., None], trained.variables)
  with pytest.raises(UserError, match=r'of the wrong shape \('):
    save(tmp_path / 'net', trained._replace(variables=wrong))
  whole = jax.tree.map(lambda a: a.astype(np.int32), trained.variables)
  with pytest.raises(UserError, match=r'not floating point \('):
    save(tmp_path / 'net', trained._replace(variables=whole))
  assert not (tmp_path / 'net').exists()


def test_class_names_must_be_one_each(tmp_path, trained):
  with pytest.raises(UserError, match='2 class names for a network of 3 classes'):
    save(tmp_path, trained._replace(classes=('a', 'b')))
  with pytest.raises(UserError, match="the class names are 'abc'; give a list of texts"):
    save(tmp_path, trained._replace(classes='abc'))


def test_what_could_not_be_read_again_is_not_written(tmp_path, trained):
  with pytest.raises(UserError, match='group_size is 0'):
    save(tmp_path / 'net', trained._replace(model=trained.model.clone(group_size=0)))
  assert not (tmp_path / 'net').exists()


def test_an_unknown_format(tmp_path, trained):
  with pytest.raises(UserError, match="the format is 'pickle'; allowed: safetensors, orbax"):
    save(tmp_path, trained, format='pickle')


# ---- damaged folders -------------------------------------------------------------------------


def test_no_folder():
  with pytest.raises(UserError, match=r"there is no folder 'runs/a/b'; name one"):
    from_pretrained('runs/a/b')


def test_an_empty_folder(tmp_path):
  with pytest.raises(UserError, match=r'has no config\.json; name a folder'):
    from_pretrained(tmp_path)


@pytest.mark.parametrize('text', ['', '{"model": "resn', '[]', '{}', 'null', '\x00', '[' * 10**5])
def test_a_damaged_config(tmp_path, trained, text):
  save(tmp_path, trained)
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=r'cannot be read|describes no network'):
    from_pretrained(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': 'resnet5'}, "the model is 'resnet5'"),
    ({'attention': 'none'}, 'left over'),
    ({'fields': {}}, 'of the wrong shape'),
    ({'preprocessing': None}, 'the preprocessing is None'),
    ({'classes': ['one']}, '1 class names'),
    ({'classes': 5}, 'the class names are 5; give a list of texts'),
    ({'classes': 'abc'}, "the class names are 'abc'"),
    ({'classes': {'a': 0, 'b': 1, 'c': 2}}, 'the class names are {'),
    ({'classes': ['a', 'b', 3]}, 'the class names are .*3'),
    ({'fields': {'stage_sizes': []}}, 'stage_sizes is .* must be the number of blocks'),
    ({'fields': {'stage_attention': 'bam'}}, "no field 'stage_attention'"),
  ],
)
def test_a_config_of_something_else(tmp_path, trained, change, message):
  save(tmp_path, trained)
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=message):
    from_pretrained(tmp_path)


def test_missing_arrays(tmp_path, trained):
  save(tmp_path, trained)
  (tmp_path / 'model.safetensors').unlink()
  with pytest.raises(UserError, match=r'but no model\.safetensors and no variables'):
    from_pretrained(tmp_path)


def test_damaged_arrays(tmp_path, trained):
  save(tmp_path, trained)
  file = tmp_path / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(UserError, match=r'model\.safetensors is damaged'):
    from_pretrained(tmp_path)


def test_a_header_that_lies_of_its_length(tmp_path, trained):
  save(tmp_path, trained)
  file = tmp_path / 'model.safetensors'
  file.write_bytes((2**62).to_bytes(8, 'little') + file.read_bytes()[8:])
  with pytest.raises(UserError, match=r'model\.safetensors is damaged'):
    from_pretrained(tmp_path)


def test_names_that_contradict_each_other(tmp_path, trained):
  save(tmp_path, trained)
  arrays = {'params': np.zeros(1, np.float32), 'params.head.bias': np.zeros(3, np.float32)}
  safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
  with pytest.raises(UserError):
    from_pretrained(tmp_path)


def test_a_damaged_orbax_folder(tmp_path, trained):
  save(tmp_path, trained, format='orbax')
  for file in (tmp_path / 'variables').rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  with pytest.raises(UserError, match='is damaged or no orbax checkpoint'):
    from_pretrained(tmp_path)


# ---- a model hub -----------------------------------------------------------------------------


def test_a_hub_name_is_fetched(tmp_path, trained, monkeypatch):
  save(tmp_path / 'fetched', trained)
  asked = []

  def snapshot_download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path / 'fetched')

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  assert_same(from_pretrained('somebody/resnet18-cbam').variables, trained.variables)
  assert asked == [('somebody/resnet18-cbam', ['config.json', 'model.safetensors'])]


def test_a_hub_that_fails(monkeypatch):
  def snapshot_download(name, allow_patterns):
    raise ConnectionError('no route')

  hub = types.SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  with pytest.raises(UserError, match=r'cannot be fetched .*no route.*check the name'):
    from_pretrained('somebody/resnet18-cbam')


def test_a_hub_name_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(MissingExtraError, match=r"^there is no folder or file 'nets/cbm'; check"):
    from_pretrained('nets/cbm')
  with pytest.raises(MissingExtraError, match=r"pip install 'cbam-jax\[hub\]'"):
    from_pretrained('somebody/resnet18-cbam')
