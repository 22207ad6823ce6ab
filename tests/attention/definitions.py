"""The attention modules as the papers' equations have them, in NumPy, axis by axis.

Everything takes x (N, *spatial, C), the parameters and statistics as linen nests them, and returns
maps that broadcast against x. Batch norms take their running statistics.
"""

import itertools

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def relu(x):
  return np.maximum(x, 0)


def positions(x):
  return tuple(range(1, x.ndim - 1))


def dense(v, params):
  return v @ params['kernel'] + params.get('bias', 0)


def convolution(x, params, dilation=1):
  *sizes, _, features = params['kernel'].shape
  margins = [dilation * (size // 2) for size in sizes]
  padded = np.pad(x, [(0, 0), *((margin, margin) for margin in margins), (0, 0)])
  y = np.zeros((*x.shape[:-1], features))
  for tap in itertools.product(*map(range, sizes)):
    window = tuple(
      slice(dilation * t, dilation * t + n) for t, n in zip(tap, x.shape[1:-1], strict=True)
    )
    y += padded[(slice(None), *window)] @ params['kernel'][tap]
  return y + params.get('bias', 0)


def batch_norm(x, params, stats, epsilon=1e-5):
  standard = (x - stats['mean']) / np.sqrt(stats['var'] + epsilon)
  return standard * params['scale'] + params['bias']


def mlp(v, params):
  return dense(relu(dense(v, params['fc1'])), params['fc2'])


POOLS = {
  'avg': lambda x: x.mean(positions(x), keepdims=True),
  'max': lambda x: x.max(positions(x), keepdims=True),
  'lse': lambda x: np.log(np.exp(x).sum(positions(x), keepdims=True)),
  'lp': lambda x: np.sqrt((x**2).sum(positions(x), keepdims=True)),
}


def channel_logits(x, params, pools=('avg', 'max')):
  """Equation 2 before its sigmoid: the sum over the pools of MLP(pool(x))."""
  return sum(mlp(POOLS[pool](x), params['mlp']) for pool in pools)


def spatial_logits(x, params, stats, pool='channel'):
  """Equation 3 before its sigmoid, with the batch norm of the authors' code."""
  if pool == 'channel':
    pooled = np.concatenate([x.max(-1, keepdims=True), x.mean(-1, keepdims=True)], -1)
  else:
    pooled = convolution(x, params['reduce'])
  return batch_norm(convolution(pooled, params['conv']), params['norm'], stats['norm'])


def cbam(x, params, stats, order='channel_first'):
  """Equation 1, and the other arrangements of table 3."""

  def channel(x):
    return channel_logits(x, params['channel'])

  def spatial(x):
    return spatial_logits(x, params['spatial'], stats['spatial'])

  if order == 'parallel':
    return x * sigmoid(channel(x) + spatial(x))
  for map_of in {
    'channel_first': (channel, spatial),
    'spatial_first': (spatial, channel),
    'channel_only': (channel,),
    'spatial_only': (spatial,),
  }[order]:
    x = x * sigmoid(map_of(x))
  return x


def bam(x, params, stats, combine, dilation=4):
  """The BAM paper's equations 1 to 4, or its authors' product."""
  part, norms = params['channel'], stats['channel']
  hidden = batch_norm(dense(POOLS['avg'](x), part['fc1']), part['norm'], norms['norm'])
  channel = dense(relu(hidden), part['fc2'])

  part, norms = params['spatial'], stats['spatial']
  y = convolution(x, part['reduce'])
  y = relu(batch_norm(y, part['reduce_norm'], norms['reduce_norm']))
  for i in (1, 2):
    y = convolution(y, part[f'conv{i}'], dilation)
    y = relu(batch_norm(y, part[f'norm{i}'], norms[f'norm{i}']))
  spatial = convolution(y, part['out'])
  return x * (1 + sigmoid(channel + spatial if combine == 'sum' else channel * spatial))
