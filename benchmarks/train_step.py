"""The train step that the benchmarks time: SGD on random images, on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cbam_jax.models.base import Classifier
from cbam_jax.training.optimizer import sgd
from cbam_jax.training.state import TrainState, create_state
from cbam_jax.training.step import make_train_step


def make(model: Classifier, images: jax.Array) -> tuple[Any, TrainState, dict[str, jax.Array]]:
  """The jitted step, which consumes its state, and a state and a batch of `images` for it."""
  optimizer = sgd(0.1)
  batch = {
    'image': images,
    'label': jnp.arange(len(images)),
    'mask': jnp.ones(len(images), bool),
  }
  step = jax.jit(make_train_step(model, optimizer, lambda x: x, lambda step: 0.1), donate_argnums=0)
  initial = functools.partial(create_state, model, optimizer, image_shape=images.shape[1:])
  return step, jax.jit(initial)(jax.random.key(0)), batch
