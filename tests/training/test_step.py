"""Steps of training and evaluation, on one device and on eight."""

import functools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from cbam_jax.data import Batch, train_batches
from cbam_jax.errors import UserError
from cbam_jax.models.base import Classifier
from cbam_jax.training import experiment as experiment_module
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.keys import KEYS, Key
from cbam_jax.training.state import create_state
from cbam_jax.training.step import (
  SUMMED,
  _all_finite,
  cross_entropy,
  make_train_step,
  smooth,
  sum_metrics,
)

# ---- loss and metrics ------------------------------------------------------------------------

LOGITS = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32) * 3
LABELS = np.array([0, 6, 3, 3, 1, 5])


def log_softmax(logits: np.ndarray) -> np.ndarray:
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_cross_entropy_is_minus_the_log_likelihood():
  expected = -log_softmax(LOGITS)[np.arange(6), LABELS]
  np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), expected, rtol=1e-5)


def test_smoothing_spreads_its_share_over_all_classes():
  targets = np.full((6, 7), 0.1 / 7)
  targets[np.arange(6), LABELS] += 0.9
  expected = -(targets * log_softmax(LOGITS)).sum(-1)
  np.testing.assert_allclose(cross_entropy(LOGITS, smooth(LABELS, 7, 0.1)), expected, rtol=1e-5)


@pytest.mark.parametrize('targets', [LABELS, smooth(LABELS, 7, 0.1)], ids=['labels', 'smooth'])
def test_cross_entropy_is_float32_at_the_least(x64, targets):
  for given, expected in (
    (jnp.bfloat16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.float64, jnp.float64),
  ):
    assert cross_entropy(jnp.asarray(LOGITS, given), targets).dtype == expected


def metrics_by_hand(logits, labels, mask, top=5) -> dict[str, float]:
  losses = -log_softmax(logits)[np.arange(len(labels)), labels]
  better = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(-1)
  return {
    'loss': losses[mask].sum(),
    'top1': (better[mask] < 1).sum(),
    'top5': (better[mask] < top).sum(),
    'count': mask.sum(),
  }


@pytest.mark.parametrize('classes', [7, 5, 4, 2])
@pytest.mark.parametrize('mask', [[True] * 6, [True, True, False, True, False, False]])
def test_metrics_are_sums_over_the_examples_kept(classes, mask):
  logits, labels, mask = LOGITS[:, :classes], LABELS % classes, np.array(mask)
  losses = cross_entropy(logits, labels)
  metrics = sum_metrics(jnp.asarray(logits), losses, labels, mask)
  expected = metrics_by_hand(logits, labels, mask)
  assert metrics.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)


def test_what_is_masked_cannot_spoil_a_metric():
  logits = jnp.array([[0.0, 1.0], [1e30, -1e30]])
  losses = cross_entropy(logits, jnp.array([1, 0]))
  metrics = sum_metrics(logits, losses, jnp.array([1, 0]), np.array([True, False]))
  assert {key: float(value) for key, value in metrics.items()} == {
    'loss': pytest.approx(np.log1p(np.exp(-1))),
    'top1': 1,
    'top5': 1,
    'count': 1,
  }


def test_equal_logits_rank_by_class_and_nothing_is_right_without_a_number():
  logits = jnp.array([[1.0, 2, 2, 0, 0, 0, 0]] * 4 + [[1.0, np.nan, 0, 0, 0, 0, 0]] * 2)
  labels = jnp.array([1, 2, 5, 6, 0, 1])
  # Ranks 1, 2, 6 and 7; what is no number ranks before class 0, and never right.
  metrics = sum_metrics(logits, jnp.zeros(6), labels, np.ones(6, bool))
  assert (metrics['top1'], metrics['top5']) == (1, 3)
  _, ranked = jax.lax.top_k(logits[:4], 5)
  assert [int(label) in row for label, row in zip(labels, ranked.tolist(), strict=False)] == [
    *(True, True, False, False)
  ]


# ---- training --------------------------------------------------------------------------------


def batches_of(experiment: Experiment, steps: int) -> Iterable[Batch]:
  return train_batches(
    experiment.train_source,
    experiment.train_transform,
    experiment.config.batch_size,
    seed=0,
    start_step=0,
    stop_step=steps,
  )


def run(config, steps=6):
  """The mean loss of each step, and the state after the last."""
  experiment = Experiment(config)
  state, losses = experiment.new_state(), []
  for batch in batches_of(experiment, steps):
    state, metrics = experiment.train_step(state, batch)
    losses.append(float(metrics['loss'] / metrics['count']))
  return losses, state


def on_one_device(monkeypatch) -> None:
  axes = ('data', 'fsdp')
  mesh = jax.make_mesh((1, 1), axes, (AxisType.Auto,) * 2, devices=jax.devices()[:1])
  monkeypatch.setattr(experiment_module, 'make_mesh', lambda fsdp: mesh)


def allow_float64(monkeypatch) -> None:
  monkeypatch.setitem(KEYS, 'dtype', Key(str, choices=('float64',)))


def assert_close(one, other, tolerance) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), one, other)


def test_training_lowers_the_loss(tiny_config):
  tiny_config.optimizer.step_epochs = 30
  losses, state = run(tiny_config, steps=40)
  assert losses[0] == pytest.approx(np.log(3), abs=0.5)
  assert np.mean(losses[-5:]) < 0.5 * losses[0]
  assert int(state.step) == 40


def test_a_step_is_compiled_once_and_consumes_its_state(tiny_config):
  experiment = Experiment(tiny_config)
  state = experiment.new_state()
  for batch in batches_of(experiment, 3):
    before = jax.tree.leaves(state)
    state, _ = experiment.train_step(state, batch)
    assert all(array.is_deleted() for array in before)
    experiment.evaluate(state.variables)
  assert experiment.compiled_train_step._cache_size() == 1
  assert experiment._eval_step._cache_size() == 1


@pytest.mark.slow
def test_the_compiled_step_grows_no_faster_than_the_number_of_parameters():
  def compiled(count: int) -> str:
    leaves = [jnp.ones(i + 1) for i in range(count)]

    def update(gradients):
      finite = _all_finite(gradients)
      return [
        jnp.where(finite, leaf - gradient, leaf)
        for leaf, gradient in zip(leaves, gradients, strict=True)
      ]

    return jax.jit(update).lower(leaves).compile().as_text()

  assert compiled(40).count(' = ') < 2.2 * compiled(20).count(' = ')


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_found_wherever_it_is(bad):
  leaves = [jnp.ones(3), jnp.ones((2, 2)), jnp.ones(())]
  assert jax.jit(_all_finite)(leaves)
  for i, leaf in enumerate(leaves):
    spoilt = leaf.at[(-1,) * leaf.ndim].set(bad)
    assert not jax.jit(_all_finite)([*leaves[:i], spoilt, *leaves[i + 1 :]])


class Linear(Classifier):
  @nn.compact
  def features(self, images, *, train):
    return {'stage1': self.prepare(images)}


def step_of(optimizer, rate=lambda step: 0.1, **options):
  """A train step of a small network, its state and a batch of four."""
  model = Linear(num_classes=3)
  state = create_state(model, optimizer, jax.random.key(0), (2, 2, 5))
  batch = {
    'image': jax.random.normal(jax.random.key(1), (4, 2, 2, 5)),
    'label': jnp.arange(4) % 3,
    'mask': jnp.ones(4, bool),
  }
  return make_train_step(model, optimizer, lambda x: x, rate, **options), state, batch


def test_another_optimizer_with_a_schedule():
  """Adam counts too, and so does what sums three steps."""
  rate = optax.linear_schedule(0.1, 0.0, 10)
  step, state, batch = step_of(optax.chain(optax.adam(rate), optax.apply_every(3)), rate)
  rates = []
  for _ in range(3):
    state, metrics = jax.jit(step)(state, batch)
    rates.append(float(metrics['learning_rate']))
  np.testing.assert_allclose(rates, [0.1, 0.09, 0.08], rtol=1e-6)


def test_parts_that_cannot_be():
  with pytest.raises(UserError, match='accumulate is 0; it must be an integer of at least 1'):
    step_of(optax.sgd(0.1), accumulate=0)
  step, state, batch = step_of(optax.sgd(0.1), accumulate=3)
  with pytest.raises(UserError, match='accumulate=3 does not divide the batch of 4'):
    jax.eval_shape(step, state, batch)


def test_the_state_is_on_every_device_and_the_batch_is_split(tiny_config):
  experiment = Experiment(tiny_config)
  for array in jax.tree.leaves(experiment.new_state()):
    assert array.sharding.is_fully_replicated
    assert len(array.sharding.device_set) == jax.device_count()
  (batch,) = batches_of(experiment, 1)
  arrays = experiment_module.to_devices(batch, experiment.mesh)
  for name, array in arrays.items():
    shares = [shard.data.shape[0] for shard in array.addressable_shards]
    assert shares == [16 // jax.device_count()] * jax.device_count()
    np.testing.assert_array_equal(array, batch[name])


def test_the_abstract_state_is_that_of_a_new_one(tiny_config):
  experiment = Experiment(tiny_config)
  describe = lambda array: (array.shape, array.dtype, array.sharding)  # noqa: E731
  assert jax.tree.map(describe, experiment.abstract_state) == jax.tree.map(
    describe, experiment.new_state()
  )


# Groups of 4 examples reach over two of eight devices.
@pytest.mark.parametrize('group_size', [None, pytest.param(4, marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(monkeypatch, tiny_config, group_size):
  tiny_config.model.attention = 'cbam'
  tiny_config.model.group_size = group_size
  losses, state = run(tiny_config)
  on_one_device(monkeypatch)
  expected_losses, expected = run(tiny_config)
  np.testing.assert_allclose(losses, expected_losses, 1e-5)
  assert_close(state.variables, expected.variables, 1e-5)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does_in_float64(monkeypatch, tiny_config, x64):
  allow_float64(monkeypatch)
  tiny_config.dtype = 'float64'
  tiny_config.model.attention = 'cbam'
  tiny_config.model.fields = {'param_dtype': 'float64'}
  losses, state = run(tiny_config)
  on_one_device(monkeypatch)
  expected_losses, expected = run(tiny_config)
  assert all(array.dtype == np.float64 for array in jax.tree.leaves(state.variables))
  np.testing.assert_allclose(losses, expected_losses, 1e-9)
  assert_close(state.variables, expected.variables, 1e-9)


@pytest.mark.slow
def test_eight_devices_train_a_resnet_as_one_does(monkeypatch, tiny_config, x64):
  allow_float64(monkeypatch)
  tiny_config.dtype = 'float64'
  tiny_config.model.name = 'resnet18'
  tiny_config.model.attention = 'cbam'
  tiny_config.model.stem = 'cifar'
  tiny_config.model.fields = {'width': 0.125, 'param_dtype': 'float64'}
  losses, state = run(tiny_config)
  on_one_device(monkeypatch)
  expected_losses, expected = run(tiny_config)
  np.testing.assert_allclose(losses, expected_losses, 1e-9)
  assert_close(state.variables, expected.variables, 1e-9)


def test_batch_norm_is_over_the_global_batch_or_over_groups(tiny_config):
  """By the running statistics after one step, from the features that the norm received."""
  experiment = Experiment(tiny_config)
  (batch,) = batches_of(experiment, 1)
  state = experiment.new_state()
  images = experiment.preprocessing.normalize(batch['image'])
  apply = functools.partial(
    experiment.model.apply,
    train=False,
    capture_intermediates=lambda module, _: module.name == 'conv',
  )
  _, seen = jax.jit(apply)(state.variables, images)
  features = np.asarray(seen['intermediates']['conv']['__call__'][0], np.float64)

  for group_size in (None, 4):
    config = tiny_config.copy_and_resolve_references()
    config.model.group_size = group_size
    _, after = run(config, steps=1)
    groups = features.reshape(-1, (group_size or 16) * 36, 8)
    stats = after.batch_stats['norm']
    np.testing.assert_allclose(stats['mean'], 0.1 * groups.mean((0, 1)), 1e-4, 1e-6)
    variance = groups.var(1, ddof=1).mean(0)
    np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * variance, 1e-5)


def test_bfloat16_keeps_what_has_to_be_exact_in_float32(tiny_config):
  tiny_config.dtype = 'bfloat16'
  tiny_config.model.attention = 'cbam'
  tiny_config.optimizer.step_epochs = 30
  losses, state = run(tiny_config, steps=30)
  assert np.mean(losses[-5:]) < 0.7 * losses[0]
  assert {str(array.dtype) for array in jax.tree.leaves(state)} == {'float32', 'int32'}

  experiment = Experiment(tiny_config)
  images = jnp.zeros((2, 6, 6, 1))
  features, logits = (
    jax.eval_shape(
      functools.partial(experiment.model.apply, train=False, method=method), state.variables, images
    )
    for method in ('features', '__call__')
  )
  assert features['stage1'].dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  (batch,) = batches_of(experiment, 1)
  _, metrics = experiment.train_step(state, batch)
  assert {str(metrics[name].dtype) for name in SUMMED} == {'float32'}


def test_label_smoothing_is_in_the_training_loss_alone(tiny_config):
  plain, _ = run(tiny_config, steps=1)
  tiny_config.label_smoothing = 0.3
  smoothed, state = run(tiny_config, steps=1)
  assert abs(plain[0] - smoothed[0]) > 1e-4
  experiment = Experiment(tiny_config)
  tiny_config.label_smoothing = 0.0
  assert experiment.evaluate(state.variables) == Experiment(tiny_config).evaluate(state.variables)


# ---- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize('batch_size', [16, 24])
def test_evaluation_counts_every_test_example_once(tiny_config, batch_size):
  tiny_config.eval_batch_size = batch_size
  experiment = Experiment(tiny_config)
  _, state = run(tiny_config, steps=4)
  source = experiment.test_source
  images = experiment.preprocessing.normalize(source.images)
  apply = jax.jit(functools.partial(experiment.model.apply, train=False))
  logits = np.asarray(apply(state.variables, images))

  result = experiment.evaluate(state.variables)
  sums = metrics_by_hand(logits, source.labels, np.ones(20, bool))
  assert result.keys() == sums.keys()
  assert result['count'] == 20
  assert type(result['count']) is int
  for key in ('loss', 'top1', 'top5'):
    assert result[key] == pytest.approx(sums[key] / 20, rel=1e-5)
  assert 0 < result['top1'] < 1
  assert result['top5'] == 1  # of three classes
