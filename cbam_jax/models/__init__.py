"""The networks the paper puts its attention in, and the registry that makes them by name."""

from cbam_jax.models.mobilenet import MobileNetV1
from cbam_jax.models.registry import create_model, list_models
from cbam_jax.models.resnet import ResNet
from cbam_jax.models.summary import StageSummary, Summary, summary
from cbam_jax.models.vgg import VGG

__all__ = [
  'VGG',
  'MobileNetV1',
  'ResNet',
  'StageSummary',
  'Summary',
  'create_model',
  'list_models',
  'summary',
]
