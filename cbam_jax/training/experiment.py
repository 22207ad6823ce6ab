"""A configuration brought to life: network, data and compiled steps on the devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import ml_collections
import optax

from cbam_jax.data import Batch, Source, eval_batches, open_source
from cbam_jax.data.transforms import Transform, decode, eval_transform, train_transform
from cbam_jax.errors import UserError
from cbam_jax.training.config import build_model, validate
from cbam_jax.training.optimizer import learning_rate_schedule, sgd
from cbam_jax.training.sharding import make_mesh, replicated, split_over_data, to_devices
from cbam_jax.training.state import TrainState, create_state
from cbam_jax.training.step import Metrics, make_eval_step, make_train_step, normalizer


class Experiment:
  """What a configuration describes, each part made when it is first needed.

  Attributes:
    config: The configuration, checked.
    model: The network.
    mesh: All devices.

  Raises:
    UserError: On a configuration that cannot be run.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    validate(config)
    self.config = config
    self.model = build_model(config)
    self.mesh = make_mesh()
    self._normalize = normalizer(config.data.mean, config.data.std)

  @functools.cached_property
  def train_source(self) -> Source:
    """The training examples."""
    source = self._open('train')
    if len(source) < self.config.batch_size:
      raise UserError(
        f'batch_size is {self.config.batch_size} but {self.config.data.name} has {len(source)} '
        'training examples; choose a batch size of at most that.'
      )
    return source

  @functools.cached_property
  def test_source(self) -> Source:
    """The test examples."""
    return self._open('test')

  def _open(self, split: str) -> Source:
    data = self.config.data
    source = open_source(data.name, split, data.dir)
    height, width, channels = decode(source[0]['image']).shape
    if channels != len(data.mean):
      raise UserError(
        f'data.mean is {data.mean} but the images of {data.name} have {channels} channels; give '
        'one number a channel in data.mean and in data.std.'
      )
    cropped = data.augmentation == 'crop_flip' if split == 'train' else data.resized_side
    if not cropped and not height == width == data.image_size:
      remedy = 'data.augmentation=crop_flip' if split == 'train' else 'data.resized_side'
      raise UserError(
        f'data.image_size is {data.image_size} but the {split} images of {data.name} are '
        f'{height}x{width} and nothing crops them; make them the same, or set {remedy}.'
      )
    return source

  @property
  def train_transform(self) -> Transform:
    """What is done to a training image."""
    return train_transform(self.config.data.augmentation, self.config.data.image_size)

  @property
  def eval_transform(self) -> Transform:
    """What is done to a test image."""
    return eval_transform(self.config.data.image_size, self.config.data.resized_side)

  @property
  def steps_per_epoch(self) -> int:
    """Full batches in one pass over the training examples."""
    return len(self.train_source) // self.config.batch_size

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return max(1, round(self.config.epochs * self.steps_per_epoch))

  @functools.cached_property
  def schedule(self) -> optax.Schedule:
    """The learning rate at each step."""
    optimizer = self.config.optimizer
    return learning_rate_schedule(
      optimizer.schedule,
      optimizer.learning_rate,
      steps_per_epoch=self.steps_per_epoch,
      epochs=self.config.epochs,
      step_epochs=optimizer.step_epochs,
      warmup_epochs=optimizer.warmup_epochs,
    )

  @functools.cached_property
  def _optimizer(self) -> optax.GradientTransformation:
    optimizer = self.config.optimizer
    return sgd(
      lambda step: self.schedule(step),
      momentum=optimizer.momentum,
      weight_decay=optimizer.weight_decay,
      nesterov=optimizer.nesterov,
    )

  @functools.cached_property
  def _create_state(self) -> Any:
    source = self.test_source
    channels = decode(source[0]['image']).shape[-1]
    size = self.config.data.image_size
    return functools.partial(
      create_state, self.model, self._optimizer, image_shape=(size, size, channels)
    )

  def new_state(self) -> TrainState:
    """The state before the first step, on every device."""
    # It runs once: on a CPU, optimising it takes many times as long as running it.
    options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
    create = jax.jit(
      self._create_state, out_shardings=replicated(self.mesh), compiler_options=options
    )
    return create(jax.random.key(self.config.seed))

  def abstract_state(self) -> TrainState:
    """The shapes, types and shardings of a state, for a checkpoint to fill."""
    shapes = jax.eval_shape(self._create_state, jax.random.key(self.config.seed))
    sharding = replicated(self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

  @functools.cached_property
  def _train_step(self) -> Any:
    everywhere, split = replicated(self.mesh), split_over_data(self.mesh)
    return jax.jit(
      make_train_step(self.model, self._optimizer, self._normalize, self.config.label_smoothing),
      in_shardings=(everywhere, split),
      out_shardings=everywhere,
      donate_argnums=0,
    )

  @functools.cached_property
  def _eval_step(self) -> Any:
    everywhere, split = replicated(self.mesh), split_over_data(self.mesh)
    return jax.jit(
      make_eval_step(self.model, self._normalize),
      in_shardings=(everywhere, split),
      out_shardings=everywhere,
    )

  def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step on this process's share of a batch; `state` is consumed."""
    return self._train_step(state, to_devices(batch, self.mesh))

  def evaluate(self, variables: Any) -> dict[str, float]:
    """Mean loss, top-1 and top-5 (fractions of 1) over every test example once, and their count."""
    batches = eval_batches(
      self.test_source,
      self.eval_transform,
      self.config.eval_batch_size,
      workers=self.config.data.workers,
    )
    sums: Metrics | None = None
    for batch in batches:
      metrics = self._eval_step(variables, to_devices(batch, self.mesh))
      sums = metrics if sums is None else jax.tree.map(jax.numpy.add, sums, metrics)
    return means(jax.device_get(sums))


def means(sums: dict[str, Any]) -> dict[str, float]:
  """What sums over examples come to for one example, beside their count."""
  count = float(sums['count'])
  return {name: float(sums[name]) / count for name in ('loss', 'top1', 'top5')} | {
    'count': int(count)
  }
