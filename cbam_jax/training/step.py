"""One step of training and one of evaluation, as pure functions to be jitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cbam_jax.errors import UserError, whole
from cbam_jax.layers import at_least_float32, in_parts
from cbam_jax.models.base import Classifier
from cbam_jax.training.state import TrainState

Metrics: TypeAlias = dict[str, jax.Array]
"""Sums over examples, so that steps add up: 'loss', 'top1', 'top5' and 'count', all scalars.

A training step adds its 'learning_rate', and in 'bad_steps' how many steps in a row up to now had
a loss or gradient that is not finite."""

SUMMED = ('loss', 'top1', 'top5', 'count')

Mixing: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""From images (N, H, W, C), probabilities (N, classes) and a key to both of them mixed."""

Normalize: TypeAlias = Callable[[jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The softmax cross entropy of each example, (N,), float32 at the least.

  Args:
    logits: (N, classes).
    targets: Classes, integers (N,); or their probabilities, (N, classes).
  """
  logits = logits.astype(at_least_float32(logits.dtype))
  if targets.ndim == 1:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return optax.softmax_cross_entropy(logits, targets)


def smooth(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """Probabilities (N, classes): `smoothing` spread over all classes (Szegedy et al., CVPR 2016)."""
  return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def sum_metrics(
  logits: jax.Array, losses: jax.Array, labels: jax.Array, mask: jax.Array
) -> Metrics:
  """Sums over the examples that `mask` keeps.

  `top1` and `top5` count the labels that fewer than 1 and 5 classes are ranked before; of equal
  logits the first class ranks first, and one that is no number ranks before every label.
  """
  # Not by `lax.top_k`: the compiler splits no sort over devices, but gathers all logits on each.
  label = labels[:, None]
  classes = jnp.arange(logits.shape[-1])[None]
  own = jnp.take_along_axis(logits, label, -1)
  behind = (logits < own) | ((logits == own) & (classes >= label))
  before = jnp.sum(~behind, -1)
  weights = mask.astype(losses.dtype)
  return {
    'loss': jnp.sum(jnp.where(mask, losses, 0)),
    'top1': jnp.sum((before < 1) * weights),
    'top5': jnp.sum((before < 5) * weights),
    'count': jnp.sum(weights),
  }


def means(sums: dict[str, Any]) -> dict[str, float]:
  """What sums over examples come to for one example, beside their count."""
  count = float(sums['count']) or math.nan
  return {name: float(sums[name]) / count for name in ('loss', 'top1', 'top5')} | {
    'count': int(sums['count'])
  }


def make_train_step(
  model: Classifier,
  optimizer: optax.GradientTransformation,
  normalize: Normalize,
  learning_rate: optax.Schedule,
  *,
  label_smoothing: float = 0.0,
  mixing: Mixing | None = None,
  accumulate: int = 1,
  average_decay: float | None = None,
  seed: int = 0,
  gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
  """The function from a state and a batch to the next state and the batch's metrics.

  The loss is the mean over the global batch; under a sharded `jit` the compiler reduces its
  gradients over the devices, once for each part of a batch. A step whose loss or gradient is not
  finite changes nothing but the counts of steps.

  Args:
    model: The network.
    optimizer: Its optimizer.
    normalize: From the batch's uint8 images to what the network takes.
    learning_rate: The optimizer's schedule, to report its rate.
    label_smoothing: Probability spread evenly over all classes.
    mixing: Mixup or cutmix of every batch; None for neither.
    accumulate: Parts that the batch is taken in, one after the other, to save memory; batch norm
      sees a part at a time.
    average_decay: Decay a step of the parameters' moving average; None if it is not kept.
    seed: Seed of the step's own randomness, drawn anew at each step.
    gather: Brings the parameters to every device before the network uses them.

  Raises:
    UserError: On fewer parts than one, or, by the step itself, if they do not divide the batch.
  """
  accumulate = whole('accumulate', accumulate)

  def mean_loss(
    params: Any, batch_stats: Any, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[jax.Array, tuple[Any, Metrics]]:
    images, targets = normalize(batch['image']), batch['label']
    if label_smoothing or mixing:
      targets = smooth(targets, model.num_classes, label_smoothing)
    if mixing:
      images, targets = mixing(images, targets, key)
    variables = {'params': params, 'batch_stats': batch_stats}
    output = model.apply(variables, images, train=True, mutable=['batch_stats'])
    # With `mutable`, apply returns a pair, which its type does not tell.
    logits, updated = cast('tuple[jax.Array, dict[str, Any]]', output)
    losses = cross_entropy(logits, targets)
    metrics = sum_metrics(logits, losses, batch['label'], batch['mask'])
    return jnp.mean(losses), (updated.get('batch_stats', {}), metrics)

  gradient = jax.grad(mean_loss, has_aux=True)

  def whole_gradient(
    state: TrainState, batch: dict[str, jax.Array], key: jax.Array
  ) -> tuple[Any, Any, Metrics]:
    params = gather(state.params)
    if accumulate == 1:
      gradients, (batch_stats, metrics) = gradient(params, state.batch_stats, batch, key)
      return gradients, batch_stats, metrics

    if len(batch['image']) % accumulate:
      raise UserError(
        f'accumulate={accumulate} does not divide the batch of {len(batch["image"])}; choose a '
        'divisor of it.'
      )
    # Every part takes its examples from all over the batch, so from every device alike.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, accumulate)

    def add_part(sums: Any, part: tuple[dict[str, jax.Array], jax.Array]) -> Any:
      gradients, batch_stats, metrics = sums
      new_gradients, (batch_stats, new_metrics) = gradient(params, batch_stats, *part)
      gradients = jax.tree.map(lambda a, b: a + b / accumulate, gradients, new_gradients)
      return (gradients, batch_stats, jax.tree.map(jnp.add, metrics, new_metrics)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    none = dict.fromkeys(SUMMED, jnp.zeros(()))
    (gradients, batch_stats, metrics), _ = lax.scan(
      add_part, (zeros, state.batch_stats, none), (parts, keys)
    )
    return gradients, batch_stats, metrics

  def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradients, batch_stats, metrics = whole_gradient(state, batch, key)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average_decay is not None:
      average = optax.incremental_update(params, average, 1 - average_decay)

    # The schedule counts the steps that were not passed over.
    count = optax.tree_utils.tree_get(state.opt_state, 'count', state.step, filtering=_of_schedule)
    rate = learning_rate(count)
    finite = jnp.isfinite(metrics['loss']) & _all_finite(gradients)
    changed = TrainState(
      step=state.step,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      average=average,
      bad_steps=jnp.zeros_like(state.bad_steps),
    )
    kept = state.replace(bad_steps=state.bad_steps + 1)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
    # A step that was passed over does not count in the means either.
    metrics = jax.tree.map(lambda sums: jnp.where(finite, sums, 0), metrics)
    metrics |= {'bad_steps': state.bad_steps, 'learning_rate': rate}
    return state.replace(step=state.step + 1), metrics

  return train_step


def _of_schedule(path: tuple[Any, ...], value: Any) -> bool:
  del value
  return getattr(path[-1], 'tuple_name', None) == 'ScaleByScheduleState'


def _all_finite(tree: Any) -> jax.Array:
  leaves = jax.tree.leaves(tree)
  finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).astype(jnp.float32)
  # A product, since XLA would make `jnp.all` of the stack a chain of them, and copy this chain into
  # the update of each parameter: of ResNet-50's instructions those were four in five.
  return jnp.vdot(finite, finite) == len(leaves)


def make_eval_step(
  model: Classifier,
  normalize: Normalize,
  gather: Callable[[Any], Any] = lambda variables: variables,
) -> Callable[[Any, dict[str, jax.Array]], Metrics]:
  """The function from a network's variables and a batch to the batch's metrics."""

  def eval_step(variables: Any, batch: dict[str, jax.Array]) -> Metrics:
    network = gather(variables)

    def classify(images: jax.Array) -> jax.Array:
      return cast('jax.Array', model.apply(network, normalize(images), train=False))

    logits = in_parts(classify, batch['image'])
    losses = cross_entropy(logits, batch['label'])
    return sum_metrics(logits, losses, batch['label'], batch['mask'])

  return eval_step
