"""Training processes for every test here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.runs import Trainer


@pytest.fixture(scope='session')
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
  """Starts trainings, which share their compiled programs with those of pytest's other workers."""
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  return Trainer(tmp_path_factory.mktemp('trainer'), shared / 'compiled')


@pytest.fixture(scope='session')
def undisturbed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The folder of a run to which nothing has happened."""
  folder = tmp_path_factory.mktemp('undisturbed') / 'run'
  trainer.complete(folder)
  return folder
