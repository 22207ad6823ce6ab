"""How networks are compiled."""

import jax
import jax.numpy as jnp
import pytest

import cbam_jax
from cbam_jax.layers import Conv, platforms
from tests.layers.random_variables import random_variables

ON_CPU = platforms._ON_CPU


def compiled(options):
  conv, x = Conv(32, (3, 3)), jnp.ones((2, 32, 32, 32))
  variables = random_variables(conv, x)
  return jax.jit(conv.apply, compiler_options=options).lower(variables, x).compile().as_text()


@pytest.mark.skipif(not platforms._known(*ON_CPU.items()), reason='unknown to this XLA')
def test_a_cpus_convolutions_are_not_left_to_a_library():
  options = cbam_jax.compiler_options()
  assert options == ON_CPU
  assert '__ynn_fusion' in compiled(None)
  assert '__ynn_fusion' not in compiled(options)
  # It is the caller's own, to add to.
  options['xla_cpu_unheard_of'] = '1'
  assert cbam_jax.compiler_options() == ON_CPU


def test_unknown_options_are_none(monkeypatch):
  monkeypatch.setattr(platforms, '_ON_CPU', {'xla_cpu_unheard_of': '1'})
  assert cbam_jax.compiler_options() is None


def test_no_options_on_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert cbam_jax.compiler_options() is None
