"""Networks so small that what they compute can be written down."""

import flax.linen as nn
import jax.numpy as jnp

from cbam_jax.models.base import Classifier


class Layer(nn.Module):
  """A convolution and an activation."""

  features: int
  side: int
  act: str

  @nn.compact
  def __call__(self, x, *, train):
    del train
    y = nn.Conv(self.features, (self.side, self.side), name='conv', param_dtype=x.dtype)(x)
    return {'none': lambda v: v, 'relu': nn.relu, 'softplus': nn.softplus}[self.act](y)


class Small(Classifier):
  """A layer a stage, of `widths` channels."""

  widths: tuple[int, ...] = (2,)
  side: int = 1
  act: str = 'relu'

  @nn.compact
  def features(self, images, *, train):
    x = self.prepare(images)
    outputs = {}
    for i, width in enumerate(self.widths, 1):
      x = outputs[f'stage{i}'] = Layer(width, self.side, self.act, name=f'stage{i}')(x, train=train)
    return outputs


def one_stage(kernel, bias, head, act='relu'):
  """A `Small` with a single 1x1 convolution of a grey image, and its variables.

  Args:
    kernel: Of the convolution, one number a channel.
    bias: Of the convolution, likewise.
    head: The classifier's weights, a list of one number a class for each channel.
    act: The activation.
  """
  head = jnp.array(head, jnp.float32)
  model = Small(num_classes=head.shape[1], widths=(len(kernel),), act=act)
  conv = {'kernel': jnp.array(kernel, jnp.float32).reshape(1, 1, 1, -1)}
  conv['bias'] = jnp.array(bias, jnp.float32)
  classifier = {'kernel': head, 'bias': jnp.zeros(head.shape[1])}
  return model, {'params': {'stage1': {'conv': conv}, 'head': classifier}}
