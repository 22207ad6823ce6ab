"""The paper's idea: CBAM and its parts, beside its sister BAM and squeeze-and-excitation."""

from cbam_jax.attention.bam import BAM
from cbam_jax.attention.cbam import CBAM
from cbam_jax.attention.channel import ChannelAttention
from cbam_jax.attention.se import SqueezeExcitation
from cbam_jax.attention.spatial import SpatialAttention

__all__ = ['BAM', 'CBAM', 'ChannelAttention', 'SpatialAttention', 'SqueezeExcitation']
