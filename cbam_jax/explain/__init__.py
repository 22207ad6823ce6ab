"""What a network looks at: class activation maps and the attention's own maps."""

from cbam_jax.explain.cams import eigen_cam, grad_cam, grad_cam_plus_plus
from cbam_jax.explain.maps import attention_maps

__all__ = ['attention_maps', 'eigen_cam', 'grad_cam', 'grad_cam_plus_plus']
