"""How wrong the gradients of a straightforward CBAM are under `jit`, and that ours are right.

The straightforward one takes its maxima with `jnp.max`, whose derivative asks which elements equal
the maximum. Each network's gradients are computed op by op and under `jit`, on the same weights
and images; the table shows by how much the two differ, relative to each parameter's gradient norm.
PyTorch agrees with the op-by-op gradients (tests/test_golden.py).

  python benchmarks/max_gradient.py [--model resnet50] [--image-size 224] [--dtype float64]
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import cbam_jax
from cbam_jax.layers import BatchNorm, Conv


class StraightforwardCBAM(nn.Module):
  """CBAM as one writes it down, with the parameters of `cbam_jax.CBAM`."""

  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    channels = x.shape[-1]
    dense = functools.partial(nn.Dense, param_dtype=self.param_dtype)
    fc1, fc2 = dense(channels // 16), dense(channels)
    average, maximum = jnp.mean(x, (1, 2)), jnp.max(x, (1, 2))
    logits = fc2(nn.relu(fc1(average))) + fc2(nn.relu(fc1(maximum)))
    x = x * nn.sigmoid(logits)[:, None, None, :]
    pooled = [jnp.max(x, -1, keepdims=True), jnp.mean(x, -1, keepdims=True)]
    y = Conv(1, (7, 7), param_dtype=self.param_dtype)(jnp.concatenate(pooled, -1))
    return x * nn.sigmoid(BatchNorm(0.99, param_dtype=self.param_dtype)(y, train=train))


def gradient_errors(model: nn.Module, images: jax.Array, labels: jax.Array) -> np.ndarray:
  """For each parameter, |jit - op by op| over |op by op| of its gradient."""
  variables = model.init(jax.random.key(0), images, train=False)
  rng = np.random.default_rng(0)
  # Random values everywhere: the initial zero of the spatial gate's scale would hide its gradients.
  params = jax.tree.map(
    lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), p.dtype), variables['params']
  )

  def loss(params):
    logits, _ = model.apply(
      {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
    )
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  plain = jax.tree.leaves(jax.grad(loss)(params))
  jitted = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
  norms = np.array([np.linalg.norm(g) for g in plain])
  differences = np.array([np.linalg.norm(a - b) for a, b in zip(jitted, plain, strict=True)])
  # A bias before a batch norm has no gradient but rounding; nothing can be relative to that.
  real = norms > 1e-6 * norms.max()
  return differences[real] / norms[real]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default='resnet50')
  parser.add_argument('--image-size', type=int, default=224)
  parser.add_argument('--batch-size', type=int, default=2)
  parser.add_argument('--dtype', default='float64', choices=('float32', 'float64'))
  args = parser.parse_args()
  jax.config.update('jax_enable_x64', args.dtype == 'float64')
  shape = (args.batch_size, args.image_size, args.image_size, 3)
  images = jnp.asarray(np.random.default_rng(1).standard_normal(shape), args.dtype)
  labels = jnp.arange(args.batch_size)
  print(f'jax {jax.__version__} on {jax.devices()[0].device_kind}: {args.model}, {args.dtype}')
  print(f'{"CBAM":<36}{"parameters":>12}{"off by > 1 %":>14}{"median":>10}{"worst":>10}')
  for title, attention in (
    ('straightforward (jnp.max)', StraightforwardCBAM),
    ('cbam_jax (derivative by position)', 'cbam'),
  ):
    model = cbam_jax.create_model(
      args.model, attention=attention, dtype=args.dtype, param_dtype=args.dtype
    )
    errors = gradient_errors(model, images, labels)
    print(
      f'{title:<36}{len(errors):>12}{int((errors > 0.01).sum()):>14}'
      f'{np.median(errors):>10.1e}{errors.max():>10.1e}'
    )


if __name__ == '__main__':
  main()
