"""Artifacts that run without this package."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax import export

from cbam_jax import CBAM, UserError, create_model, to_torch
from cbam_jax.attention import cbam
from cbam_jax.cli import main
from cbam_jax.errors import MissingExtraError, RunError
from cbam_jax.interop.export import (
  PLATFORMS,
  _traceable,
  export_onnx,
  export_stablehlo,
  load_stablehlo,
)
from cbam_jax.models import vgg
from tests.cli.trained import FIELDS, PREPROCESSING, network
from tests.layers.random_variables import random_variables
from tests.models.networks import ALL

# Every kind of network, and every attention.
QUICK = {
  ('resnet18', 'cbam'),
  ('resnet18', 'bam'),
  ('resnext50_32x4d', 'none'),
  ('mobilenet_v1', 'se'),
  ('vgg16', 'cbam'),
}


@pytest.fixture
def small_vgg(monkeypatch):
  """Shrinks VGG's first dense layer, which has 100 million of its parameters, 49-fold."""
  monkeypatch.setattr(vgg, 'POOLED_SIDE', 1)


@pytest.fixture(scope='module')
def trained():
  return network()


@pytest.fixture(scope='module')
def artifact(trained, tmp_path_factory):
  path = tmp_path_factory.mktemp('artifact') / 'net.stablehlo'
  assert export_stablehlo(trained.model, trained.variables, path, image_size=32) < 1e-5
  return path


def images(count):
  return np.random.default_rng(5).standard_normal((count, 32, 32, 3), np.float32)


def pixels(count):
  return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def logits(trained, x):
  apply = jax.jit(functools.partial(trained.model.apply, train=False))
  return np.asarray(apply(trained.variables, x))


def tamed_variables(model, side=64):
  """Random ones whose blocks add little, so that rounding grows as in a trained network."""
  variables = random_variables(model, jnp.zeros((1, side, side, 3)), train=False)
  return jax.tree.map_with_path(
    lambda path, a: 0.3 * a if path[-1].key == 'scale' else a, variables
  )


# ---- StableHLO -------------------------------------------------------------------------------

ALONE = """
import sys
import jax, numpy as np
from jax import export
network = export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))
assert network.platforms == ('cpu', 'cuda', 'tpu')
np.save(sys.argv[3], jax.jit(network.call)(np.load(sys.argv[2])))
assert not any(name.split('.')[0] in ('cbam_jax', 'flax') for name in sys.modules)
"""


def test_it_runs_in_a_process_that_knows_nothing_of_this_package(trained, artifact, tmp_path):
  np.save(tmp_path / 'images.npy', images(5))
  files = [artifact, tmp_path / 'images.npy', tmp_path / 'logits.npy']
  subprocess.run([sys.executable, '-P', '-c', ALONE, *files], check=True, cwd=tmp_path)
  expected = logits(trained, images(5))
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(np.load(files[2]), expected, rtol=0, atol=1e-5)


def test_the_batch_is_of_any_size(trained, artifact):
  loaded = load_stablehlo(artifact)
  assert [aval.str_short() for aval in loaded.in_avals] == ['float32[b,32,32,3]']
  assert [aval.str_short() for aval in loaded.out_avals] == ['float32[b,3]']
  again = jax.jit(loaded.call)(images(2))
  np.testing.assert_allclose(again, logits(trained, images(2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    pytest.param(*case, id='-'.join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in ALL
  ],
)
def test_every_network_lowers_with_a_symbolic_batch(name, attention):
  assert_lowers(name, attention)


def test_kernels_of_one_platform_are_left_out():
  assert_lowers('resnet18', functools.partial(CBAM, implementation='pallas'))


def test_kernels_of_a_gpu_stay_there(monkeypatch):
  monkeypatch.setattr(cbam, '_has_triton', lambda device: True)
  assert_lowers('resnet18', 'cbam')


def assert_lowers(name, attention):
  model = create_model(name, attention=attention, num_classes=5)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), image)
  function, batch = _traceable(model, variables, 64, 3, None)
  exported = export.export(jax.jit(function), platforms=PLATFORMS)(variables, batch)
  assert [aval.str_short() for aval in exported.out_avals] == ['float32[b,5]']


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'attention', 'fields', 'limit'),
  [
    ('resnet50', 'cbam', {}, 1e-5),
    ('resnet18', 'bam', {}, 1e-5),
    ('vgg16', 'cbam', {}, 1e-5),
    ('mobilenet_v1', 'se', {'width': 0.7}, 1e-5),
    ('resnet18', functools.partial(CBAM, order='parallel'), {}, 1e-5),
    ('resnet50', 'cbam', {'dtype': jnp.bfloat16}, 0.078),
  ],
)
def test_logits_of_other_networks(tmp_path, small_vgg, name, attention, fields, limit):
  model = create_model(name, attention=attention, num_classes=5, **fields)
  variables = tamed_variables(model)
  assert export_stablehlo(model, variables, tmp_path / 'net', image_size=64) < limit


@pytest.mark.slow
def test_float64(tmp_path, x64):
  types = {'dtype': jnp.float64, 'param_dtype': jnp.float64}
  model = create_model('resnet18', attention='cbam', **types, **FIELDS)
  variables = tamed_variables(model, 32)
  assert export_stablehlo(model, variables, tmp_path / 'net', image_size=32) < 1e-10


# ---- what goes wrong -------------------------------------------------------------------------

# Stands in for the other process: writes logits of 0, unless something is done to them.
ZEROS = """
import sys
import numpy as np
batches = [np.zeros((len(x), 3), np.float32) for x in np.load(sys.argv[2]).values()]
{}
np.savez(sys.argv[3], *batches)
"""


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('', r"differ from the network's own by 1\.0e\+00 of the largest, and 1\.0e-04 is allowed"),
    ('batches[1][:] = np.nan', r"differ from the network's own by nan of the largest"),
    ('raise MemoryError("too little")', r'does not run in a process .*MemoryError: too little'),
  ],
)
def test_a_difference_leaves_what_was_there(trained, tmp_path, monkeypatch, change, message):
  monkeypatch.setattr('cbam_jax.interop.export._RUN_STABLEHLO', ZEROS.format(change))
  path = tmp_path / 'net'
  path.write_text('an older one')
  with pytest.raises(RunError, match=message):
    export_stablehlo(trained.model, trained.variables, path, image_size=32)
  assert path.read_text() == 'an older one'
  assert list(tmp_path.iterdir()) == [path]


def test_a_difference_that_is_allowed(trained, tmp_path, monkeypatch):
  monkeypatch.setattr('cbam_jax.interop.export._RUN_STABLEHLO', ZEROS.format(''))
  options = {'image_size': 32, 'tolerance': 2.0}
  assert export_stablehlo(trained.model, trained.variables, tmp_path / 'net', **options) == 1
  assert [path.name for path in tmp_path.iterdir()] == ['net']


def test_a_place_that_cannot_be_written(trained, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(RunError, match='cannot be written'):
    export_stablehlo(trained.model, trained.variables, tmp_path / 'file' / 'net', image_size=32)


def test_variables_and_images_of_another_network_are_refused(trained, tmp_path):
  path, plain = tmp_path / 'net', network('none')
  with pytest.raises(UserError, match='not those of this ResNet for images of 3 channels'):
    export_stablehlo(trained.model, plain.variables, path, image_size=32)
  with pytest.raises(UserError, match='not those of this ResNet for images of 1 channels'):
    export_stablehlo(trained.model, trained.variables, path, image_size=32, channels=1)
  with pytest.raises(UserError, match='images of 0x0 with 3 channels; all must be at least 1'):
    export_stablehlo(trained.model, trained.variables, path, image_size=0)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('keep', [0, 10, 1000, -100])
def test_a_truncated_artifact_is_refused(artifact, tmp_path, keep):
  (tmp_path / 'net').write_bytes(artifact.read_bytes()[:keep])
  with pytest.raises(UserError, match='is damaged or no artifact'):
    load_stablehlo(tmp_path / 'net')


@pytest.mark.parametrize('content', [b'\0' * 1000, b'no artifact at all', b'PK\3\4' * 1000])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
  (tmp_path / 'net').write_bytes(content)
  with pytest.raises(UserError, match='is damaged or no artifact'):
    load_stablehlo(tmp_path / 'net')
  with pytest.raises(UserError, match='cannot be read'):
    load_stablehlo(tmp_path / 'none')


@pytest.mark.parametrize('package', ['jax2onnx', 'onnx', 'onnxruntime'])
def test_onnx_without_its_packages(trained, tmp_path, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(MissingExtraError, match=r"pip install 'cbam-jax\[onnx\]'"):
    export_onnx(trained.model, trained.variables, tmp_path / 'net.onnx', image_size=32)


def test_stablehlo_without_its_package(trained, artifact, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  with pytest.raises(MissingExtraError, match=r"pip install 'cbam-jax\[export\]'"):
    export_stablehlo(trained.model, trained.variables, tmp_path / 'net', image_size=32)
  with pytest.raises(MissingExtraError, match=r"pip install 'cbam-jax\[export\]'"):
    load_stablehlo(artifact)


# ---- the command -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_what_takes_pixels(trained, tmp_path, capsys):
  arrays = to_torch(trained.model, trained.variables)
  safetensors.numpy.save_file(arrays, tmp_path / 'net.safetensors')
  out = tmp_path / 'net.stablehlo'
  told = [
    f'--weights={tmp_path / "net.safetensors"}',
    '--model=resnet18',
    '--attention=cbam',
    *(f'--field={name}={value}' for name, value in FIELDS.items()),
    '--image-size=32',
  ]
  assert main(['export', *told, '--format=stablehlo', '--pixels', f'--out={out}']) == 0
  written, takes, _, differs = capsys.readouterr().out.splitlines()
  assert written == f'{out} is written, {out.stat().st_size / 1e6:.1f} MB'
  assert takes == 'uint8 pixels (b, 32, 32, 3) to logits (b, 3)'
  assert differs.startswith("logits differ from the network's own by up to ")
  loaded = load_stablehlo(out)
  assert [aval.str_short() for aval in loaded.in_avals] == ['uint8[b,32,32,3]']
  normalised = (pixels(2) / 255 - PREPROCESSING.mean) / PREPROCESSING.std
  expected = logits(trained, normalised.astype(np.float32))
  np.testing.assert_allclose(jax.jit(loaded.call)(pixels(2)), expected, rtol=0, atol=1e-4)


def test_the_command_refuses_other_formats():
  with pytest.raises(SystemExit):
    main(['export', '--weights=x', '--format=pickle', '--out=y'])


# ---- ONNX ------------------------------------------------------------------------------------


@pytest.fixture
def onnxruntime():
  reason = "ONNX is tested where pip install 'cbam-jax[onnx]' was done"
  pytest.importorskip('jax2onnx', reason=reason)
  return pytest.importorskip('onnxruntime', reason=reason)


def run_onnx(onnxruntime, path, x):
  session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
  return session.run(['logits'], {'images': x})[0]


def test_onnx_of_any_batch(onnxruntime, trained, tmp_path):
  path = tmp_path / 'net.onnx'
  assert export_onnx(trained.model, trained.variables, path, image_size=32) < 1e-5
  assert list(tmp_path.iterdir()) == [path]
  for count in (1, 5):
    found = run_onnx(onnxruntime, path, images(count))
    np.testing.assert_allclose(found, logits(trained, images(count)), rtol=0, atol=1e-5)


def test_onnx_of_pixels(onnxruntime, trained, tmp_path):
  normalize, path = PREPROCESSING.normalize, tmp_path / 'net.onnx'
  export_onnx(trained.model, trained.variables, path, image_size=32, normalize=normalize)
  expected = logits(trained, normalize(pixels(2)))
  np.testing.assert_allclose(run_onnx(onnxruntime, path, pixels(2)), expected, rtol=0, atol=1e-5)


def test_onnx_pools_are_those_of_its_runtimes(onnxruntime, tmp_path, small_vgg):
  onnx = pytest.importorskip('onnx')
  model = create_model('vgg16', num_classes=5)
  path = tmp_path / 'net.onnx'
  assert export_onnx(model, tamed_variables(model, 40), path, image_size=40) < 1e-5
  proto = onnx.load(path)
  onnx.checker.check_model(proto, full_check=True)
  pools = [node for node in proto.graph.node if node.op_type == 'MaxPool']
  windows = [{f.name: list(f.ints) for f in node.attribute}['kernel_shape'] for node in pools]
  assert windows == [[2, 2]] * 5
  used = {name for node in proto.graph.node for name in node.input}
  assert {tensor.name for tensor in proto.graph.initializer} <= used


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'attention'), ALL)
def test_onnx_of_every_network(onnxruntime, tmp_path, small_vgg, name, attention):
  model = create_model(name, attention=attention, num_classes=5)
  assert export_onnx(model, tamed_variables(model), tmp_path / 'net.onnx', image_size=64) < 1e-4


@pytest.mark.slow
def test_onnx_of_bfloat16_is_float32(onnxruntime, tmp_path):
  types = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}
  model = create_model('resnet18', attention='cbam', **types, **FIELDS)
  path = tmp_path / 'net.onnx'
  assert export_onnx(model, tamed_variables(model, 32), path, image_size=32) < 1e-4
