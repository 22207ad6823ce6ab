"""Strict settings for every test, and the fixtures that several folders share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# JAX reads both when it is first imported. Eight devices let sharding be tested on any machine.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
).strip()

import hypothesis
import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Broadcasting over an implicit leading axis is how (C,) meets (N, C) by mistake.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Most of the tests' time is compilation, which is the same from run to run.
if not jax.config.jax_compilation_cache_dir:
  jax.config.update('jax_compilation_cache_dir', str(ROOT / '.cache' / 'jax'))

# An example's first run compiles, so time says nothing. The same examples every run: a failure
# in continuous integration can be repeated.
hypothesis.settings.register_profile('cbam_jax', deadline=None, derandomize=True)
hypothesis.settings.load_profile('cbam_jax')


@pytest.fixture
def x64() -> Iterator[None]:
  """Lets one test compute in float64."""
  before = jax.config.jax_enable_x64
  jax.config.update('jax_enable_x64', True)
  yield
  jax.config.update('jax_enable_x64', before)


@pytest.fixture
def eight_devices() -> None:
  """Skips the test where there are fewer, as on a machine with one GPU."""
  if jax.device_count() < 8:
    pytest.skip(f'needs eight devices, here are {jax.device_count()}')


@pytest.fixture(scope='session')
def golden() -> Path:
  """The folder of golden files, found as CONTRIBUTING.md says. It may not exist."""
  if named := os.environ.get('CBAM_JAX_GOLDEN'):
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
      pytest.fail(
        f'CBAM_JAX_GOLDEN is {named!r}, which is not a folder: name one that holds the golden '
        'files, or unset the variable.'
      )
    return folder
  beside = ROOT.parent / 'shared' / 'golden'
  return beside if beside.is_dir() else ROOT / 'tests' / 'golden'


@pytest.fixture(scope='session')
def golden_file(golden: Path) -> Callable[[str], Path]:
  """A function from a golden file's name to its path, which skips the test if it isn't there."""

  def find(name: str) -> Path:
    path = golden / name
    if not path.is_file():
      pytest.skip(f'no golden file {path}; set CBAM_JAX_GOLDEN to the folder that has it')
    return path

  return find
