import json
import subprocess
import sys

import pytest

# What `import cbam_jax` adds to an interpreter that has jax and flax, and the seconds it computes:
# those of the clock would count whatever else the machine does, as even these do a little.
PROBE = """
import json, sys, time
import jax, flax.linen
before = set(sys.modules)
start = time.process_time()
import cbam_jax
seconds = time.process_time() - start
print(json.dumps({'seconds': seconds, 'modules': sorted(set(sys.modules) - before)}))
"""


@pytest.fixture(scope='module')
def probes():
  command = [sys.executable, '-c', PROBE]
  return [
    json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for _ in range(5)
  ]


def test_import_needs_jax_and_flax_alone(probes):
  roots = {name.split('.')[0] for name in probes[0]['modules']}
  assert 'cbam_jax' in roots
  assert roots - sys.stdlib_module_names <= {'cbam_jax', 'jax', 'flax', 'numpy'}


def test_import_takes_no_longer_than_that_of_jax_and_flax(probes):
  assert min(probe['seconds'] for probe in probes) < 0.1
