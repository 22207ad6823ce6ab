"""The command line in this process: its output, its exit status and its messages."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import cbam_jax
from cbam_jax import Summary, create_model, list_models, summary
from cbam_jax.cli import COMMANDS, main
from cbam_jax.cli.train import load_config
from cbam_jax.data.preprocessing import Preprocessing
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
    (
      '--config.bath_size=64',
      ["no key 'bath_size'", "Did you mean 'batch_size'", 'Choose one of accumulate, '],
    ),
    ('--config.epochs=many', ["epochs is 'many'; it must be a number, above 0"]),
    ('--config.batch_size=1.5', ["batch_size is '1.5'; it must be an integer, 1 or more"]),
    ('--config.batch_size=abc', ["batch_size is 'abc'; it must be an integer, 1 or more"]),
    ('--config.model.group_size=x', ["model.group_size is 'x'", 'an integer, 1 or more, or None']),
    ('--config.epochs', ["'--config.epochs'", '--config.key=value']),
    ('--epochs=3', ["'--epochs=3'", '--config.key=value']),
    ('epochs=3', ["'epochs=3'", '--config.key=value']),
    ('--config.model.attention=cbma', ['cbma', "Did you mean 'cbam'"]),
    ('--config.model.fields.width=0.0001', ['width is 0.0001']),
    (
      '--config.model.fields.widht=2',
      ["model.fields.widht is no field of 'resnet18'", "Did you mean 'width'"],
    ),
    ('--config.model.fields.width=wide', ["model.fields.width is 'wide'", 'a number']),
    (
      '--config.model.attention_fields.ordr=parallel',
      ["fields.ordr is no field of 'cbam'", "mean 'order'"],
    ),
    ('--config.model.attention_fields.spatial_kernel=big', ['an integer, such as 7']),
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
    ('configs/digit.py', ["'configs/digit.py'", 'cifar10, digits, ', "Did you mean 'digits'"]),
    ('digits:resnet50', ['it takes no argument', "'resnet50'", 'write digits.']),
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
  for part in ('imagenet2012 has no train split', str(tmp_path), 'cbam-jax prepare imagenet2012'):
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
      '--config.model.remat=TRUE',
      '--config.model.attention_fields.order=parallel',
      "--config.model.attention_fields.pools=('avg', 'lse')",
      '--config.data.resized_side=10',
      '--config.data.mean=0.25',
      '--config.data.dir=/data',
      '--config.data.std=(0.5,)',
    ],
  )
  assert config.epochs == 3
  assert config.optimizer.learning_rate == 0.25
  assert config.optimizer.nesterov is True
  assert config.model.fields.width == 0.5
  assert config.model.group_size == 16
  assert config.model.remat is True
  assert config.model.attention_fields.to_dict() == {'order': 'parallel', 'pools': ('avg', 'lse')}
  assert config.data.resized_side == 10
  assert config.data.mean == (0.25,)
  assert config.data.dir == '/data'
  assert config.data.std == (0.5,)
  assert config.optimizer.weight_decay == 5e-4  # what is not named stays
  assert load_config(DIGITS).epochs == 40


def test_none_is_an_override_where_it_is_allowed():
  overrides = ['--config.model.group_size=None', '--config.data.resized_side=none']
  config = load_config(IMAGENET, overrides)
  assert config.model.group_size is None
  assert config.data.resized_side is None
  with pytest.raises(UserError, match="batch_size is 'None'; it must be an integer"):
    load_config(IMAGENET, ['--config.batch_size=None'])


def test_overrides_come_from_the_arguments_given_alone(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['pytest', '--config.epochs=3'])
  assert load_config(DIGITS).epochs == 40


def test_load_config_raises_what_the_command_line_prints():
  with pytest.raises(UserError, match=r'no configuration file'):
    load_config('nowhere.py')


@pytest.mark.parametrize('name', ['digits', 'configs/digits.py'])
def test_the_files_that_come_along_are_found_from_anywhere(monkeypatch, tmp_path, name):
  monkeypatch.chdir(tmp_path)
  assert load_config(name) == load_config(DIGITS)
  own = tmp_path / name
  own.parent.mkdir(exist_ok=True)
  own.write_text(Path(DIGITS).read_text().replace('epochs = 40.0', 'epochs = 7.0'))
  if own.suffix:
    assert load_config(name).epochs == 7  # a file of the user's own comes first


@pytest.mark.parametrize(
  ('code', 'reason'),
  [
    ('return None', r'returned a NoneType; return what .*default_config'),
    ('return {}', 'returned a dict'),
    ("raise KeyError('x')", "'x'; mend the file"),
    ('raise ValueError', 'ValueError.*; mend the file'),
  ],
)
def test_a_file_that_makes_no_configuration_is_refused(tmp_path, code, reason):
  file = tmp_path / 'own.py'
  file.write_text(f'def get_config():\n  {code}\n')
  with pytest.raises(UserError, match=f'own.py cannot be loaded: .*{reason}'):
    load_config(str(file))


def test_a_file_may_ask_for_an_argument(tmp_path):
  file = tmp_path / 'own.py'
  file.write_text(
    'from cbam_jax.training import default_config\n'
    'def get_config(name):\n'
    '  config = default_config()\n'
    '  config.model.name = name\n'
    '  return config\n'
  )
  assert load_config(f'{file}:vgg16').model.name == 'vgg16'
  with pytest.raises(UserError, match='it needs an argument; write it after a colon'):
    load_config(str(file))


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


def test_evaluate_prints_lines_or_json(capsys, monkeypatch):
  metrics = {
    'step': 660,
    'model': 'resnet18',
    'attention': 'cbam',
    'data': 'digits',
    'preprocessing': Preprocessing(8, None, mean=(0.3,), std=(0.37,)).to_dict(),
    'loss': 0.0625,
    'top1': 0.975,
    'top5': 1.0,
    'count': 1360,
    'unread': 1,
    'classes': 16,
    'data_classes': 10,
    'top1_interval': [0.9653, 0.982],
    'top5_interval': [0.9972, 1.0],
  }
  asked = []
  monkeypatch.setattr(
    'cbam_jax.training.evaluation.evaluate', lambda workdir: asked.append(workdir) or metrics
  )
  assert main(['evaluate', '--workdir=runs/digits']) == 0
  assert capsys.readouterr().out.splitlines() == [
    'resnet18 + cbam on digits, step 660',
    '8x8, bilinear, mean (0.3), std (0.37)',
    'top-1  97.50 %   (96.53 to 98.20)   1,326 of 1,360 images',
    'top-5 100.00 %   (99.72 to 100.00)   1,360 of 1,360 images',
    'loss  0.0625',
    'the network has 16 classes and the data 10: they were compared by their places',
    '1 images could not be read, and do not count',
    'in brackets: 95 % confidence intervals',
  ]
  assert main(['evaluate', '--workdir=runs/digits', '--json']) == 0
  assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(metrics))
  assert asked == ['runs/digits'] * 2


@pytest.mark.parametrize(
  'option', ['--data-dir=there', '--batch-size=7', '--workers=2', '--class-names=names.txt']
)
def test_a_run_alone_is_evaluated_in_its_own_way(refused, tmp_path, option):
  message = refused('evaluate', f'--workdir={tmp_path}', option)
  assert f'with {option.partition("=")[0]}, name the data set as well' in message


# ---- models ----------------------------------------------------------------------------------


def test_models_lists_every_network_with_every_attention(capsys, monkeypatch):
  def count(model, image_size):
    plain = model.attention is None and model.stage_attention is None
    return Summary(image_size, 11_689_512 if plain else 11_779_392, 1_814_073_344, ())

  monkeypatch.setattr('cbam_jax.cli.models.summary', count)
  assert main(['models']) == 0
  header, *rows = capsys.readouterr().out.splitlines()
  assert header.split() == ['network', 'attention', 'params', '(M)', 'multiply-adds', '(G)']
  expected = [
    [name, attention, '11.69' if attention == 'none' else '11.78', '1.814']
    for name in list_models()
    for attention in ('none', 'se', 'bam', 'cbam')
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
    (['predict', 'a.png', '--weights=x', '--modle=y'], "Did you mean '--model'"),
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


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help(capsys, command):
  with pytest.raises(SystemExit) as exit_:
    main([command, '--help'])
  assert exit_.value.code == 0
  assert f'usage: cbam-jax {command}' in capsys.readouterr().out


def test_version(capsys):
  with pytest.raises(SystemExit) as exit_:
    main(['--version'])
  assert exit_.value.code == 0
  assert capsys.readouterr().out == f'cbam_jax {cbam_jax.__version__}\n'


# ---- a missing extra -------------------------------------------------------------------------


@pytest.mark.parametrize('command', ['train', 'evaluate'])
@pytest.mark.parametrize(
  'package',
  ['grain', 'matplotlib', 'ml_collections', 'optax', 'orbax.checkpoint', 'rich', 'tensorboardX'],
)
def test_a_missing_package_names_its_extra(refused, monkeypatch, tmp_path, command, package):
  # The package that is imported below takes this one's place in cbam_jax, too, until the end.
  monkeypatch.setattr(cbam_jax, 'training', importlib.import_module('cbam_jax.training'))
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
