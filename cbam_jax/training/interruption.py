"""Preemption and Ctrl-C: SIGTERM and SIGINT end a run after the step under way."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

# Machines are taken away 30 s after the signal; a step that takes longer than this is given up.
PATIENCE_SECONDS = 25


class Interruption:
  """A context in which SIGTERM is noted, and ends the process if nobody acts on it in time.

  A step, an evaluation or a compilation may keep Python from running for longer than the machine
  has left; a thread of its own then ends the process, whose earlier checkpoints are whole. SIGINT
  (Ctrl-C) is noted too, and the second one does what it did before.

  Attributes:
    by_keyboard: Whether it was SIGINT.
  """

  def __init__(self) -> None:
    self.by_keyboard = False
    self._requested = False
    self._done = threading.Event()
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    # Several processes are told by JAX's own handler, which lets them agree on a step.
    alone = jax.process_count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
      # A shell has its background jobs ignore Ctrl-C.
      if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
      # The interpreter writes to this pair as the signal comes, even while C++ code is running.
      self._heard, self._told = socket.socketpair()
      self._told.setblocking(False)
      self._previous_fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
      self._watcher = threading.Thread(target=self._watch, daemon=True)
      self._watcher.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._done.set()
    if self._previous:
      signal.set_wakeup_fd(self._previous_fd)
      for number, handler in self._previous.items():
        if handler is not None:  # as of one that Python did not set
          signal.signal(number, handler)
      self._told.close()
      self._watcher.join()

  def requested(self, step: int) -> bool:
    """Whether to stop after `step`: the same answer on all processes of a run."""
    if jax.process_count() == 1:
      return self._requested
    return bool(multihost_utils.reached_preemption_sync_point(step))

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._requested = True
    if number == signal.SIGINT:
      self.by_keyboard = True
      signal.signal(number, self._previous[number] or signal.default_int_handler)
      # Not by print, which this handler may have interrupted.
      os.write(2, b'\nStopping after this step. Again to stop without a checkpoint.\n')

  def _watch(self) -> None:
    with self._heard:
      while (received := self._heard.recv(1)) and received != bytes([signal.SIGTERM]):
        pass
    if received and not self._done.wait(PATIENCE_SECONDS):
      os._exit(0)
