"""Compiled programs kept from run to run: where, and that nothing can break a run over it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cbam_jax.layers import onednn
from cbam_jax.training.compilation_cache import keep_compiled_programs

KEY = 'jax_compilation_cache_dir'


@pytest.fixture(autouse=True)
def _unset(monkeypatch, tmp_path):
  before = jax.config.values[KEY]
  jax.config.update(KEY, None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  yield
  jax.config.update(KEY, before)


def test_the_folder_is_the_users(tmp_path):
  keep_compiled_programs()
  assert jax.config.values[KEY] == str(tmp_path / 'cache' / 'cbam_jax' / 'xla')
  assert (tmp_path / 'cache' / 'cbam_jax' / 'xla').is_dir()


@pytest.mark.parametrize('chosen', ['/somewhere/else', ''])
def test_who_has_chosen_a_folder_or_none_keeps_it(tmp_path, chosen):
  jax.config.update(KEY, chosen)
  keep_compiled_programs()
  assert jax.config.values[KEY] == chosen
  assert not (tmp_path / 'cache').exists()


def test_what_calls_onednn_is_not_kept(monkeypatch, tmp_path):
  monkeypatch.setattr(onednn, 'is_called', lambda: True)
  keep_compiled_programs()
  assert jax.config.values[KEY] is None
  assert not (tmp_path / 'cache').exists()


def test_a_folder_that_cannot_be_made_is_a_warning(monkeypatch, tmp_path, caplog):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  with caplog.at_level(logging.WARNING):
    keep_compiled_programs()
  assert 'not kept for the next run' in caplog.text
  assert jax.config.values[KEY] is None


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch, caplog):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write anywhere
  with caplog.at_level(logging.WARNING):
    keep_compiled_programs()
  assert 'is read-only' in caplog.text
  assert jax.config.values[KEY] is None


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
  code = (
    'import jax, jax.numpy as jnp\n'
    'from cbam_jax.training.compilation_cache import keep_compiled_programs\n'
    'keep_compiled_programs()\n'
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
    'events = []\n'
    'jax.monitoring.register_event_listener(lambda name, **_: events.append(name))\n'
    'jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))\n'
    "print('/jax/compilation_cache/cache_hits' in events)\n"
  )
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  root = Path(__file__).resolve().parents[2]
  runs = [
    subprocess.run(
      [sys.executable, '-c', code], env=environment, cwd=root, capture_output=True, text=True
    )
    for _ in range(2)
  ]
  assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
  assert [run.stdout.strip() for run in runs] == ['False', 'True']
  assert list((tmp_path / 'cache' / 'cbam_jax' / 'xla').iterdir())
