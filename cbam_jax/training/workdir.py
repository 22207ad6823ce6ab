"""The folder of a run: what it was started with, and what it has logged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import ml_collections

from cbam_jax.errors import UserError
from cbam_jax.training.config import default_config
from cbam_jax.training.distributed import agreed

# What may not change between two parts of a run: the network, the data and their order, and what
# else gives the state its shape.
FIXED_KEYS = ('model.', 'data.', 'seed', 'batch_size', 'average_decay', 'optimizer.decay')

# Where and how data is read may, and how memory is used.
FREE_KEYS = ('data.dir', 'data.workers', 'data.bad_share', 'model.remat')


class Workdir:
  """The files of one run.

  Attributes:
    root: The folder.
    config_file: The configuration that the run was started with.
    classes_file: The names of the classes, one a line; not there if the data set has none.
    metrics_file: A line of JSON for each time metrics were logged.
    checkpoints: The folder of checkpoints.
    curves_file: The picture of loss and accuracy.
  """

  def __init__(self, root: str | Path):
    self.root = Path(root).expanduser()
    self.config_file = self.root / 'config.json'
    self.classes_file = self.root / 'classes.txt'
    self.metrics_file = self.root / 'metrics.jsonl'
    self.checkpoints = self.root.absolute() / 'checkpoints'  # orbax takes no other
    self.curves_file = self.root / 'curves.png'

  def check(self, config: ml_collections.ConfigDict) -> None:
    """Checks, before anything is written, that a run of `config` can go on in the folder.

    Raises:
      UserError: If the folder's run has another network or data set.
    """
    if '[' in str(self.root.absolute()):
      # It takes the name for a pattern, does not find what it has just written, and drops it.
      raise UserError(
        f"the workdir is {str(self.root)!r}, but orbax loses checkpoints below a name with '['; "
        'choose another --workdir.'
      )
    if not self.config_file.exists():
      return
    differences = [
      f'{key} is {was!r} there, {now!r} here'
      for key, was, now in _differences(self.config().to_dict(), config.to_dict())
      if key.startswith(FIXED_KEYS) and key not in FREE_KEYS
    ]
    if differences:
      raise UserError(
        f'{self.root} holds a run of another configuration: {"; ".join(differences)}. Choose '
        'another --workdir, or the same configuration to go on with that run.'
      )

  def claim(self, config: ml_collections.ConfigDict, classes: Sequence[str] | None = None) -> None:
    """Records `config` and the classes' names as this run's, in a folder that is made if need be.

    Raises:
      UserError: If the folder's run has another network or data set (nothing is written then), or
        if the folder cannot be made.
    """
    self.check(config)
    self._make()
    if jax.process_index() == 0:  # for all
      _write_whole(self.config_file, json.dumps(config.to_dict(), indent=2) + '\n')
      if classes is not None:
        _write_whole(self.classes_file, ''.join(f'{" ".join(name.split())}\n' for name in classes))

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Makes the folder if need be, and holds it for this run until the end, however that comes.

    Raises:
      UserError: If another run holds it, or it cannot be made.
    """
    self._make()
    with (self.root / '.lock').open('a+') as lock:
      holder = _take(lock) if jax.process_index() == 0 else ''
      # All processes must end, not only the first, which holds it for all.
      if holder := agreed(holder):
        raise UserError(
          f'{self.root} is in use by another run ({holder}); wait for it, stop it, or choose '
          'another --workdir.'
        )
      yield

  def _make(self) -> None:
    try:
      self.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f'{error}; choose a --workdir that can be made.') from error

  def config(self) -> ml_collections.ConfigDict:
    """The configuration that the run was started with.

    Raises:
      UserError: If the folder holds no run.
    """
    config = default_config()
    try:
      with config.unlocked():
        config.update(json.loads(self.config_file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(
        f'{self.root} holds no run (there is no {self.config_file.name}); name the --workdir that '
        'a training was started with.'
      ) from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
      raise UserError(
        f'{self.config_file} cannot be read ({error}); restore it, or start a new run elsewhere.'
      ) from error
    return config

  def class_names(self) -> tuple[str, ...] | None:
    """The names of the classes, in the order of the logits; None if they are not known."""
    try:
      return tuple(self.classes_file.read_text().splitlines())
    except (OSError, UnicodeDecodeError):
      return None

  def metrics(self) -> Iterator[dict[str, Any]]:
    """What the run has logged, in order; a line that is damaged or cut short is left out."""
    if not self.metrics_file.exists():
      return
    for line in self.metrics_file.read_bytes().splitlines():
      try:
        entry = json.loads(line)
      except ValueError:
        continue
      if isinstance(entry, dict) and isinstance(entry.get('step'), int):
        yield entry

  def forget_after(self, step: int) -> None:
    """Drops what was logged after `step`, which a resumed run will log again."""
    lines = [json.dumps(entry) + '\n' for entry in self.metrics() if entry['step'] <= step]
    _write_whole(self.metrics_file, ''.join(lines))

  def last_test(self, step: int) -> dict[str, Any] | None:
    """The test metrics that were logged at `step`, if they were."""
    wanted = ('loss', 'top1', 'top5', 'count')
    for entry in self.metrics():
      if entry.get('split') == 'test' and entry['step'] == step and entry.keys() >= set(wanted):
        return {name: entry[name] for name in wanted}
    return None


def _differences(
  before: dict[str, Any], now: dict[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any, Any]]:
  for key in sorted(before.keys() | now.keys()):
    was, is_now = before.get(key), now.get(key)
    if isinstance(was, dict) and isinstance(is_now, dict):
      yield from _differences(was, is_now, f'{prefix}{key}.')
    elif _plain(was) != _plain(is_now):
      yield prefix + key, was, is_now


def _plain(value: Any) -> Any:
  """JSON has no tuples."""
  return list(value) if isinstance(value, tuple) else value


def _take(lock: TextIO) -> str:
  """Locks a file until it is closed, and writes there who has it; who has it already if one has."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    lock.seek(0)
    return lock.read().strip() or 'unknown'
  lock.truncate(0)
  lock.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  lock.flush()
  return ''


def _write_whole(path: Path, text: str) -> None:
  """Writes `path` so that a reader sees the old text or the new, never a part."""
  partial = path.with_name(path.name + '.partial')
  with partial.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())  # before the new name is on the disk
  os.replace(partial, path)
