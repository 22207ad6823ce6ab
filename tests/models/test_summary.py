import jax
import jax.numpy as jnp
import pytest

from cbam_jax import UserError, create_model, summary
from tests.layers.random_variables import random_variables
from tests.marks import first
from tests.models.networks import make


@pytest.mark.parametrize(
  ('name', 'attention'), [('resnet18', 'cbam'), ('mobilenet_v1', 'bam'), ('vgg16', 'none')]
)
def test_rows_add_up(name, attention):
  model = make(name, attention)
  cost = summary(model, image_size=64)
  assert cost.params == sum(stage.params for stage in cost.stages)
  assert cost.multiply_adds == sum(stage.multiply_adds for stage in cost.stages)
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.ones((1, 64, 64, 3)), train=False)
  )['params']
  assert cost.params == sum(leaf.size for leaf in jax.tree.leaves(params))
  assert {stage.name for stage in cost.stages} == set(params)
  assert all(isinstance(n, int) for n in (cost.params, cost.multiply_adds))


def test_rows_of_resnet18():
  cost = summary(create_model('resnet18'))
  rows = {stage.name: stage for stage in cost.stages}
  assert list(rows) == ['stem', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
  assert {name: row.output_shape for name, row in rows.items()} == {
    'stem': None,
    'stage1': (56, 56, 64),
    'stage2': (28, 28, 128),
    'stage3': (14, 14, 256),
    'stage4': (7, 7, 512),
    'head': None,
  }
  # 7x7 from 3 to 64 and a norm, at 112x112; four 3x3 from 64 to 64, at 56x56.
  assert (rows['stem'].params, rows['stem'].multiply_adds) == (9408 + 128, 9408 * 112 * 112)
  assert rows['stage1'].params == 4 * (9 * 64 * 64 + 128)
  assert rows['stage1'].multiply_adds == 4 * 9 * 64 * 64 * 56 * 56
  assert (rows['head'].params, rows['head'].multiply_adds) == (513_000, 512_000)


def test_attention_counts():
  # On 64 channels at 56x56: an MLP of 2 * 64 * 4, twice for CBAM, and 7x7 from 2 maps to 1.
  plain, se, cbam = (
    summary(create_model('resnet18', attention=attention)).stages[1].multiply_adds
    for attention in ('none', 'se', 'cbam')
  )
  assert se - plain == 2 * (2 * 64 * 4)
  assert cbam - plain == 2 * (2 * 2 * 64 * 4 + 98 * 56 * 56)


def test_string_is_a_table():
  cost = summary(create_model('resnet18', attention='cbam'))
  header, rule, *rows, total = str(cost).splitlines()
  assert header.split() == ['stage', 'output', 'params', 'multiply-adds']
  assert set(rule) == {'-'}
  assert [row.split()[0] for row in rows] == [stage.name for stage in cost.stages]
  assert rows[1].split()[:2] == ['stage1', '56x56x64']
  assert total.split() == ['total', '11,779,392', f'{cost.multiply_adds:,}']
  assert len({len(line) for line in str(cost).splitlines()}) == 1


@pytest.mark.parametrize('dtype', first(1, [jnp.bfloat16, jnp.float32]))
def test_type_costs_nothing(dtype):
  cost, reference = (summary(make('resnet18', 'cbam', dtype=t)) for t in (dtype, jnp.float32))
  assert cost == reference


def test_channels():
  rgb, grey = (summary(create_model('resnet18'), channels=channels) for channels in (3, 1))
  assert rgb.params - grey.params == 2 * 49 * 64


@pytest.mark.parametrize('arguments', [{'image_size': 0}, {'image_size': -1}, {'channels': 0}])
def test_no_pixels(arguments):
  with pytest.raises(UserError, match='no pixels; both must be at least 1'):
    summary(create_model('resnet18'), **arguments)


def test_does_not_run_the_network():
  # 100 thousand pixels a side: 5 TB of features.
  cost = summary(create_model('resnet18'), image_size=100_000)
  assert cost.stages[1].output_shape == (25_000, 25_000, 64)


def test_parameters_of_the_variables(x64):
  model = make('resnet18', 'bam', param_dtype=jnp.float64)
  variables = random_variables(model, jnp.ones((1, 32, 32, 3)), train=False)
  leaves = jax.tree.leaves(variables['params'])
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float64')}
  assert summary(model).params == sum(leaf.size for leaf in leaves)
