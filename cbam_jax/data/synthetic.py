"""Random images, for measuring without a data set on the disk."""

from __future__ import annotations

import numpy as np

from cbam_jax.data.records import Record
from cbam_jax.errors import UserError

# As many as ImageNet has.
SIZES = {'train': 1_281_167, 'test': 50_000}


class SyntheticSource:
  """Images of noise, each made when it is asked for, the same at every call.

  Attributes:
    num_classes: How many classes there are.
  """

  def __init__(self, split: str, side: int = 224, num_classes: int = 1000):
    if side < 1 or num_classes < 1:
      raise UserError(
        f'the synthetic images would have a side of {side} and {num_classes} classes; give '
        "numbers of at least 1, as in 'synthetic:32,10'."
      )
    self.num_classes = num_classes
    self._side = side
    self._split = list(SIZES).index(split)
    self._size = SIZES[split]

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Record:
    rng = np.random.default_rng((self._split, index))
    shape = (self._side, self._side, 3)
    image = np.frombuffer(rng.bytes(self._side * self._side * 3), np.uint8).reshape(shape)
    return {'image': image, 'label': int(rng.integers(self.num_classes))}
