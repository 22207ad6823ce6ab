import jax.numpy as jnp
import pytest

from cbam_jax.layers import at_least_float32


@pytest.mark.parametrize(
  ('given', 'kept'),
  [
    (jnp.bfloat16, jnp.float32),
    (jnp.float16, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.float64, jnp.float64),
    ('bfloat16', jnp.float32),
  ],
)
def test_at_least_float32(given, kept):
  assert at_least_float32(given) == kept
