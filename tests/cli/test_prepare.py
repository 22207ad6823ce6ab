"""`cbam-jax prepare`, through the real builder of ImageNet on a miniature of its archives."""

import importlib.machinery
import importlib.util
import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbam_jax.cli import main
from cbam_jax.data import open_source
from cbam_jax.data.images import decode

# tensorflow-datasets asks protobuf in a way that some of its releases mean to remove.
pytestmark = pytest.mark.filterwarnings(r'ignore:label\(\) is deprecated:DeprecationWarning')

ROOT = Path(__file__).resolve().parents[2]
CBAM_JAX = ('-c', 'import sys; from cbam_jax.cli import main; sys.exit(main())')
TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'

# The builder knows the two files by their names: in ImageNet, too, they are what they are here.
CMYK, PNG = 'n01739381_1309.JPEG', 'n02105855_2933.JPEG'
# The colour of each, which JPEG keeps within a few levels.
TRAINING = {
  'n01440764_18.JPEG': (200, 60, 20),
  'n01440764_36.JPEG': (20, 180, 60),
  CMYK: (255, 0, 0),
  PNG: (30, 60, 190),
}
LABELS = {'n01440764': 0, 'n01739381': 59, 'n02105855': 230}  # places in ImageNet's list


def encode(name: str, colour: tuple[int, int, int]) -> bytes:
  file = io.BytesIO()
  if name == CMYK:
    Image.new('CMYK', (40, 30), (*(255 - level for level in colour), 0)).save(file, 'JPEG')
  else:
    Image.new('RGB', (40, 30), colour).save(file, 'PNG' if name == PNG else 'JPEG')
  return file.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w') as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return file.getvalue()


@pytest.fixture(scope='module')
def manual_dir(tmp_path_factory) -> Path:
  """A folder with both archives: three synsets to train on, three images to test on."""
  folder = tmp_path_factory.mktemp('manual')
  synsets = {
    f'{synset}.tar': archive(
      {name: encode(name, c) for name, c in TRAINING.items() if name.startswith(synset)}
    )
    for synset in LABELS
  }
  (folder / TRAIN).write_bytes(archive(synsets))
  tests = [f'ILSVRC2012_val_{number:08d}.JPEG' for number in (1, 2, 3)]
  (folder / VALIDATION).write_bytes(archive({name: encode(name, (50, 100, 150)) for name in tests}))
  return folder


def run(*command: object) -> subprocess.CompletedProcess[str]:
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',  # compiling takes longest
    'PYTHONPATH': str(ROOT),
  }
  return subprocess.run(
    [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
  )


def prepare(manual_dir: Path, data_dir: Path) -> subprocess.CompletedProcess[str]:
  arguments = ('--manual-dir', manual_dir, '--data-dir', data_dir)
  return run(sys.executable, *CBAM_JAX, 'prepare', 'imagenet2012', *arguments)


def check(data_dir: Path) -> None:
  """That a folder holds the miniature, every image of its class and its colour."""
  source = open_source('tfds:imagenet2012', 'train', str(data_dir))
  records = [source[i] for i in range(len(source))]
  assert all(record['image'].startswith(b'\xff\xd8') for record in records)  # JPEG, all of them
  found = sorted((r['label'], decode(r['image']).mean((0, 1)).tolist()) for r in records)
  expected = sorted((LABELS[name[:9]], list(colour)) for name, colour in TRAINING.items())
  assert [label for label, _ in found] == [label for label, _ in expected]
  for (_, colour), (_, wanted) in zip(found, expected, strict=True):
    np.testing.assert_allclose(colour, wanted, atol=3)
  test = open_source('tfds:imagenet2012', 'test', str(data_dir))
  # The first three of the validation labels that ILSVRC's development kit lists.
  assert sorted(test[i]['label'] for i in range(len(test))) == [65, 230, 970]


# ---- the whole way, with TensorFlow ----------------------------------------------------------

needs_tensorflow = pytest.mark.skipif(
  importlib.util.find_spec('tensorflow') is None,
  reason="takes TensorFlow: pip install 'cbam-jax[prepare]'",
)


@pytest.mark.slow
@needs_tensorflow
def test_imagenet_is_prepared_and_trained_on_without_tensorflow(manual_dir, tmp_path):
  data_dir, workdir = tmp_path / 'data', tmp_path / 'run'
  done = prepare(manual_dir, data_dir)
  assert done.returncode == 0, done.stderr
  assert 'holds 4 train and 3 validation examples' in done.stdout
  assert f'--config.data.name=tfds:imagenet2012 --config.data.dir={data_dir}' in done.stdout
  assert 'examples/s' in done.stderr  # the progress
  check(data_dir)

  again = prepare(manual_dir, data_dir)
  assert again.returncode == 0, again.stderr
  assert again.stdout.splitlines() == done.stdout.splitlines()[-2:]

  trained = run(
    sys.executable,
    '-c',
    'import sys; from cbam_jax.cli import main; code = main();'
    'sys.exit(code or any(name.split(".")[0] == "tensorflow" for name in sys.modules))',
    'train',
    f'--config={ROOT}/configs/imagenet.py:resnet18,cbam',
    f'--workdir={workdir}',
    f'--config.data.dir={data_dir}',
    '--config.data.workers=1',
    '--config.data.image_size=32',
    '--config.data.resized_side=36',
    '--config.model.group_size=None',
    '--config.model.fields.width=0.125',
    '--config.batch_size=4',
    '--config.eval_batch_size=4',
    '--config.epochs=1',
  )
  assert trained.returncode == 0, trained.stderr
  assert '"step": 1, ' in (workdir / 'metrics.jsonl').read_text()


@pytest.mark.slow
@needs_tensorflow
def test_a_copy_in_tfrecord_is_told_what_converts_it(manual_dir, tmp_path):
  old = tmp_path / 'old'
  code = f"""
import tensorflow_datasets as tfds
builder = tfds.builder('imagenet2012', data_dir={str(old)!r}, file_format='tfrecord')
builder.download_and_prepare(
  download_config=tfds.download.DownloadConfig(
    manual_dir={str(manual_dir)!r}, try_download_gcs=False
  )
)
"""
  made = run(sys.executable, '-c', code)
  assert made.returncode == 0, made.stderr

  done = prepare(manual_dir, old)
  assert done.returncode == 2
  (command,) = [line for line in done.stderr.splitlines() if line.startswith('tfds convert_format')]
  tfds, *arguments = shlex.split(command)
  converted = run(Path(sys.executable).with_name(tfds), *arguments)
  assert converted.returncode == 0, converted.stderr
  check(old)
  again = prepare(manual_dir, old)
  assert again.returncode == 0, again.stderr
  assert 'holds 4 train and 3 validation examples' in again.stdout


@pytest.mark.slow
@needs_tensorflow
def test_a_broken_archive_ends_without_a_traceback(manual_dir, tmp_path):
  broken = tmp_path / 'manual'
  broken.mkdir()
  (broken / VALIDATION).write_bytes((manual_dir / VALIDATION).read_bytes())
  (broken / TRAIN).write_bytes((manual_dir / TRAIN).read_bytes()[:3000])
  done = prepare(broken, tmp_path / 'data')
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith('cbam-jax prepare: imagenet2012 cannot be prepared: ')
  assert last.endswith('run the same command again.')
  mended = prepare(manual_dir, tmp_path / 'data')
  assert mended.returncode == 0, mended.stderr
  check(tmp_path / 'data')


# ---- what is refused before any work ---------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
  """Runs `prepare` on input that it refuses, and returns what it says."""
  # Whether TensorFlow is there is all that is asked of it by then.
  found, spec = importlib.util.find_spec, importlib.machinery.ModuleSpec('tensorflow', None)
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, package=None: spec if name == 'tensorflow' else found(name, package),
  )

  def run(*arguments: object) -> str:
    data_dir = tmp_path / 'data'
    assert main(['prepare', *map(str, arguments), f'--data-dir={data_dir}']) == 2
    output = capsys.readouterr()
    assert output.out == ''
    assert not data_dir.exists()
    return output.err

  return run


def test_an_unknown_set_is_refused(refused):
  message = refused('imagnet2012')
  assert "no set 'imagnet2012'" in message
  assert "Did you mean 'imagenet2012'" in message


def test_an_unknown_version_is_refused(refused):
  assert "'imagenet2012:99.0.0' is no version" in refused('imagenet2012:99.0.0')


def test_a_set_without_images_is_refused(refused):
  assert 'have no image; choose a set for image classification' in refused('imdb_reviews')


def test_archives_that_are_missing_are_named(refused, manual_dir, tmp_path):
  assert 'name the folder of the fetched files in --manual-dir' in refused('imagenet2012')
  absent = refused('imagenet2012', f'--manual-dir={tmp_path / "absent"}')
  assert "absent', which is no folder" in absent
  assert 'https://image-net.org' in absent
  half = tmp_path / 'half'
  half.mkdir()
  assert f'has no {TRAIN} and no {VALIDATION}.' in refused('imagenet2012', f'--manual-dir={half}')
  (half / TRAIN).write_bytes(b'')
  assert f'has no {VALIDATION}.' in refused('imagenet2012', f'--manual-dir={half}')


@pytest.mark.parametrize('package', ['tensorflow', 'tensorflow_datasets'])
def test_a_missing_package_names_the_extra(monkeypatch, capsys, tmp_path, package):
  monkeypatch.setitem(sys.modules, package, None)
  assert main(['prepare', 'imagenet2012', f'--data-dir={tmp_path / "data"}']) == 2
  error = capsys.readouterr().err
  assert f'{package} cannot be imported' in error
  assert "pip install 'cbam-jax[prepare]'" in error
