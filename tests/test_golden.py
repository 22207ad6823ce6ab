"""Every module and network against what the reference implementation computes (CONTRIBUTING.md).

All of it runs under `jit`, where XLA fuses; float64 tells a wrong gradient from rounding.
"""

import dataclasses
import functools
import importlib.util
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import BAM, CBAM, create_model
from cbam_jax.interop import from_torch, to_torch


@dataclasses.dataclass(frozen=True)
class Case:
  """A golden file, the model of ours that it is for, and its input (N, C, H, W) and labels."""

  file: str
  make: Callable[..., nn.Module]
  shape: tuple[int, ...]
  seed: int = 0
  labels: tuple[int, ...] | None = None
  transform: Callable[[np.ndarray], np.ndarray] = np.asarray
  layout: str = 'official'


def module(file: str, shape: tuple[int, ...], make: type[nn.Module], **fields) -> Case:
  lp = fields.get('pools') == ('lp',)
  make = functools.partial(make, **fields)
  return Case(f'module_{file}', make, (4, *shape), seed=1, transform=np.abs if lp else np.asarray)


def network(file: str, name: str, attention='none') -> Case:
  layout = file.split('_')[0]
  if 'cifar100' in file:
    make = functools.partial(create_model, name, attention=attention, stem='cifar', num_classes=100)
    return Case(file, make, (2, 3, 32, 32), labels=(3, 71), layout=layout)
  make = functools.partial(create_model, name, attention=attention)
  return Case(file, make, (2, 3, 224, 224), labels=(3, 701), layout=layout)


TIMM_CBAM = functools.partial(CBAM, use_bias=False, norm_momentum=0.9)

MODULES = [
  module('cbam_32x8x8', (32, 8, 8), CBAM),
  module('cbam_48x7x9', (48, 7, 9), CBAM),
  module('cbam_64x14x14', (64, 14, 14), CBAM),
  module('cbam_avg_64x8x8', (64, 8, 8), CBAM, pools=('avg',)),
  module('cbam_max_64x8x8', (64, 8, 8), CBAM, pools=('max',)),
  module('cbam_lse_64x8x8', (64, 8, 8), CBAM, pools=('lse',)),
  module('cbam_lp_64x8x8', (64, 8, 8), CBAM, pools=('lp',)),
  module('cbam_nospatial_64x8x8', (64, 8, 8), CBAM, order='channel_only'),
  module('bam_64x16x16', (64, 16, 16), BAM),
]
NETWORKS = [
  network('official_cifar100_resnet18_none', 'resnet18'),
  network('official_cifar100_resnet18_bam', 'resnet18', 'bam'),
  network('official_cifar100_resnet18_cbam', 'resnet18', 'cbam'),
  network('official_imagenet_resnet18_none', 'resnet18'),
  network('official_imagenet_resnet18_bam', 'resnet18', 'bam'),
  network('official_imagenet_resnet18_cbam', 'resnet18', 'cbam'),
  network('official_imagenet_resnet50_none', 'resnet50'),
  network('official_imagenet_resnet50_bam', 'resnet50', 'bam'),
  network('official_imagenet_resnet50_cbam', 'resnet50', 'cbam'),
  network('torchvision_resnext50_32x4d', 'resnext50_32x4d'),
  network('timm_mobilenetv1_100', 'mobilenet_v1'),
  network('timm_seresnet50', 'resnet50', 'se'),
  network('timm_resnet50_cbam', 'resnet50', TIMM_CBAM),
]
# Those that take longest.
SLOW = (
  'official_cifar100_resnet18_none',
  'official_cifar100_resnet18_bam',
  'official_imagenet_resnet18_none',
  'official_imagenet_resnet18_bam',
  'official_imagenet_resnet18_cbam',
  'official_imagenet_resnet50_none',
  'official_imagenet_resnet50_bam',
  'official_imagenet_resnet50_cbam',
  'timm_mobilenetv1_100',
  'timm_resnet50_cbam',
  'timm_seresnet50',
  'torchvision_resnext50_32x4d',
)
BIASED = network('timm_resnet50_cbam', 'resnet50', 'cbam')
VGG16 = network('torchvision_vgg16', 'vgg16')

cases = functools.partial(pytest.mark.parametrize, 'case', ids=lambda case: case.file)


@pytest.fixture(scope='session')
def weights(golden_file):
  """The module that makes the golden files' weights and inputs."""
  spec = importlib.util.spec_from_file_location('golden_weights', golden_file('weights.py'))
  made = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(made)
  return made


@dataclasses.dataclass(frozen=True)
class Setup:
  model: nn.Module
  state_dict: dict[str, np.ndarray]
  variables: dict
  x: jax.Array
  golden: dict[str, np.ndarray]


@pytest.fixture
def prepare(golden_file, weights):
  """A function from a case and a type to all that a comparison needs."""

  def make(case: Case, dtype) -> Setup:
    golden = dict(np.load(golden_file(f'{case.file}.npz')))
    state_dict = weights.state_dict(golden_file(f'{case.file}.keys.json'))
    model = case.make(dtype=dtype, param_dtype=dtype)
    images = case.transform(weights.images(case.shape, case.seed))
    x = jnp.asarray(channels_last(images), dtype)
    return Setup(model, state_dict, from_torch(model, state_dict), x, golden)

  return make


def channels_last(x):
  return np.moveaxis(x, 1, -1)


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1)


def cross_entropy(logits, labels):
  return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate_and_differentiate(model, loss, variables, x, target):
  """The output in eval mode; then, in train mode, loss, output, updated statistics, gradients."""

  def train_loss(params):
    output, updates = model.apply(
      {**variables, 'params': params}, x, train=True, mutable='batch_stats'
    )
    return loss(output, target), (output, updates)

  evaluated = model.apply(variables, x, train=False)
  return evaluated, *jax.value_and_grad(train_loss, has_aux=True)(variables['params'])


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, variables, x):
  return model.apply(variables, x, train=False)


def probe(name: str, array: np.ndarray) -> np.ndarray:
  """The norm of `array` and its inner product with the random direction of its name."""
  rng = np.random.default_rng(zlib.crc32(f'probe:{name}'.encode()))
  array = np.asarray(array)
  return np.array([np.linalg.norm(array), np.vdot(array, rng.standard_normal(array.shape))])


def assert_close(actual, expected, tolerance, scale=None):
  """Within `tolerance` of the largest expected value, or of `scale`."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  scale = np.max(np.abs(expected)) if scale is None else scale
  np.testing.assert_array_less(np.abs(actual - expected) / scale, tolerance)


def assert_probes(arrays, names, norms, probes):
  """Each array's norm and probe, to 1e-8 of its norm or of 1e-6 of the largest norm."""
  assert sorted(arrays) == sorted(names)
  actual = np.array([probe(name, arrays[name]) for name in names])
  scale = np.maximum(norms, 1e-6 * np.max(norms))
  assert_close(actual[:, 0], norms, 1e-8, scale)
  assert_close(actual[:, 1], probes, 1e-8, scale)


def assert_matches(case: Case, ready: Setup, loss, target, order):
  evaluated, (value, (output, updates)), grads = evaluate_and_differentiate(
    ready.model, loss, ready.variables, ready.x, target
  )
  golden = ready.golden
  # The golden outputs are rounded to float32: 6e-8 of each.
  assert_close(order(evaluated), golden['eval_output'], 1e-7)
  assert_close(order(output), golden['train_output'], 1e-7)
  assert_close(value, golden['train_loss'], 1e-10)

  # One conversion of both: gradients in the parameters' places, statistics in their own.
  after = to_torch(ready.model, {'params': grads, **updates}, case.layout)
  gradients = {k: v for k, v in after.items() if k.rpartition('.')[2] in ('weight', 'bias')}
  assert_probes(gradients, golden['grad_names'], golden['grad_norm'], golden['grad_probe'])

  stats = {}
  for name in after:
    if 'running_' in name:
      stats[name] = np.sum(after[name])
  assert sorted(stats) == sorted(golden['stats_names'])
  for name, total in zip(golden['stats_names'], golden['stats_sum'], strict=True):
    assert_close(stats[name], total, 1e-8, max(1, abs(total)))


@cases(MODULES)
def test_module(case, prepare, weights, x64):
  def inner_product(y, target):
    return jnp.sum(y * target)

  ready = prepare(case, jnp.float64)
  target = jnp.asarray(channels_last(weights.images(case.shape, 7)), jnp.float64)
  assert_matches(case, ready, inner_product, target, order=channels_first)


def unless(slow, all_cases):
  """The cases, but those of the `slow` files in `make test-slow` only."""
  return [
    pytest.param(case, marks=pytest.mark.slow) if case.file in slow else case for case in all_cases
  ]


@cases(unless(SLOW, NETWORKS))
def test_network(case, prepare, x64):
  ready = prepare(case, jnp.float64)
  assert_matches(case, ready, cross_entropy, jnp.array(case.labels), order=np.asarray)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['plain', 'pallas'])
@pytest.mark.parametrize(
  ('file', 'name'),
  [
    ('official_cifar100_resnet18_cbam', 'resnet18'),
    ('official_imagenet_resnet18_cbam', 'resnet18'),
    ('official_imagenet_resnet50_cbam', 'resnet50'),
  ],
)
def test_network_by_other_implementations(file, name, implementation, prepare, x64):
  case = network(file, name, functools.partial(CBAM, implementation=implementation))
  ready = prepare(case, jnp.float64)
  assert_matches(case, ready, cross_entropy, jnp.array(case.labels), order=np.asarray)


@cases(unless((VGG16.file, BIASED.file), [VGG16, BIASED]))
def test_network_in_eval_mode(case, prepare, x64):
  ready = prepare(case, jnp.float64)
  logits = evaluate(ready.model, ready.variables, ready.x)
  assert_close(logits, ready.golden['eval_output'], 1e-7)


SLOW_IN_FLOAT32 = (
  'official_cifar100_resnet18_bam',
  'official_imagenet_resnet50_cbam',
  'official_imagenet_resnet18_none',
  'official_imagenet_resnet18_bam',
  'official_imagenet_resnet18_cbam',
  'official_imagenet_resnet50_none',
  'official_imagenet_resnet50_bam',
  'timm_mobilenetv1_100',
  'timm_resnet50_cbam',
  'timm_seresnet50',
  'torchvision_resnext50_32x4d',
  'torchvision_vgg16',
)


@cases(unless(SLOW_IN_FLOAT32, [*MODULES, *NETWORKS, VGG16]))
def test_float32(case, prepare):
  """The state dict comes back, every bit in its place; the output is right to rounding."""
  ready = prepare(case, jnp.float32)
  converted = to_torch(ready.model, ready.variables, case.layout)
  assert list(converted) == list(ready.state_dict)
  for name, array in ready.state_dict.items():
    assert converted[name].dtype == array.dtype
    np.testing.assert_array_equal(converted[name], array)

  output = evaluate(ready.model, ready.variables, ready.x)
  assert output.dtype == jnp.float32
  order = channels_first if case in MODULES else np.asarray
  assert_close(order(output), ready.golden['eval_output'], 1e-4)


TRAJECTORY = dataclasses.replace(
  network('official_cifar100_resnet18_cbam', 'resnet18', 'cbam'),
  file='trajectory_cifar100_resnet18_cbam',
)


@pytest.mark.slow
def test_trajectory(prepare, weights, x64):
  """Eight steps of SGD with momentum 0.9 and weight decay 1e-4 on every parameter."""
  ready = prepare(TRAJECTORY, jnp.float64)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(variables, velocity, x, labels):
    def loss(params):
      logits, updates = ready.model.apply(
        {**variables, 'params': params}, x, train=True, mutable='batch_stats'
      )
      return cross_entropy(logits, labels), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables['params'])
    params = variables['params']
    velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-4 * p, velocity, grads, params)
    params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
    return {**updates, 'params': params}, velocity, value

  variables = ready.variables
  velocity = jax.tree.map(jnp.zeros_like, variables['params'])
  losses = []
  for s in range(8):
    x = jnp.asarray(channels_last(weights.images((16, 3, 32, 32), 100 + s)), jnp.float64)
    labels = jnp.asarray(np.random.default_rng(1000 + s).integers(0, 100, 16))
    variables, velocity, loss = step(variables, velocity, x, labels)
    losses.append(loss)

  golden = ready.golden
  assert_close(losses, golden['losses'], 1e-8)
  assert_close(evaluate(ready.model, variables, ready.x), golden['eval_output'], 1e-8)
  params = to_torch(ready.model, {'params': variables['params']})
  assert_probes(params, golden['param_names'], golden['param_norm'], golden['param_probe'])
