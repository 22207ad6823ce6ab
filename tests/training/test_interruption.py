"""SIGTERM inside a process: noted between steps, and acted on by a thread when there are none."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cbam_jax.training.interruption import Interruption


def test_sigterm_is_noted_and_the_handler_before_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with Interruption() as interruption:
    assert not interruption.requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested(2)
  assert signal.getsignal(signal.SIGTERM) is before
  assert signal.set_wakeup_fd(-1) == -1


def test_a_thread_may_train():
  """Only the main thread is told of signals."""
  answers = []

  def train() -> None:
    with Interruption() as interruption:
      answers.append(interruption.requested(1))

  thread = threading.Thread(target=train)
  thread.start()
  thread.join()
  assert answers == [False]


# Keeps Python from running any handler, as a long compilation does.
BUSY = """
import hashlib
from cbam_jax.training import interruption
interruption.PATIENCE_SECONDS = 1
with interruption.Interruption():
  print('ready', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
"""


def test_a_step_that_takes_too_long_is_given_up():
  process = subprocess.Popen([sys.executable, '-c', BUSY], stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == 'ready\n'
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert 1 <= time.monotonic() - started < 30
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def handler():
  """Sets the handler of SIGINT."""
  before = signal.getsignal(signal.SIGINT)
  yield lambda handler: signal.signal(signal.SIGINT, handler)
  signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_does_what_it_did(handler):
  handler(signal.default_int_handler)
  with Interruption() as interruption:
    signal.raise_signal(signal.SIGINT)
    assert interruption.requested(1)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_in_the_background_ignores_ctrl_c(handler):
  handler(signal.SIG_IGN)
  with Interruption() as interruption:
    signal.raise_signal(signal.SIGINT)
    assert not interruption.requested(1)
