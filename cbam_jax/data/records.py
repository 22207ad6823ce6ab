"""What a set of examples is to the rest: anything with a length and random access."""

from __future__ import annotations

from typing import Protocol, TypedDict

import numpy as np


class Record(TypedDict):
  """One example as its source stores it.

  `image` is uint8 (H, W, C), or the bytes of an encoded file, which the loader's workers decode.
  """

  image: np.ndarray | bytes
  label: int


class Source(Protocol):
  """A set of examples with random access.

  One that knows more has `classes`, their names, and `name(index)`, an example's file.

  Attributes:
    num_classes: How many classes there are; a label is under that.
  """

  num_classes: int

  def __len__(self) -> int:
    """The number of examples."""
    ...

  def __getitem__(self, index: int) -> Record:
    """The example at `index`, the same at every call."""
    ...
