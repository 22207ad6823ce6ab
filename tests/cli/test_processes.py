"""The commands as a person starts them, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cbam_jax.layers import onednn
from cbam_jax.models import create_model, summary

ROOT = Path(__file__).resolve().parents[2]
CBAM_JAX = ('-c', 'import sys; from cbam_jax.cli import main; sys.exit(main())')

# An epoch of a narrow network of two blocks.
SHORT = (
  '--config.epochs=1',
  '--config.model.fields.width=0.125',
  '--config.model.fields.stage_sizes=(1, 1)',
)


def python(
  *arguments: object, cwd: Path = ROOT, **variables: str | None
) -> subprocess.CompletedProcess[str]:
  """Runs Python on one CPU device, beside this project's code; of `variables`, None unsets."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',  # compiling takes longest
    'PYTHONPATH': str(ROOT),
    'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    **variables,
  }
  environment = {name: value for name, value in environment.items() if value is not None}
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_train_then_evaluate(tmp_path):
  workdir = tmp_path / 'run'
  trained = python(
    'train.py',
    '--config=configs/digits.py',
    f'--workdir={workdir}',
    *SHORT,
  )
  assert trained.returncode == 0, trained.stderr
  assert trained.stderr == ''
  assert 'starting, 22 steps of 64 images on 1 x cpu' in trained.stdout
  assert {path.name for path in workdir.iterdir()} > {
    'checkpoints',
    'config.json',
    'curves.png',
    'metrics.jsonl',
  }
  logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [(entry['step'], entry['split']) for entry in logged] == [(22, 'train'), (22, 'test')]

  evaluated = python(*CBAM_JAX, 'evaluate', '--workdir', workdir, '--json')
  assert evaluated.returncode == 0, evaluated.stderr
  assert evaluated.stderr == ''
  result = json.loads(evaluated.stdout)
  assert result['count'] == 360
  for key in ('step', 'loss', 'top1', 'top5'):
    assert result[key] == pytest.approx(logged[1][key], rel=1e-6)


def test_with_no_folder_for_programs_onednn_is_called(tmp_path):
  if not onednn.is_found():
    pytest.skip('this XLA does not call oneDNN as it was tried')
  told = {
    'JAX_COMPILATION_CACHE_DIR': None,
    'XDG_CACHE_HOME': str(tmp_path / 'cache'),
    'ONEDNN_VERBOSE': '1',
  }
  workdir = tmp_path / 'run'
  run = ('--config=digits', f'--workdir={workdir}', *SHORT)
  for command in (('train', *run), ('evaluate', '--workdir', workdir)):
    done = python(*CBAM_JAX, *command, **told)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    assert 'exec,cpu,convolution' in done.stdout
  assert not (tmp_path / 'cache' / 'cbam_jax').exists()


def test_models_needs_no_extra(tmp_path):
  """The networks' table, where whatever comes with an extra cannot be imported."""
  missing = (
    'grain',
    'matplotlib',
    'ml_collections',
    'PIL',
    'pycocotools',
    'sklearn',
    'tensorboardX',
    'tensorflow',
    'tensorflow_datasets',
    'torch',
  )
  code = (
    f'import sys; sys.modules.update(dict.fromkeys({missing}))\n'
    'from cbam_jax.cli import main\n'
    'sys.exit(main())'
  )
  listed = python('-c', code, 'models', 'resnet18', '--image-size=64', '--json', cwd=tmp_path)
  assert listed.returncode == 0, listed.stderr
  entries = json.loads(listed.stdout)
  for entry, attention in zip(entries, ('none', 'se', 'bam', 'cbam'), strict=True):
    counts = summary(create_model('resnet18', attention=attention), 64)
    assert (entry['attention'], entry['params']) == (attention, counts.params)
