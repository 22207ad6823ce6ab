"""The networks of `models.py` in PyTorch: timm's, with the attention where cbam_jax has it."""

import timm
import torch
from timm.layers import create_attn
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

NAMES = ('resnet18', 'resnet50', 'resnext50_32x4d', 'wide_resnet18_1.5', 'mobilenet_v1')


class PaperCBAM(nn.Module):
  """CBAM as in the paper: an MLP with biases over both pools, then a 7x7 convolution with a norm.

  timm's own has no biases, and its norm forgets faster.
  """

  def __init__(self, channels: int):
    super().__init__()
    hidden = max(1, channels // 16)
    self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
    self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
    self.norm = nn.BatchNorm2d(1, momentum=0.01)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
    x = x * gate[:, :, None, None]
    pools = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
    return x * torch.sigmoid(self.norm(self.conv(pools)))


class BAM(nn.Module):
  """BAM as its authors have it: a channel and a spatial branch, multiplied."""

  def __init__(self, channels: int):
    super().__init__()
    hidden = channels // 16
    self.channel = nn.Sequential(
      nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
    )
    dilated = []
    for _ in range(2):
      dilated += [nn.Conv2d(hidden, hidden, 3, padding=4, dilation=4)]
      dilated += [nn.BatchNorm2d(hidden), nn.ReLU()]
    self.spatial = nn.Sequential(
      nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(), *dilated,
      nn.Conv2d(hidden, 1, 1),
    )  # fmt: skip

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    channel = self.channel(x.mean((2, 3)))[:, :, None, None]
    return x * (1 + torch.sigmoid(channel * self.spatial(x)))


def network(name: str, attention: str) -> nn.Module:
  """timm's network; `attention` is 'none', 'se', 'bam', 'cbam' (timm's) or 'paper_cbam'."""

  def inside(channels: int, **device_and_dtype: object) -> nn.Module:
    return PaperCBAM(channels) if attention == 'paper_cbam' else create_attn(attention, channels)

  block_args = {} if attention in ('none', 'bam') else {'attn_layer': inside}
  if name == 'mobilenet_v1':
    made = timm.create_model('mobilenetv1_100')
    if block_args:
      made.bn1 = nn.Sequential(made.bn1, inside(made.bn1.num_features))
      for block in (block for stage in made.blocks for block in stage):
        block.bn1 = nn.Sequential(block.bn1, inside(block.bn1.num_features))
        block.bn2 = nn.Sequential(block.bn2, inside(block.bn2.num_features))
    parent, stages, widths = made.blocks, ('1', '2', '3'), (128, 256, 512)
  else:
    if name == 'wide_resnet18_1.5':
      channels = (96, 192, 384, 768)
      made = ResNet(
        BasicBlock, (2, 2, 2, 2), channels=channels, stem_width=96, block_args=block_args
      )
    else:
      made = timm.create_model(name, block_args=block_args)
    parent, stages = made, ('layer1', 'layer2', 'layer3')
    widths = [stage['num_chs'] for stage in made.feature_info[1:4]]
  if attention == 'bam':
    for stage, width in zip(stages, widths, strict=True):
      setattr(parent, stage, nn.Sequential(getattr(parent, stage), BAM(width)))
  return made
