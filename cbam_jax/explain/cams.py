"""Where in an image a network sees a class: Grad-CAM, Grad-CAM++ and Eigen-CAM.

All run the network in eval mode, change nothing of it, and can be compiled and mapped over:

    cams = jax.jit(functools.partial(grad_cam, model))(variables, images, classes)

A is a stage's output, (N, h, w, c); a map has a number for each of its positions, (N, h, w).
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cbam_jax.errors import UserError, check_choice
from cbam_jax.layers import at_least_float32
from cbam_jax.models.base import Classifier

Classes: TypeAlias = ArrayLike | list[int] | tuple[int, ...]


def grad_cam(
  model: Classifier, variables: Any, images: jax.Array, classes: Classes, stage: str = 'stage4'
) -> jax.Array:
  """Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2), not normalised.

  `relu(sum over channels of weight * A)`, a channel's weight being the mean over positions of the
  logit's derivative with respect to it.

  Args:
    model: A network of `create_model`.
    variables: Its variables.
    images: (N, H, W, C), floating point, normalised.
    classes: The class to explain, one for all images or one for each, (N,). Under a trace it is
      not checked, and one that does not exist has an empty map.
    stage: A name of `model.features`.

  Returns:
    The maps, (N, h, w), float32 at the least.

  Raises:
    UserError: If `model` is another module; on an unknown stage, a class that does not exist, a
      number of classes other than N, or images of a wrong rank or type.
  """
  features, slopes = _features_and_slopes(model, variables, images, classes, stage)
  return _weighted(features, jnp.mean(slopes, (1, 2), keepdims=True))


def grad_cam_plus_plus(
  model: Classifier, variables: Any, images: jax.Array, classes: Classes, stage: str = 'stage4'
) -> jax.Array:
  """Grad-CAM++ (Chattopadhay et al., WACV 2018; equations 7 and 19 of arXiv 1710.11063).

  As `grad_cam`, but a channel's weight is the sum over positions of `alpha * relu(slope)`, `slope`
  being the logit's derivative and `alpha = slope^2 / (2 slope^2 + slope^3 * sum of A)`, the paper's
  closed form for the score exp(logit). The factor exp(logit) that this score gives all of a map is
  left out, for it overflows. A is taken to be the output of a ReLU, as it is in every stage here.

  Args:
    model: A network of `create_model`.
    variables: Its variables.
    images: (N, H, W, C), floating point, normalised.
    classes: The class to explain, as for `grad_cam`.
    stage: A name of `model.features`.

  Returns:
    The maps, (N, h, w), float32 at the least, not normalised.

  Raises:
    UserError: As `grad_cam` does.
  """
  features, slopes = _features_and_slopes(model, variables, images, classes, stage)
  positive = nn.relu(slopes)
  # slope^2 cancels, and with it the question of what 0 / 0 is.
  alpha = 1 / (2 + positive * jnp.sum(features, (1, 2), keepdims=True))
  return _weighted(features, jnp.sum(alpha * positive, (1, 2), keepdims=True))


def eigen_cam(
  model: Classifier, variables: Any, images: jax.Array, stage: str = 'stage4'
) -> jax.Array:
  """Eigen-CAM (Muhammad and Yeasin, IJCNN 2020): what most of A has in common, of no class.

  `relu(A v)`, v being the first right singular vector of an image's A as a matrix of positions by
  channels, not centred, with the sign that makes the sum of `A v` positive.

  Args:
    model: A network of `create_model`.
    variables: Its variables.
    images: (N, H, W, C), floating point, normalised.
    stage: A name of `model.features`.

  Returns:
    The maps, (N, h, w), float32 at the least, not normalised.

  Raises:
    UserError: If `model` is another module; on an unknown stage, or images of a wrong rank or type.
  """
  features = _wide(_features(model, variables, images, stage))
  n, h, w, c = features.shape
  left, values, _ = jnp.linalg.svd(features.reshape(n, h * w, c), full_matrices=False)
  projection = left[..., 0] * values[..., :1]
  sign = jnp.where(jnp.sum(projection, 1, keepdims=True) < 0, -1, 1)
  return nn.relu(sign * projection).reshape(n, h, w)


def _weighted(features: jax.Array, weights: jax.Array) -> jax.Array:
  # Not a matrix product, which an accelerator rounds to fewer bits.
  return nn.relu(jnp.sum(weights * features, -1))


def _features(model: Classifier, variables: Any, images: jax.Array, stage: str) -> jax.Array:
  """A, as the network computes it."""
  if not isinstance(model, Classifier):
    raise UserError(
      f'{type(model).__name__} is no network of create_model, which alone has stages to look at; '
      'derive your own from cbam_jax.models.base.Classifier.'
    )
  stages: Any = model.apply(variables, images, train=False, method='features')
  check_choice(f'the stage of {type(model).__name__}', stage, stages)
  return stages[stage]


def _features_and_slopes(
  model: Classifier, variables: Any, images: jax.Array, classes: Classes, stage: str
) -> tuple[jax.Array, jax.Array]:
  """A, and the derivative of each image's logit with respect to it, float32 at the least."""
  output = jax.eval_shape(functools.partial(_features, model, stage=stage), variables, images)
  chosen = _one_hot(classes, output.shape[0], model.num_classes)
  # What a block computes again leaves no trace of how it did so the first time.
  model = model.clone(remat=False)

  def is_stage(module: nn.Module, method: str | None) -> bool:
    return module.path == (stage,) and method == '__call__'

  def run(change: jax.Array) -> tuple[jax.Array, jax.Array]:
    def changed(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      y = call(*args, **kwargs)
      return y + change if is_stage(context.module, context.method_name) else y

    with nn.intercept_methods(changed):
      logits, captured = model.apply(
        variables, images, train=False, capture_intermediates=is_stage, mutable=['intermediates']
      )
    (features,) = captured['intermediates'][stage]['__call__']
    return logits, features

  # A derivative with respect to A is one with respect to a change of A, at none.
  logits, pull_back, features = jax.vjp(run, jnp.zeros(output.shape, output.dtype), has_aux=True)
  (slopes,) = pull_back(chosen.astype(logits.dtype))
  return _wide(features), _wide(slopes)


def _one_hot(classes: Classes, count: int, num_classes: int) -> jax.Array:
  """(count, num_classes): 1 at the class of each image, 0 elsewhere."""
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(classes))
  numbers = jnp.asarray(classes) if traced else np.asarray(classes)
  if not jnp.issubdtype(numbers.dtype, jnp.integer) or numbers.shape not in ((), (count,)):
    raise UserError(
      f'classes is {numbers.dtype} of shape {numbers.shape}; give one integer for all of the '
      f'{count} images or one for each, shape ({count},).'
    )
  if not traced and (wrong := numbers[(numbers < 0) | (numbers >= num_classes)]).size:
    raise UserError(
      f'classes has {wrong[0]}; the network has {num_classes} classes, 0 to {num_classes - 1}. '
      'Name one of these.'
    )
  return jnp.broadcast_to(jax.nn.one_hot(numbers, num_classes), (count, num_classes))


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(at_least_float32(x.dtype))
