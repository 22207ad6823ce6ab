"""Compiled programs kept from run to run, so that a restarted one is soon at work again."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax

from cbam_jax.layers import onednn

logger = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
  """Lets JAX keep what takes it over a second to compile, in the user's cache folder.

  That is `$XDG_CACHE_HOME/cbam_jax/xla`, or `~/.cache/cbam_jax/xla`. Whoever has set
  `JAX_COMPILATION_CACHE_DIR` is obeyed; empty, it turns this off. Where the folder cannot be
  written, a warning says so and nothing is kept.

  On a CPU that calls oneDNN nothing is kept, unless that variable says where: XLA cannot store what
  calls it, and whoever lets it store programs has its own, slower convolutions and products.

  This asks for JAX's devices: not before `jax.distributed.initialize`.
  """
  if jax.config.values['jax_compilation_cache_dir'] is not None or onednn.is_called():
    return
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  try:
    folder = Path(home).expanduser() / 'cbam_jax' / 'xla'
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
  except (OSError, RuntimeError) as error:  # RuntimeError: no home is known
    logger.warning('Compiled programs are not kept for the next run: %s', error)
    return
  if not writable:
    logger.warning('Compiled programs are not kept for the next run: %s is read-only', folder)
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
