"""The command line in this process: its output, its exit status and its messages."""

import json
import sys
from pathlib import Path

import pytest

from cbam_jax import Summary, create_model, list_models, summary
from cbam_jax.cli import main
from cbam_jax.cli.train import load_config
from cbam_jax.errors import UserError
from cbam_jax.training.workdir import Workdir

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / 'configs' / 'digits.py')
IMAGENET = str(ROOT / 'configs' / 'imagenet.py')


@pytest.fixture
def refused(capsys, tmp_path):
  """Runs a command that has to be refused without a trace, and returns what it says of it."""

  def run(command: str, *arguments: str) -> str:
    before = sorted(tmp_path.rglob('*'))
    assert main([command, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert output.err.startswith(f'cbam-jax {command}: ')
    assert 'Traceback' not in output.err
    assert sorted(tmp_path.rglob('*')) == before
    return output.err

  return run


# ---- train -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('override', 'parts'),
  [
    ('--config.optimizer.learning_rat=1', ["no key 'optimizer.learning_rat'", 'learning_rate']),
    ('--config.bath_size=64', ["no key 'bath_size'", "Did you mean 'batch_size'", 'All keys: ']),
    ('--config.epochs=many', ['many', 'epochs', 'give a value of the type']),
    ('--config.batch_size=1.5', ['1.5', 'batch_size', 'give a value of the type']),
    ('--config.model.group_size=x', ['x', 'group_size', 'give a value of the type']),
    ('--config.epochs', ["'--config.epochs'", '--config.key=value']),
    ('--epochs=3', ["'--epochs=3'", '--config.key=value']),
    ('epochs=3', ["'epochs=3'", '--config.key=value']),
    ('--config.model.attention=cbma', ['cbma', "Did you mean 'cbam'"]),
    ('--config.model.fields.width=0.0001', ['width is 0.0001']),
    ('--config.batch_size=12', ['batch_size is 12', 'a multiple of 8']),
    ('--config.data.name=imagenet', ["'imagenet'", 'tfds:NAME']),
  ],
)
def test_train_refuses_an_override(refused, tmp_path, override, parts):
  message = refused('train', f'--config={DIGITS}', f'--workdir={tmp_path / "run"}', override)
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  ('config', 'parts'),
  [
    ('configs/digit.py', ["'configs/digit.py'", 'configs/digits.py']),
    (f'{IMAGENET}:resnet50', ["'resnet50'", "'network,attention'", "'resnet50,cbam'"]),
    (f'{IMAGENET}:resnet5,cbam', ["'resnet5'", 'allowed: resnet18', "Did you mean 'resnet50'"]),
    (f'{IMAGENET}:resnet50,cbma', ["'cbma'", 'allowed: none, se, bam, cbam', "mean 'cbam'"]),
  ],
)
def test_train_refuses_a_configuration(refused, tmp_path, config, parts):
  message = refused('train', f'--config={config}', f'--workdir={tmp_path / "run"}')
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  ('code', 'parts'),
  [
    ('def get_config():\n  raise RuntimeError("the moon is full")\n', ['the moon is full']),
    ('def get_config():\n  return 1 / 0\n', ['division by zero']),
    ('def get_config(\n', ['never closed']),
    ('import no_such_package\n', ['no_such_package']),
    ('config = 1\n', ["no attribute 'get_config'"]),
    (
      'from cbam_jax.training.config import default_config\n'
      'def get_config():\n'
      '  config = default_config()\n'
      '  config.optimizer.learning_rat = 0.1\n'
      '  return config\n',
      ['learning_rat', 'Did you mean', 'learning_rate'],
    ),
  ],
)
def test_train_refuses_a_file_that_fails(refused, monkeypatch, tmp_path, code, parts):
  # Where ml_collections keeps the file that it has loaded last.
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  file = tmp_path / 'own.py'
  file.write_text(code)
  message = refused('train', f'--config={file}', f'--workdir={tmp_path / "run"}')
  for part in ['own.py', *parts]:
    assert part in message


def test_train_says_how_to_prepare_imagenet(refused, tmp_path):
  pytest.importorskip('tensorflow_datasets')
  message = refused(
    'train',
    f'--config={IMAGENET}:resnet50,cbam',
    f'--workdir={tmp_path / "run"}',
    f'--config.data.dir={tmp_path}',
  )
  for part in ('imagenet2012 has no train split', str(tmp_path), '--file_format=array_record'):
    assert part in message


def test_overrides_reach_the_configuration():
  config = load_config(
    DIGITS,
    [
      '--config.epochs=3',
      '--config.optimizer.learning_rate=0.25',
      '--config.optimizer.nesterov=true',
      '--config.model.fields.width=0.5',
      '--config.model.group_size=16',
      '--config.data.dir=/data',
      '--config.data.std=(0.5,)',
    ],
  )
  assert config.epochs == 3
  assert config.optimizer.learning_rate == 0.25
  assert config.optimizer.nesterov is True
  assert config.model.fields.width == 0.5
  assert config.model.group_size == 16
  assert config.data.dir == '/data'
  assert config.data.std == (0.5,)
  assert config.optimizer.weight_decay == 5e-4  # what is not named stays
  assert load_config(DIGITS).epochs == 20


def test_overrides_come_from_the_arguments_given_alone(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['pytest', '--config.epochs=3'])
  assert load_config(DIGITS).epochs == 20


def test_load_config_raises_what_the_command_line_prints():
  with pytest.raises(UserError, match=r'no configuration file'):
    load_config('nowhere.py')


def test_train_refuses_the_folder_of_another_run(refused, tmp_path):
  Workdir(tmp_path).claim(load_config(DIGITS))
  message = refused(
    'train', f'--config={DIGITS}', f'--workdir={tmp_path}', '--config.model.attention=se'
  )
  assert "model.attention is 'cbam' there, 'se' here" in message
  assert 'Choose another --workdir' in message


# ---- evaluate --------------------------------------------------------------------------------


def test_evaluate_needs_a_run(refused, tmp_path):
  message = refused('evaluate', f'--workdir={tmp_path}')
  assert f'{tmp_path} holds no run' in message
  assert 'name the --workdir' in message


def test_evaluate_prints_a_sentence_or_json(capsys, monkeypatch):
  metrics = {'step': 660, 'loss': 0.0625, 'top1': 0.985, 'top5': 1.0, 'count': 360}
  asked = []
  monkeypatch.setattr(
    'cbam_jax.training.evaluation.evaluate', lambda workdir: asked.append(workdir) or metrics
  )
  assert main(['evaluate', '--workdir=runs/digits']) == 0
  assert capsys.readouterr().out == (
    'step 660: top-1 98.50 %, top-5 100.00 %, loss 0.0625, 360 test images\n'
  )
  assert main(['evaluate', '--workdir=runs/digits', '--json']) == 0
  assert json.loads(capsys.readouterr().out) == metrics
  assert asked == ['runs/digits'] * 2


# ---- models ----------------------------------------------------------------------------------


def test_models_lists_every_network_plain_and_with_cbam(capsys, monkeypatch):
  def count(model, image_size):
    plain = model.attention is None
    return Summary(image_size, 11_689_512 if plain else 11_779_392, 1_814_073_344, ())

  monkeypatch.setattr('cbam_jax.cli.models.summary', count)
  assert main(['models']) == 0
  header, *rows = capsys.readouterr().out.splitlines()
  assert header.split() == ['network', 'attention', 'params', '(M)', 'multiply-adds', '(G)']
  expected = [
    [name, attention, params, '1.814']
    for name in list_models()
    for attention, params in (('none', '11.69'), ('cbam', '11.78'))
  ]
  assert [row.split() for row in rows] == expected


def test_models_prints_json(capsys):
  arguments = ['resnet18', '--attention=se', '--attention=none', '--image-size=64', '--json']
  assert main(['models', *arguments]) == 0
  entries = json.loads(capsys.readouterr().out)
  assert [entry['attention'] for entry in entries] == ['se', 'none']
  for entry in entries:
    counts = summary(create_model('resnet18', attention=entry['attention']), 64)
    assert entry['name'] == 'resnet18'
    assert entry['params'] == counts.params
    assert entry['multiply_adds'] == counts.multiply_adds
    assert len(entry['stages']) == len(counts.stages)


def test_models_shows_the_stages(capsys):
  assert main(['models', 'resnet18', '--attention=none', '--image-size=64', '--stages']) == 0
  output = capsys.readouterr().out
  assert str(summary(create_model('resnet18'), 64)) in output


@pytest.mark.parametrize(
  ('arguments', 'parts'),
  [
    (['resnet5'], ["'resnet5'", 'allowed: resnet18', "Did you mean 'resnet50'"]),
    (['resnet18', '--attention=cbma'], ["'cbma'", "Did you mean 'cbam'"]),
    (['resnet18', '--image-size=0'], ['0']),
  ],
)
def test_models_refuses_what_it_does_not_know(refused, arguments, parts):
  message = refused('models', *arguments)
  for part in parts:
    assert part in message


# ---- usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'required: command'),
    (['trian'], "invalid choice: 'trian'"),
    (['train', '--workdir=x'], 'required: --config'),
    (['train', f'--config={DIGITS}'], 'required: --workdir'),
    (['evaluate', '--workdir=x', '--config.epochs=1'], 'unrecognized arguments'),
    (['models', '--image-size=big'], "invalid int value: 'big'"),
  ],
)
def test_wrong_usage_is_explained(capsys, arguments, message):
  with pytest.raises(SystemExit) as exit_:
    main(arguments)
  assert exit_.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('usage: cbam-jax')
  assert message in error


@pytest.mark.parametrize('command', ['train', 'evaluate', 'models'])
def test_every_command_has_help(capsys, command):
  with pytest.raises(SystemExit) as exit_:
    main([command, '--help'])
  assert exit_.value.code == 0
  assert f'usage: cbam-jax {command}' in capsys.readouterr().out


# ---- a missing extra -------------------------------------------------------------------------


@pytest.mark.parametrize('command', ['train', 'evaluate'])
@pytest.mark.parametrize(
  'package',
  ['grain', 'matplotlib', 'ml_collections', 'optax', 'orbax.checkpoint', 'rich', 'tensorboardX'],
)
def test_a_missing_package_names_its_extra(refused, monkeypatch, tmp_path, command, package):
  for name in [*sys.modules]:
    if name.startswith('cbam_jax.training'):
      monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, package, None)
  arguments = [f'--workdir={tmp_path / "run"}']
  if command == 'train':
    arguments.append(f'--config={DIGITS}')
  message = refused(command, *arguments)
  assert message.startswith(f'cbam-jax {command}: {package.split(".")[0]} cannot be imported')
  assert "pip install 'cbam-jax[train]'" in message


def test_missing_scikit_learn_names_its_extra(refused, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'sklearn', None)
  message = refused('train', f'--config={DIGITS}', f'--workdir={tmp_path / "run"}')
  assert 'sklearn cannot be imported' in message
  assert "pip install 'cbam-jax[train]'" in message
