"""Artifacts that run without this package."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from cbam_jax import UserError
from cbam_jax.cli import main
from cbam_jax.errors import RunError
from cbam_jax.interop.export import export_onnx, export_stablehlo, load_stablehlo
from tests.cli.trained import network

ALONE = """
import sys
import jax, numpy as np
from jax import export
network = export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
np.save(sys.argv[3], jax.jit(network.call)(np.load(sys.argv[2])))
assert not any(name.startswith('cbam_jax') for name in sys.modules)
"""


@pytest.fixture(scope='module')
def trained():
  return network()


@pytest.fixture(scope='module')
def artifact(trained, tmp_path_factory):
  path = tmp_path_factory.mktemp('artifact') / 'net.stablehlo'
  assert export_stablehlo(trained.model, trained.variables, path, image_size=32) < 1e-5
  return path


def test_it_runs_in_a_process_that_knows_nothing_of_this_package(trained, artifact, tmp_path):
  images = np.random.default_rng(1).standard_normal((5, 32, 32, 3), np.float32)
  np.save(tmp_path / 'images.npy', images)
  files = [artifact, tmp_path / 'images.npy', tmp_path / 'logits.npy']
  subprocess.run([sys.executable, '-P', '-c', ALONE, *files], check=True, cwd=tmp_path)
  expected = jax.jit(lambda x: trained.model.apply(trained.variables, x, train=False))(images)
  np.testing.assert_allclose(np.load(files[2]), expected, rtol=1e-4, atol=1e-5)
  again = jax.jit(load_stablehlo(artifact).call)(images[:2])
  np.testing.assert_allclose(again, expected[:2], rtol=1e-4, atol=1e-5)


def test_a_difference_leaves_no_file(trained, tmp_path):
  with pytest.raises(RunError, match='nothing is written'):
    export_stablehlo(
      trained.model, trained.variables, tmp_path / 'net', image_size=32, tolerance=-1.0
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('keep', [0, 10, 1000])
def test_a_damaged_artifact_is_refused(artifact, tmp_path, keep):
  (tmp_path / 'net').write_bytes(artifact.read_bytes()[:keep])
  with pytest.raises(UserError, match='is damaged or no artifact'):
    load_stablehlo(tmp_path / 'net')
  with pytest.raises(UserError, match='cannot be read'):
    load_stablehlo(tmp_path / 'none')


def test_variables_of_another_network_are_refused(trained, tmp_path):
  plain = network('none')
  with pytest.raises(UserError, match='the variables are not those of this ResNet'):
    export_stablehlo(trained.model, plain.variables, tmp_path / 'net', image_size=32)
  with pytest.raises(SystemExit):
    main(['export', '--weights=x', '--format=pickle', '--out=y'])


def test_onnx(trained, tmp_path):
  for package in ('jax2onnx', 'onnx', 'onnxruntime'):
    pytest.importorskip(package)
  path = tmp_path / 'net.onnx'
  assert export_onnx(trained.model, trained.variables, path, image_size=32) < 1e-4
  assert path.stat().st_size > 10_000
