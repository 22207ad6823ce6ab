"""What crosses the network in a training step: gradients once, and no image."""

import jax
import pytest

from benchmarks.scaling import bytes_of, collectives, compile_step
from cbam_jax.cli.config_file import load_config

PROGRAM = """
  %all-reduce.1 = f32[64]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add
  %all-reduce.2 = (f32[2,3]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%a, %b), to_apply=%add
  %gather = u8[16,8,8,3]{3,2,1,0} all-gather(%images), dimensions={0}
  %done = pred[5]{0} all-gather-done(%started)
  %fusion = f32[9]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-reduce.3
"""


def test_collectives_by_hand():
  assert collectives(PROGRAM) == [
    ('all-reduce', 256, [(64,)]),
    ('all-reduce', 32, [(2, 3), (4,)]),
    ('all-gather', 3072, [(16, 8, 8, 3)]),
  ]


def small(*overrides: str):
  """A program for eight devices and its state: all that the modern recipe has, in small."""
  fixed = ['batch_size=48', 'eval_batch_size=48', 'data.image_size=32', 'data.resized_side=36']
  fixed += ['model.group_size=6', 'model.stem=cifar', 'model.fields.stage_sizes=(1, 1)']
  given = [f'--config.{override}' for override in [*fixed, *overrides]]
  return compile_step(load_config('imagenet:resnet18,cbam,modern', given))


@pytest.mark.slow
def test_gradients_are_reduced_once_and_nothing_is_gathered():
  program, state = small()
  found = collectives(program.as_text())
  assert {kind for kind, _, _ in found} == {'all-reduce'}
  needed = bytes_of(state.params) + bytes_of(state.batch_stats)
  assert sum(size for _, size, _ in found) == pytest.approx(needed, rel=0.01)


@pytest.mark.slow
def test_a_shared_state_gathers_parameters_and_nothing_else():
  program, state = small('mesh.fsdp=8')
  found = collectives(program.as_text())
  assert {kind for kind, _, _ in found} <= {'all-reduce', 'all-gather', 'reduce-scatter'}
  split = [
    array.shape
    for array in jax.tree.leaves(state.params)
    if array.sharding.shard_shape(array.shape) != array.shape
  ]
  gathered = [shape for kind, _, shapes in found if kind == 'all-gather' for shape in shapes]
  assert sorted(gathered) == sorted(split)
  reduced = sum(size for kind, size, _ in found if kind != 'all-gather')
  needed = bytes_of(state.params) + bytes_of(state.batch_stats)
  assert reduced == pytest.approx(needed, rel=0.01)


@pytest.mark.slow
def test_batch_norm_over_the_global_batch_adds_sums_of_channels():
  """Two sums forward and two backward, of each channel that a batch norm has."""
  program, state = small('model.group_size=None')
  found = collectives(program.as_text())
  assert {kind for kind, _, _ in found} == {'all-reduce'}
  needed = bytes_of(state.params) + 2 * bytes_of(state.batch_stats)
  assert sum(size for _, size, _ in found) == pytest.approx(needed, rel=0.01)
