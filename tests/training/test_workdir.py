"""The run's folder: whose it is, and what it says after an interruption."""

import json
import os

import pytest

from cbam_jax.errors import UserError
from cbam_jax.training.workdir import Workdir


def contents(folder) -> dict[str, bytes]:
  files = (path for path in folder.rglob('*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_configuration_comes_back_as_it_was_given(tmp_path, tiny_config):
  tiny_config.model.fields = {'width': 0.5, 'stage_sizes': (1, 2)}
  tiny_config.model.attention_fields = {'pools': ('avg', 'max')}
  tiny_config.model.group_size = 4
  workdir = Workdir(tmp_path / 'a' / 'run')
  workdir.claim(tiny_config)
  again = workdir.config()
  assert json.dumps(again.to_dict()) == json.dumps(tiny_config.to_dict())
  assert isinstance(again.data.mean, tuple)
  # A configuration read back can be claimed, and changed like any other.
  workdir.claim(again)
  again.data.dir = '/elsewhere'
  with pytest.raises(TypeError):
    again.epochs = 'many'


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    (lambda c: c.model.update(name='resnet18'), "model.name is 'tiny' there, 'resnet18' here"),
    (lambda c: c.model.update(attention='se'), "model.attention is 'none' there, 'se' here"),
    (lambda c: c.model.update(group_size=4), 'model.group_size is None there, 4 here'),
    (lambda c: setattr(c.model, 'fields', {'width': 2.0}), 'model.fields.width is None there, 2.0'),
    (lambda c: c.data.update(name='digits'), "data.name is 'tiny' there, 'digits' here"),
    (lambda c: c.data.update(std=(0.3,)), 'data.std'),
  ],
)
def test_another_network_is_refused_and_nothing_is_overwritten(
  tmp_path, tiny_config, change, named
):
  workdir = Workdir(tmp_path)
  workdir.claim(tiny_config)
  workdir.metrics_file.write_text('{"step": 1}\n')
  before = contents(tmp_path)
  change(tiny_config)
  with pytest.raises(UserError, match='holds a run of another configuration') as error:
    workdir.claim(tiny_config)
  assert named in str(error.value)
  assert 'Choose another --workdir' in str(error.value)
  assert contents(tmp_path) == before


def test_what_does_not_change_the_network_may_be_changed(tmp_path, tiny_config):
  workdir = Workdir(tmp_path)
  workdir.claim(tiny_config)
  tiny_config.epochs = 7
  tiny_config.data.dir = '/elsewhere'
  tiny_config.data.workers = 3
  workdir.claim(tiny_config)
  assert workdir.config().epochs == 7
  assert workdir.config().data.workers == 3


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'holds no run \(there is no config.json\); name the'):
    Workdir(tmp_path).config()


def test_a_damaged_configuration_is_refused(tmp_path, tiny_config):
  workdir = Workdir(tmp_path)
  workdir.claim(tiny_config)
  workdir.config_file.write_text(workdir.config_file.read_text()[:100])
  with pytest.raises(UserError, match=r'config\.json cannot be read'):
    workdir.config()
  with pytest.raises(UserError, match=r'config\.json cannot be read'):
    workdir.claim(tiny_config)


def test_a_name_that_orbax_cannot_use_is_refused(tmp_path, tiny_config):
  with pytest.raises(UserError, match=r"runs\[1\]'.* choose another --workdir"):
    Workdir(tmp_path / 'runs[1]').claim(tiny_config)
  assert contents(tmp_path) == {}


def test_a_file_is_no_folder(tmp_path, tiny_config):
  file = tmp_path / 'file'
  file.write_text('mine')
  for root in (file, file / 'run'):
    with pytest.raises(UserError, match='choose a --workdir that can be made'):
      Workdir(root).claim(tiny_config)
    with pytest.raises(UserError, match='holds no run'):
      Workdir(root).config()
  assert contents(tmp_path) == {'file': b'mine'}


def test_one_run_holds_the_folder(tmp_path):
  with Workdir(tmp_path / 'run').locked():
    for _ in range(2):
      refused = pytest.raises(
        UserError, match=rf'in use by another run \(process {os.getpid()} on '
      )
      with refused, Workdir(tmp_path / 'run').locked():
        pass
  with Workdir(tmp_path / 'run').locked():
    pass


# ---- metrics ---------------------------------------------------------------------------------

LINES = [json.dumps({'step': step, 'loss': step / 8}) for step in (2, 4, 4, 6)]


def test_metrics_are_read_in_order_without_a_line_cut_short(tmp_path):
  workdir = Workdir(tmp_path)
  assert list(workdir.metrics()) == []
  workdir.metrics_file.write_text('\n'.join(LINES))
  assert [entry['step'] for entry in workdir.metrics()] == [2, 4, 4, 6]
  workdir.metrics_file.write_text('\n'.join(LINES)[:-4])
  assert [entry['step'] for entry in workdir.metrics()] == [2, 4, 4]


@pytest.mark.parametrize(
  'damaged', [b'{"step": 4, "lo\xff": 1}', b'[4]', b'4', b'{"stap": 4}', b'']
)
def test_a_damaged_line_costs_no_other(tmp_path, damaged):
  workdir = Workdir(tmp_path)
  lines = [line.encode() for line in LINES]
  lines[1] = damaged
  workdir.metrics_file.write_bytes(b'\n'.join(lines) + b'\n')
  assert [entry['step'] for entry in workdir.metrics()] == [2, 4, 6]
  workdir.forget_after(4)
  assert [entry['step'] for entry in workdir.metrics()] == [2, 4]
  assert workdir.last_test(4) is None


@pytest.mark.parametrize(('step', 'kept'), [(0, 0), (3, 1), (4, 3), (6, 4), (9, 4)])
def test_forgetting_keeps_what_was_logged_up_to_a_step(tmp_path, step, kept):
  workdir = Workdir(tmp_path)
  workdir.metrics_file.write_text('\n'.join(LINES) + '\n{"step": 8, "lo')
  workdir.forget_after(step)
  assert workdir.metrics_file.read_text() == ''.join(line + '\n' for line in LINES[:kept])
  assert sorted(contents(tmp_path)) == ['metrics.jsonl']


def test_forgetting_an_empty_folder_leaves_an_empty_file(tmp_path):
  workdir = Workdir(tmp_path)
  workdir.forget_after(0)
  assert workdir.metrics_file.read_text() == ''
