"""The paper authors' released checkpoints, by their key layout, through all one does with them.

The file is as they publish it: names with `module.`, in a dictionary with 'state_dict' (which only
a .pth can have); the weights are those behind the golden files.
"""

import functools
import json

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from cbam_jax import create_model, from_torch, load_state_dict
from cbam_jax.cli import main
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.interop.export import load_stablehlo
from tests.cli.test_networks import assert_same_files
from tests.cli.trained import picture, probabilities
from tests.golden import weights

CASES = {
  'cifar100_resnet18': (['--model=resnet18', '--field=stem=cifar'], 32),
  'imagenet_resnet50': (['--model=resnet50'], 224),
}


@pytest.fixture(params=list(CASES))
def case(request):
  return request.param


@pytest.fixture(params=['safetensors', 'pth'])
def released(request, case, golden_file, tmp_path):
  """The file."""
  state_dict = weights.state_dict(golden_file(f'official_{case}_cbam.keys.json'))
  prefixed = {f'module.{name}': array for name, array in state_dict.items()}
  file = tmp_path / f'RELEASED.{request.param}'
  if request.param == 'safetensors':
    safetensors.numpy.save_file(prefixed, file)
  else:
    torch = pytest.importorskip('torch')
    tensors = {name: torch.from_numpy(array) for name, array in prefixed.items()}
    torch.save({'epoch': 90, 'arch': 'resnet50', 'state_dict': tensors, 'best_prec1': 77.3}, file)
  return file


@pytest.mark.slow
def test_the_released_layout_goes_through_everything(released, case, tmp_path, capsys):
  told, side = CASES[case]
  told = [*told, '--attention=cbam', f'--image-size={side}', f'--resized-side={side * 8 // 7}']
  weights_told = [f'--weights={released}', *told]
  fields = {'stem': 'cifar', 'num_classes': 100} if side == 32 else {}
  model = create_model(told[0].removeprefix('--model='), attention='cbam', **fields)

  folder = tmp_path / 'data'
  for split in ('train', 'test'):
    for label in range(3):
      (folder / split / str(label)).mkdir(parents=True)
      for seed in range(label + 1):
        image = PIL.Image.fromarray(picture(seed + 3 * label, 240, 260))
        image.save(folder / split / str(label) / f'{seed}.png')
  command = ['evaluate', *weights_told, '--data=folder', f'--data-dir={folder}', '--json']
  assert main(command) == 0
  assert json.loads(capsys.readouterr().out)['count'] == 6

  path = folder / 'test' / '0' / '0.png'
  assert main(['predict', str(path), *weights_told, '--json']) == 0
  entry = json.loads(capsys.readouterr().out)
  variables = from_torch(model, load_state_dict(released))
  made = type('Network', (), {
    'model': model, 'variables': variables,
    'preprocessing': Preprocessing(side, side * 8 // 7),
  })  # fmt: skip
  expected = probabilities(made, path)
  assert [row['class'] for row in entry['predictions']] == np.argsort(-expected)[:5].tolist()

  assert main(['explain', str(path), *weights_told, f'--out={tmp_path / "seen"}']) == 0
  assert (tmp_path / 'seen' / 'report.html').stat().st_size > 10_000

  assert main(['convert', str(released), str(tmp_path / 'net'), *told]) == 0
  assert main(['convert', str(tmp_path / 'net'), str(tmp_path / 'back.safetensors')]) == 0
  if released.suffix == '.safetensors':
    assert_same_files(released, tmp_path / 'back.safetensors')

  artifact = tmp_path / 'net.stablehlo'
  assert main(['export', *weights_told, '--format=stablehlo', f'--out={artifact}']) == 0
  images = np.random.default_rng(0).standard_normal((2, side, side, 3), np.float32)
  expected = jax.jit(functools.partial(model.apply, train=False))(variables, images)
  logits = jax.jit(load_stablehlo(artifact).call)(images)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
