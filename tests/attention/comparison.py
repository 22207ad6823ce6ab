"""How the tests of the fused CBAM compare trees of arrays."""

import jax
import numpy as np


def assert_close(actual, desired, tolerance):
  """Each leaf differs by no more than `tolerance` of the largest element desired of it."""

  def check(a, b):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    assert np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(b)), 1e-3)

  jax.tree.map(check, actual, desired)
