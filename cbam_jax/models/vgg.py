"""VGG16 (Simonyan and Zisserman, ICLR 2015), the backbone of the paper's VOC detectors."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from cbam_jax.layers import at_least_float32, max_pool
from cbam_jax.models.base import Classifier, LayerFactory, kaiming_fan_in, run_block

POOLED_SIDE = 7
"""Side of the features that the first fully connected layer was made for (images of 224)."""


class Stage(nn.Module):
  """3x3 convolutions with ReLU at one resolution, then attention."""

  features: int
  convolutions: int
  conv: LayerFactory
  attention: LayerFactory | None
  stage_attention: LayerFactory | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Maps `x` (N, H, W, C) to (N, H, W, features)."""
    for i in range(self.convolutions):
      x = nn.relu(self.conv(self.features, (3, 3), use_bias=True, name=f'conv{i + 1}')(x))
    if self.attention is not None:
      x = self.attention(name='attention')(x, train=train)
    if self.stage_attention is not None:
      x = self.stage_attention(name='stage_attention')(x, train=train)
    return x


class VGG(Classifier):
  """Five stages of 3x3 convolutions with max pools between them, then three dense layers.

  A stage's output is taken before the pool that follows it. Attention stands at the end of every
  stage; stage attention at the end of stages 3 to 5. There is no reducing stem, so both values of
  `stem` make the same network; and no dropout, since VGG16 is here as the detectors' backbone.
  """

  stage_sizes: tuple[int, ...] = (2, 2, 3, 3, 3)

  def setup(self) -> None:
    """Makes the dense layers; what comes before them is made in `features`."""
    super().setup()
    self.fc1 = self._dense()
    self.fc2 = self._dense()

  @nn.nowrap
  def _dense(self) -> nn.Dense:
    return nn.Dense(
      4096, kernel_init=kaiming_fan_in, dtype=self.dtype, param_dtype=self.param_dtype
    )

  @nn.compact
  def features(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
    """Every stage's output; see `Classifier.features`."""
    x = self.prepare(images)
    outputs = {}
    for i, convolutions in enumerate(self.stage_sizes, 1):
      stage = Stage(
        min(512, 32 * 2**i),
        convolutions,
        self.conv,
        self.attention,
        self.stage_attention if i >= 3 else None,
        name=f'stage{i}',
      )
      x = x if i == 1 else max_pool(x, 2, strides=2)
      x = run_block(stage, x, train=train, remat=self.remat)
      outputs[f'stage{i}'] = x
    return outputs

  def pool(self, x: jax.Array) -> jax.Array:
    """The last stage's features, pooled to 7x7, through two dense layers: (N, 4096)."""
    x = adaptive_mean_pool(max_pool(x, 2, strides=2), POOLED_SIDE)
    x = nn.relu(self.fc1(x.reshape(x.shape[0], -1).astype(self.dtype)))
    return nn.relu(self.fc2(x))


def adaptive_mean_pool(x: jax.Array, side: int) -> jax.Array:
  """Averages `x` (N, H, W, C) to (N, side, side, C), in float32 at the least.

  Cell i covers the positions from floor(i n / side) to ceil((i + 1) n / side) of an axis of n, as
  in PyTorch's AdaptiveAvgPool2d; cells overlap where `side` does not divide n.
  """
  x = x.astype(at_least_float32(x.dtype))
  for axis in (1, 2):
    n = x.shape[axis]
    cells = [(i * n // side, -((i + 1) * n // -side)) for i in range(side)]
    means = [jnp.mean(jax.lax.slice_in_dim(x, start, end, axis=axis), axis) for start, end in cells]
    x = jnp.stack(means, axis)
  return x
