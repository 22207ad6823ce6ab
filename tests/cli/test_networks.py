"""What one does with a network from the command line: predict, evaluate, convert."""

import dataclasses
import json
import math
import os
import struct
import sys
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from cbam_jax import create_model, to_torch
from cbam_jax.cli import main
from cbam_jax.cli.convert import write_state_dict
from cbam_jax.interop.pretrained import save_pretrained
from tests.cli.trained import (
  CLASSES,
  FIELDS,
  PREPROCESSING,
  network,
  picture,
  probabilities,
  write_pictures,
)
from tests.marks import first

# How the command line is told what the folder of a network knows.
TOLD = [
  '--model=resnet18',
  '--attention=cbam',
  '--field=stem=cifar',
  '--field=width=0.125',
  '--field=stage_sizes=(1, 1)',
]
PICTURE = ['--image-size=32', '--resized-side=36', '--interpolation=bicubic']


@pytest.fixture(scope='module')
def trained():
  return network()


@pytest.fixture(scope='module')
def home(tmp_path_factory, trained):
  """A folder with the network as folder 'net' and file 'net.safetensors', and 'pictures'."""
  home = tmp_path_factory.mktemp('home')
  save_pretrained(
    home / 'net',
    trained.model,
    trained.variables,
    preprocessing=trained.preprocessing,
    classes=trained.classes,
  )
  arrays = to_torch(trained.model, trained.variables)
  prefixed = {f'module.{name}': array for name, array in arrays.items()}
  safetensors.numpy.save_file(prefixed, home / 'net.safetensors')
  (home / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')
  write_pictures(home / 'pictures')
  return home


@pytest.fixture
def refused(capsys):
  """Runs a command that has to be refused, and returns what it says of it."""

  def run(*arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert 'Traceback' not in output.err
    return output.err

  return run


# ---- predict ---------------------------------------------------------------------------------


def test_predict_names_the_most_probable_classes(home, trained, capsys):
  pictures = home / 'pictures'
  assert main(['predict', str(pictures), f'--weights={home / "net"}', '--json', '--top=2']) == 1
  output = capsys.readouterr()
  entries = {entry['image']: entry for entry in map(json.loads, output.out.splitlines())}
  assert sorted(entries) == sorted(str(path) for path in pictures.iterdir())
  broken = entries.pop(str(pictures / 'broken.jpg'))
  assert broken['error'] == 'it is no picture of a known kind'
  assert '1 of 4 pictures could not be read' in output.err
  for path, entry in entries.items():
    expected = probabilities(trained, pictures / path)
    order = np.argsort(-expected)[:2]
    assert [row['class'] for row in entry['predictions']] == order.tolist()
    assert [row['name'] for row in entry['predictions']] == [CLASSES[i] for i in order]
    given = [row['probability'] for row in entry['predictions']]
    np.testing.assert_allclose(given, expected[order], rtol=1e-4)


def test_predict_from_a_file_of_arrays(home, trained, capsys):
  file, path = home / 'net.safetensors', home / 'pictures' / '0.jpg'
  command = ['predict', str(path), f'--weights={file}', *TOLD, *PICTURE]
  assert main([*command, f'--class-names={home / "classes.txt"}']) == 0
  first, *rows = capsys.readouterr().out.splitlines()
  assert first == str(path)
  expected = probabilities(trained, path)
  order = np.argsort(-expected)
  assert [row.split() for row in rows] == [
    [f'{100 * expected[i]:.2f}', '%', str(i), CLASSES[i]] for i in order
  ]


def test_predict_numbers_the_classes_without_names(home, capsys):
  path = home / 'pictures' / '1.jpg'
  command = ['predict', str(path), f'--weights={home / "net.safetensors"}', *TOLD, *PICTURE]
  assert main([*command, '--top=1']) == 0
  assert 'class ' in capsys.readouterr().out


def test_predict_takes_patterns_and_each_picture_once(home, capsys):
  pictures = home / 'pictures'
  names = [str(pictures / '[01].jpg'), str(pictures / '0.jpg')]
  assert main(['predict', *names, f'--weights={home / "net"}', '--json']) == 0
  entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [entry['image'] for entry in entries] == [str(pictures / f'{i}.jpg') for i in (0, 1)]


def test_predict_shows_names_of_any_bytes(home, tmp_path, capsys):
  file = tmp_path / os.fsdecode(b'caf\xe9.jpg')
  file.write_bytes((home / 'pictures' / 'broken.jpg').read_bytes())
  command = ['predict', str(file), f'--weights={home / "net"}']
  assert main(command) == 1
  first, _ = capsys.readouterr().out.splitlines()
  assert first == f'{tmp_path}/caf\ufffd.jpg'
  assert main([*command, '--json']) == 1
  assert json.loads(capsys.readouterr().out)['image'] == first


def claiming(width, height):
  """A PNG file of a few bytes that claims a size."""

  def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


def test_a_picture_that_claims_to_be_huge_is_refused(home, tmp_path, capsys):
  (tmp_path / 'bomb.png').write_bytes(claiming(100_000, 100_000))
  assert main(['predict', str(tmp_path / 'bomb.png'), f'--weights={home / "net"}']) == 1
  assert 'cannot be read' in capsys.readouterr().out


def test_predict_needs_pictures(refused, home, tmp_path):
  assert 'is no file, and no folder or pattern of pictures' in refused(
    'predict', tmp_path, f'--weights={home / "net"}'
  )
  assert '--top is 0' in refused('predict', home, f'--weights={home / "net"}', '--top=0')


# ---- which network ---------------------------------------------------------------------------


def test_a_file_of_arrays_needs_its_network(refused, home):
  picture, file = home / 'pictures' / '0.jpg', home / 'net.safetensors'
  message = refused('predict', picture, f'--weights={file}')
  assert 'holds arrays alone; tell the network that they are of with --model' in message
  message = refused('predict', picture, f'--weights={file}', '--model=resnet18')
  assert 'does not hold resnet18 with --attention none' in message
  assert 'left over' in message
  message = refused('predict', picture, f'--weights={file}', '--model=resnet5')
  assert "Did you mean 'resnet50'" in message
  message = refused('predict', picture, f'--weights={file}', *TOLD, '--field=widht=2')
  assert "Did you mean 'width'" in message
  message = refused('predict', picture, f'--weights={file}', *TOLD, '--field=2')
  assert 'write NAME=VALUE' in message
  message = refused('predict', picture, f'--weights={file}', *TOLD, '--attention-field=ordre=x')
  assert "no field 'ordre'" in message
  message = refused('predict', picture, f'--weights={file}', *TOLD, '--layout=tim')
  assert "Did you mean 'timm'" in message


@pytest.mark.parametrize(
  ('option', 'message'),
  [
    ('--field=stage_sizes=3', 'stage_sizes is 3; give a list of integers of at least 1'),
    ('--field=stage_sizes=()', 'must be the number of blocks of each stage'),
    ('--field=width=1e300', "'width': 1e+300} and the attention cbam with {} cannot be made"),
    ('--field=dtype=nope', "dtype is 'nope'; give one of bfloat16, float16"),
    ('--field=stage_attention=bam', "no field 'stage_attention'"),
    ('--attention-field=dtype=nope', "dtype is 'nope'; give one of bfloat16, float16"),
  ],
)
def test_a_field_of_a_wrong_value(refused, home, option, message):
  picture, file = home / 'pictures' / '0.jpg', home / 'net.safetensors'
  told = [*TOLD[:2], option]
  assert message in refused('predict', picture, f'--weights={file}', *told)


def test_a_misspelt_file_of_arrays(refused, home):
  picture = home / 'pictures' / '0.jpg'
  message = refused('predict', picture, f'--weights={home / "nett.safetensors"}', *TOLD)
  assert f'there is no file {home / "nett.safetensors"}; check the path' in message
  assert "Did you mean 'net.safetensors'" in message
  message = refused('predict', picture, f'--weights={home / "nowhere" / "w.pth"}')
  assert 'there is no file' in message
  assert 'Did you mean' not in message


def test_a_folder_tells_its_network_itself(refused, home):
  picture = home / 'pictures' / '0.jpg'
  message = refused('predict', picture, f'--weights={home / "net"}', *TOLD)
  assert 'tells its network itself; leave out --model, --field, --attention, or name' in message


def test_a_part_of_a_folder(refused, home):
  picture, file = home / 'pictures' / '0.jpg', home / 'net' / 'model.safetensors'
  message = refused('predict', picture, f'--weights={file}', *TOLD)
  assert f'is a part of a folder; name the folder, {home / "net"}' in message


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--resized-side=big'], "--resized-side is 'big'; give a number of pixels, or none"),
    (['--image-size=50'], 'a crop of 50 pixels from a side of 36'),
    (['--mean', '0.5'], 'give one number each'),
    (['--class-names=nowhere.txt'], '--class-names=nowhere.txt cannot be read'),
    ([f'--class-names={__file__}'], 'lines for 3 classes'),
  ],
)
def test_what_does_not_fit_the_network_is_refused(refused, home, options, message):
  picture = home / 'pictures' / '0.jpg'
  assert message in refused('predict', picture, f'--weights={home / "net"}', *options)


def test_no_weights_at_all(capsys, home):
  with pytest.raises(SystemExit):
    main(['predict', str(home / 'pictures')])
  assert 'one of the arguments --weights --workdir is required' in capsys.readouterr().err


# ---- evaluate --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
  """A folder of a data set: 11 pictures, labelled at random."""
  root = tmp_path_factory.mktemp('labelled')
  rng = np.random.default_rng(0)
  for name in CLASSES:
    for split in ('train', 'test'):
      (root / split / name).mkdir(parents=True)
  for seed in range(11):
    name = CLASSES[rng.integers(3)]
    PIL.Image.fromarray(picture(seed)).save(root / 'test' / name / f'{seed}.png')
  return root


def wilson(right, count, z=1.959963984540054):
  """The interval by its formula (Wilson, 1927)."""
  p = right / count
  centre = (p + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
  return centre - half, centre + half


@pytest.mark.parametrize('resized_side', first(1, [36, None]))
def test_evaluate_counts_every_picture(home, trained, labelled, capsys, resized_side):
  command = ['evaluate', f'--weights={home / "net"}', '--data=folder', f'--data-dir={labelled}']
  command += [] if resized_side == 36 else ['--resized-side=none']
  preprocessing = dataclasses.replace(PREPROCESSING, resized_side=resized_side)
  trained = trained._replace(preprocessing=preprocessing)
  assert main([*command, '--json']) == 0
  metrics = json.loads(capsys.readouterr().out)
  right = sum(
    int(np.argmax(probabilities(trained, path)) == label)
    for label, name in enumerate(CLASSES)
    for path in (labelled / 'test' / name).iterdir()
  )
  assert 0 < right < 11
  assert metrics['count'] == 11
  assert metrics['unread'] == 0
  assert metrics['top1'] == pytest.approx(right / 11)
  assert metrics['top1_interval'] == pytest.approx(wilson(right, 11))
  assert metrics['preprocessing'] == json.loads(json.dumps(preprocessing.to_dict()))

  assert main(command) == 0
  first, second, top1, *_ = capsys.readouterr().out.splitlines()
  assert first == 'resnet18 + cbam on folder'
  assert second == str(preprocessing)
  assert top1.startswith(f'top-1 {100 * right / 11:6.2f} %')
  assert top1.endswith(f'{right} of 11 images')


def test_evaluate_needs_a_data_set_that_fits(refused, home, tmp_path):
  weights = f'--weights={home / "net"}'
  assert 'name the data set' in refused('evaluate', weights)
  message = refused('evaluate', weights, '--data=digits')
  assert 'the network has 3 classes (model.num_classes) but digits has 10' in message
  message = refused('evaluate', weights, '--data=imagnet2012', f'--data-dir={tmp_path}')
  assert "Did you mean 'imagenet2012'" in message
  assert '--batch-size is 0' in refused('evaluate', weights, '--batch-size=0')
  message = refused('evaluate', f'--workdir={tmp_path}', '--image-size=32')
  assert 'with --image-size, name the data set as well' in message


# ---- convert ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_of_arrays_does_not_tell_what_images_are(tmp_path, refused):
  model = create_model('resnet18', attention='cbam', **FIELDS)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
  safetensors.numpy.save_file(to_torch(model, variables), tmp_path / 'grey.safetensors')
  command = ['convert', str(tmp_path / 'grey.safetensors'), str(tmp_path / 'net'), *TOLD]
  message = refused(*command)
  assert 'takes images of 1 channels, but mean is (0.485, 0.456, 0.406)' in message
  assert 'one number a channel (--mean, --std)' in message
  assert not (tmp_path / 'net').exists()
  assert main([*command, '--mean=0.3', '--std=0.37']) == 0


def convert(*arguments) -> int:
  return main(['convert', *map(str, arguments)])


def assert_same_files(one, other):
  one, other = safetensors.numpy.load_file(one), safetensors.numpy.load_file(other)
  one = {name.removeprefix('module.'): array for name, array in one.items()}
  assert one.keys() == other.keys()
  for name, array in one.items():
    assert array.dtype == other[name].dtype
    np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize('format', [[], ['--format=safetensors']])
def test_a_round_trip_changes_no_bit(home, tmp_path, capsys, format):
  assert convert(home / 'net.safetensors', tmp_path / 'net', *TOLD, *PICTURE, *format) == 0
  assert (tmp_path / 'net' / ('model.safetensors' if format else 'variables')).exists()
  assert convert(tmp_path / 'net', tmp_path / 'back.safetensors') == 0
  assert capsys.readouterr().out.splitlines() == [
    f'{tmp_path / "net"} is written',
    f'{tmp_path / "back.safetensors"} is written',
  ]
  assert_same_files(home / 'net.safetensors', tmp_path / 'back.safetensors')


def test_another_layout_and_back(tmp_path):
  se = network('se')
  save_pretrained(tmp_path / 'net', se.model, se.variables, preprocessing=PREPROCESSING)
  assert convert(tmp_path / 'net', tmp_path / 'timm.safetensors', '--to-layout=timm') == 0
  told = ['--model=resnet18', '--attention=se', *TOLD[2:]]
  assert convert(tmp_path / 'timm.safetensors', tmp_path / 'again', *told) == 0
  assert convert(tmp_path / 'again', tmp_path / 'back.safetensors', '--to-layout=timm') == 0
  assert_same_files(tmp_path / 'timm.safetensors', tmp_path / 'back.safetensors')


def test_what_a_layout_cannot_hold_is_refused(refused, home, tmp_path):
  message = refused('convert', home / 'net', tmp_path / 'timm.safetensors', '--to-layout=timm')
  assert 'not 0, and without a place in this layout' in message
  assert not list(tmp_path.iterdir())


def test_convert_refuses_what_it_would_pass_over(refused, home, tmp_path):
  message = refused('convert', home / 'net', tmp_path / 'a.safetensors', '--format=orbax')
  assert '--format is of a folder' in message
  message = refused('convert', home / 'net', tmp_path / 'a', '--to-layout=timm')
  assert 'is taken for a folder' in message
  message = refused('convert', home / 'net', tmp_path / 'a.pt')
  assert r'PyTorch files end in .pth or .safetensors' in message
  assert not list(tmp_path.iterdir())


def test_a_pth_is_read_by_torch(home, tmp_path):
  torch = pytest.importorskip('torch')
  assert convert(home / 'net', tmp_path / 'net.pth') == 0
  state_dict = torch.load(tmp_path / 'net.pth', weights_only=True)
  expected = safetensors.numpy.load_file(home / 'net.safetensors')
  assert list(state_dict) == list(to_torch(network().model, network().variables))
  for name, tensor in state_dict.items():
    np.testing.assert_array_equal(tensor.numpy(), expected[f'module.{name}'])
  torch.save({'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}, tmp_path / 'w.pth')
  assert convert(tmp_path / 'w.pth', tmp_path / 'back.safetensors', *TOLD) == 0
  assert_same_files(home / 'net.safetensors', tmp_path / 'back.safetensors')


def test_bfloat16_in_a_pth(tmp_path, monkeypatch):
  class Tensor:
    def __init__(self, array):
      if array.dtype not in (np.int16, np.int64):
        raise TypeError(f"can't convert np.ndarray of type {array.dtype}")
      self.array = array

    def view(self, dtype):
      return self.array.view(dtype)

  saved = {}

  def save(tensors, file):
    saved.update(tensors)
    file.write_bytes(b'')

  torch = types.SimpleNamespace(from_numpy=Tensor, bfloat16=jnp.bfloat16, save=save)
  monkeypatch.setitem(sys.modules, 'torch', torch)
  halves = np.arange(6).reshape(2, 3).astype(jnp.bfloat16)
  write_state_dict(tmp_path / 'w.pth', {'a': halves, 'n': np.array(0)})
  np.testing.assert_array_equal(saved['a'], halves)
  assert saved['a'].dtype == jnp.bfloat16
  assert saved['n'].array.dtype == np.int64


# ---- a run -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_a_network_as_well(tmp_path, capsys, monkeypatch):
  from cbam_jax.training import train
  from tests.chaos.small_digits import get_config

  config = get_config()
  config.model.attention = 'none'
  monkeypatch.chdir(tmp_path)  # paths that are not absolute, as people write them
  train(config, 'run')
  capsys.readouterr()
  assert main(['evaluate', '--workdir=run', '--json']) == 0
  metrics = json.loads(capsys.readouterr().out)
  assert metrics['data'] == 'digits'
  assert metrics['count'] == 360
  assert main(['evaluate', '--workdir=run', '--data=digits', '--json']) == 0
  again = json.loads(capsys.readouterr().out)
  assert again.pop('loss') == pytest.approx(metrics.pop('loss'), rel=1e-6)  # in other batches
  assert {**again, 'step': metrics['step']} == metrics
  PIL.Image.fromarray(np.full((20, 20), 200, np.uint8)).save('grey.png')
  assert main(['predict', 'grey.png', '--workdir=run', '--json', '--top=10']) == 0
  entry = json.loads(capsys.readouterr().out)
  assert sorted(row['name'] for row in entry['predictions']) == [str(digit) for digit in range(10)]
  assert sum(row['probability'] for row in entry['predictions']) == pytest.approx(1, abs=1e-5)
  assert convert('run', 'net') == 0
  assert convert('net', 'net.safetensors') == 0
  assert 'layer2.0.conv1.weight' in safetensors.numpy.load_file('net.safetensors')
