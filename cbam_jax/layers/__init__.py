"""The layers that attention and networks share, where linen's own differ from the reference."""

from cbam_jax.layers.batch_norm import BatchNorm
from cbam_jax.layers.convolution import Conv
from cbam_jax.layers.dtypes import Dtype, at_least_float32
from cbam_jax.layers.parts import in_parts
from cbam_jax.layers.platforms import any_platform, by_platform, compiler_options, once_options
from cbam_jax.layers.pooling import max_over_axis, max_pool
from cbam_jax.layers.relu import stored_relu

__all__ = [
  'BatchNorm',
  'Conv',
  'Dtype',
  'any_platform',
  'at_least_float32',
  'by_platform',
  'compiler_options',
  'in_parts',
  'max_over_axis',
  'max_pool',
  'once_options',
  'stored_relu',
]
