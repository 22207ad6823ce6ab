"""A configuration brought to life: network, data and compiled steps on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from cbam_jax.data import Batch, Source, eval_batches, open_source
from cbam_jax.data.preprocessing import Preprocessing
from cbam_jax.data.transforms import Transform, decode, train_transform
from cbam_jax.errors import UserError, first_line
from cbam_jax.layers import compiler_options, once_options
from cbam_jax.training.config import build_model, validate
from cbam_jax.training.initial import Initial, put_into, read_initial
from cbam_jax.training.keys import MOST, shown
from cbam_jax.training.mixing import mix
from cbam_jax.training.optimizer import learning_rate_schedule, sgd
from cbam_jax.training.sharding import (
  make_mesh,
  replicated,
  split_over_devices,
  state_shardings,
  to_devices,
)
from cbam_jax.training.state import TrainState, create_state
from cbam_jax.training.step import Metrics, make_eval_step, make_train_step, means


class Experiment:
  """What a configuration describes, each part made when it is first needed.

  Attributes:
    config: The configuration, checked, with as many classes as the training set has where it
      left them open.
    model: The network.
    mesh: All devices.
    preprocessing: What is done to an image before the network sees it.

  Raises:
    UserError: On a configuration that cannot be run.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    validate(config)
    self.config = config
    if config.model.num_classes is None:
      self.config = config.copy_and_resolve_references()
      self.config.model.num_classes = self.train_source.num_classes
    self.model = build_model(self.config)
    self.mesh = make_mesh(config.mesh.fsdp)
    self.preprocessing = Preprocessing(
      config.data.image_size,
      config.data.resized_side,
      config.data.interpolation,
      config.data.mean,
      config.data.std,
    )

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
    if source.num_classes > (self.config.model.num_classes or source.num_classes):
      raise UserError(
        f'the network has {self.config.model.num_classes} classes (model.num_classes) but '
        f'{data.name} has {source.num_classes}; it must have at least as many.'
      )
    image = _first_image(source, f'{split} images of {data.name}')
    if split == 'train':  # a test image is made to fit, whatever it is: see `Preprocessing`
      self._check_training_image(image)
    return source

  def _check_training_image(self, image: np.ndarray) -> None:
    data = self.config.data
    height, width, channels = image.shape
    if channels != len(data.mean):
      raise UserError(
        f'data.mean is {data.mean} but the images of {data.name} have {channels} channels; give '
        'one number a channel in data.mean and in data.std.'
      )
    if 'crop' not in data.augmentation and not height == width == data.image_size:
      raise UserError(
        f'data.image_size is {data.image_size} but the training images of {data.name} are '
        f'{height}x{width} and nothing crops them; make them the same, or set '
        'data.augmentation=crop_flip.'
      )

  @property
  def train_transform(self) -> Transform:
    """What is done to a training image."""
    return train_transform(self.config.data.augmentation, self.config.data.image_size)

  @property
  def steps_per_epoch(self) -> int:
    """Full batches in one pass over the training examples."""
    return len(self.train_source) // self.config.batch_size

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    epochs = max(self.config.epochs, self.config.optimizer.warmup_epochs)
    if round(epochs * self.steps_per_epoch) > MOST:
      raise UserError(
        f'epochs is {self.config.epochs:g} and optimizer.warmup_epochs '
        f'{self.config.optimizer.warmup_epochs:g}, at {self.steps_per_epoch} steps an epoch; a run '
        f'has at most {MOST} steps, so lower them.'
      )
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
      decay=optimizer.decay,
      nesterov=optimizer.nesterov,
      clip_norm=optimizer.clip_norm,
    )

  @functools.cached_property
  def _create_state(self) -> Any:
    size = self.config.data.image_size
    return functools.partial(
      create_state,
      self.model,
      self._optimizer,
      image_shape=(size, size, self.preprocessing.channels),
      averaged=self.config.average_decay is not None,
    )

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """The shapes, types and shardings of a state."""
    create, key = self._create_state, jax.random.key(self.config.seed)
    try:
      shapes = jax.eval_shape(create, key)
    except UserError:
      raise
    except Exception as error:  # whatever a layer makes of the fields that it was given
      fields = {
        name: dict(self.config.model[name])
        for name in ('fields', 'attention_fields')
        if self.config.model[name]
      }
      if not fields:
        raise
      raise UserError(
        f'the network cannot be made with {_named(fields)} ({first_line(error)}); change these.'
      ) from error
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      state_shardings(self.mesh, shapes),
    )

  @property
  def _state_shardings(self) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  @functools.cached_property
  def initial(self) -> Initial | None:
    """The weights that `init_from` names, fitted to the network; None if it names none.

    Raises:
      UserError: If they cannot be read, or are those of another network.
    """
    name = self.config.init_from
    if name is None:
      return None
    key = jax.random.key(self.config.seed)
    return read_initial(name, self.model, self.abstract_state.variables, key)

  def new_state(self) -> TrainState:
    """The state before the first step, on the devices."""

    def create(key: jax.Array, variables: Any) -> TrainState:
      return put_into(self._create_state(key), variables)

    jitted = jax.jit(create, out_shardings=self._state_shardings, compiler_options=once_options())
    variables = self.initial.variables if self.initial else {}
    return jitted(jax.random.key(self.config.seed), variables)

  def _gather(self, arrays: Any) -> Any:
    # Left to itself, the compiler also splits products over the axes that 'fsdp' splits, and
    # gathers features of the batch for them.
    return jax.lax.with_sharding_constraint(arrays, replicated(self.mesh))

  @functools.cached_property
  def compiled_train_step(self) -> Any:
    """The jitted step, from a state (consumed) and a batch to a state and metrics."""
    config = self.config
    mixing = None
    if config.data.mixing != 'none':
      mixing = functools.partial(mix, kind=config.data.mixing, alpha=config.data.mixing_alpha)
    step = make_train_step(
      self.model,
      self._optimizer,
      self.preprocessing.normalize,
      self.schedule,
      label_smoothing=config.label_smoothing,
      mixing=mixing,
      accumulate=config.accumulate,
      average_decay=config.average_decay,
      seed=config.seed,
      gather=self._gather,
    )
    return jax.jit(
      step,
      in_shardings=(self._state_shardings, split_over_devices(self.mesh)),
      out_shardings=(self._state_shardings, replicated(self.mesh)),
      donate_argnums=0,
      compiler_options=compiler_options(),
    )

  @functools.cached_property
  def _eval_step(self) -> Any:
    variables = jax.tree.map(lambda x: x.sharding, self.abstract_state.variables)
    return jax.jit(
      make_eval_step(self.model, self.preprocessing.normalize, self._gather),
      in_shardings=(variables, split_over_devices(self.mesh)),
      out_shardings=replicated(self.mesh),
      compiler_options=compiler_options(),
    )

  def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step on this process's share of a batch; `state` is consumed."""
    return self.compiled_train_step(state, to_devices(batch, self.mesh))

  def evaluate(
    self, variables: Any, interrupted: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """Evaluates a network on every test example, each counted once.

    Args:
      variables: The network's.
      interrupted: Asked before every batch whether to give up.

    Returns:
      Mean 'loss', 'top1' and 'top5' (fractions of 1), and 'count'; None if given up.
    """
    batches = eval_batches(
      self.test_source,
      self.preprocessing,
      self.config.eval_batch_size,
      workers=self.config.data.workers,
      bad_share=self.config.data.bad_share,
    )
    sums: Metrics | None = None
    for batch in batches:
      if interrupted():
        return None
      metrics = self._eval_step(variables, to_devices(batch, self.mesh))
      sums = metrics if sums is None else jax.tree.map(jnp.add, sums, metrics)
    return means(jax.device_get(sums))


def _first_image(source: Source, what: str) -> np.ndarray:
  """The first image that can be read."""
  tried = min(len(source), 100)
  reason: object = 'there are none'
  for index in range(tried):
    try:
      return decode(source[index]['image'])
    except UserError:
      raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
      reason = error
  raise UserError(
    f'none of the first {tried} {what} can be read ({reason}); check the data set and data.dir.'
  )


def _named(fields: dict[str, Any]) -> str:
  return ' and '.join(f'model.{name}={shown(value)}' for name, value in fields.items())
