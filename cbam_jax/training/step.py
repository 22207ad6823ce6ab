"""One step of training and one of evaluation, as pure functions to be jitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cbam_jax.layers import at_least_float32
from cbam_jax.models.base import Classifier
from cbam_jax.training.state import TrainState

Metrics: TypeAlias = dict[str, jax.Array]
"""Sums over examples, so that steps add up: 'loss', 'top1', 'top5' and 'count', all scalars."""

Normalize: TypeAlias = Callable[[jax.Array], jax.Array]


def normalizer(mean: Sequence[float], std: Sequence[float]) -> Normalize:
  """From uint8 images to what a network takes: `(image / 255 - mean) / std`, float32."""

  def normalize(images: jax.Array) -> jax.Array:
    shape = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean).reshape(shape)) / jnp.asarray(std).reshape(shape)

  return normalize


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """The softmax cross entropy of each example, (N,), float32 at the least.

  Args:
    logits: (N, classes).
    labels: Integers (N,).
    smoothing: Probability spread evenly over all classes (Szegedy et al., CVPR 2016).
  """
  logits = logits.astype(at_least_float32(logits.dtype))
  if not smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, smoothing))


def sum_metrics(
  logits: jax.Array, losses: jax.Array, labels: jax.Array, mask: jax.Array
) -> Metrics:
  """Sums over the examples that `mask` keeps; `top5` is among all classes if there are fewer."""
  _, ranked = lax.top_k(logits, min(5, logits.shape[-1]))
  hits = ranked == labels[:, None]
  weights = mask.astype(losses.dtype)
  return {
    'loss': jnp.sum(losses * weights),
    'top1': jnp.sum(hits[:, 0] * weights),
    'top5': jnp.sum(jnp.any(hits, 1) * weights),
    'count': jnp.sum(weights),
  }


def make_train_step(
  model: Classifier,
  optimizer: optax.GradientTransformation,
  normalize: Normalize,
  label_smoothing: float = 0.0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """The function from a state and a batch to the next state and the batch's metrics.

  The loss is the mean over the global batch; under a sharded `jit` the compiler reduces its
  gradients over the devices.
  """

  def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    images = normalize(batch['image'])

    def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
      output = model.apply(
        {'params': params, 'batch_stats': state.batch_stats},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      # With `mutable`, apply returns a pair, which its type does not tell.
      logits, updated = cast('tuple[jax.Array, dict[str, Any]]', output)
      losses = cross_entropy(logits, batch['label'], label_smoothing)
      metrics = sum_metrics(logits, losses, batch['label'], batch['mask'])
      return jnp.mean(losses), (updated.get('batch_stats', {}), metrics)

    (_, (batch_stats, metrics)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
      state.params
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    return state, metrics

  return train_step


def make_eval_step(
  model: Classifier, normalize: Normalize
) -> Callable[[Any, dict[str, jax.Array]], Metrics]:
  """The function from a network's variables and a batch to the batch's metrics."""

  def eval_step(variables: Any, batch: dict[str, jax.Array]) -> Metrics:
    logits = cast('jax.Array', model.apply(variables, normalize(batch['image']), train=False))
    losses = cross_entropy(logits, batch['label'])
    return sum_metrics(logits, losses, batch['label'], batch['mask'])

  return eval_step
