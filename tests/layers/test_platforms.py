"""How networks are compiled."""

import jax
import jax.numpy as jnp
import pytest

import cbam_jax
from cbam_jax.layers import Conv, platforms
from tests.layers.random_variables import random_variables


def compiled(options):
  conv, x = Conv(32, (3, 3)), jnp.ones((2, 32, 32, 32))
  variables = random_variables(conv, x)
  return jax.jit(conv.apply, compiler_options=options).lower(variables, x).compile().as_text()


def test_a_cpus_convolutions_are_not_left_to_a_library():
  if jax.default_backend() != 'cpu' or '__ynn_fusion' not in compiled(None):
    pytest.skip('XLA leaves no convolution to YNNPACK here')
  options = cbam_jax.compiler_options()
  assert '__ynn_fusion' not in compiled(options)
  # They are the caller's own, to add to.
  options['xla_cpu_unheard_of'] = '1'
  assert 'xla_cpu_unheard_of' not in cbam_jax.compiler_options()


@pytest.fixture
def _asked_anew():
  platforms._takes_convolutions_back.cache_clear()
  yield
  platforms._takes_convolutions_back.cache_clear()


@pytest.mark.usefixtures('_asked_anew')
def test_no_options_that_xla_does_not_know(monkeypatch):
  monkeypatch.setattr(platforms, '_ON_CPU', {'xla_cpu_unheard_of': '1'})
  assert cbam_jax.compiler_options() is None


@pytest.mark.usefixtures('_asked_anew')
def test_no_options_where_xla_needs_none(monkeypatch):
  monkeypatch.setattr(jax.stages.Compiled, 'as_text', lambda _: 'all by itself')
  assert cbam_jax.compiler_options() is None


def test_no_options_on_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert cbam_jax.compiler_options() is None
  assert platforms.once_options() is None


def test_what_the_user_told_xla_stands(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_experimental_ynn_fusion_type=')
  assert cbam_jax.compiler_options() is None
