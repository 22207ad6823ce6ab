"""The train step that the benchmarks time: SGD on random images, on one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cbam_jax.models.base import Classifier
from cbam_jax.training.optimizer import sgd
from cbam_jax.training.state import TrainState, create_state
from cbam_jax.training.step import make_train_step


def initial(make: Callable[[], Any]) -> Any:
  """What `make` returns: a network's own initial values."""
  return jax.jit(make)()


def make(
  model: Classifier,
  images: jax.Array,
  values: Callable[[Callable[[], Any]], Any] = initial,
  options: dict[str, str] | None = None,
) -> tuple[Any, TrainState, dict[str, jax.Array]]:
  """The jitted step, which consumes its state, and a state and a batch of `images` for it.

  `values` makes the state from the function that would; `options` are the compiler's.
  """
  optimizer = sgd(0.1)
  batch = {
    'image': images,
    'label': jnp.arange(len(images)),
    'mask': jnp.ones(len(images), bool),
  }
  step = jax.jit(
    make_train_step(model, optimizer, lambda x: x, lambda step: 0.1),
    donate_argnums=0,
    compiler_options=options,
  )
  key = jax.random.key(0)
  return step, values(lambda: create_state(model, optimizer, key, images.shape[1:])), batch
