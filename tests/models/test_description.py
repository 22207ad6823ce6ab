"""Networks as plain data, and back."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cbam_jax import BAM, CBAM, UserError, create_model, list_models
from cbam_jax.models.description import (
  KINDS,
  UNDESCRIBED,
  blaming_fields,
  describe,
  from_description,
)
from cbam_jax.models.registry import ATTENTIONS, MODELS


def round_trip(model):
  return from_description(json.loads(json.dumps(describe(model))))


@pytest.mark.parametrize('name', list_models())
@pytest.mark.parametrize('attention', ['none', 'se', 'bam', 'cbam'])
def test_every_network_is_described_by_its_name(name, attention):
  model = create_model(name, attention=attention)
  expected = {'model': name, 'attention': attention, 'attention_fields': {}, 'fields': {}}
  assert describe(model) == expected
  assert describe(round_trip(model)) == expected


def test_fields_that_differ_are_described():
  attention = functools.partial(CBAM, order='parallel', pools=('avg', 'lse'), reduction=8)
  model = create_model(
    'wide_resnet18_2.0',
    attention=attention,
    num_classes=10,
    stem='cifar',
    group_size=32,
    dtype=jnp.bfloat16,
    param_dtype='float16',
    remat=True,
  )
  assert describe(model) == {
    'model': 'wide_resnet18_2.0',
    'attention': 'cbam',
    'attention_fields': {'order': 'parallel', 'pools': ['avg', 'lse'], 'reduction': 8},
    'fields': {
      'num_classes': 10,
      'stem': 'cifar',
      'group_size': 32,
      'dtype': 'bfloat16',
      'param_dtype': 'float16',
      'remat': True,
    },
  }
  assert describe(round_trip(model)) == describe(model)


def test_a_width_of_its_own():
  model = create_model('resnet18', width=0.25)
  assert describe(model)['model'] == 'resnet18'
  assert describe(model)['fields'] == {'width': 0.25}
  assert describe(create_model('mobilenet_v1', width=0.7))['fields'] == {'width': 0.7}
  of_numpy = describe(create_model('mobilenet_v1', width=np.float32(0.5)))['fields']['width']
  assert (of_numpy, type(of_numpy)) == (0.5, float)
  odd = create_model('resnet34', stage_sizes=(1, 1))
  assert describe(odd)['fields'] == {'stage_sizes': [1, 1]}
  assert round_trip(odd).stage_sizes == (1, 1)


def test_an_attention_that_leaves_the_groups_of_its_network():
  model = create_model('resnet18', attention=functools.partial(CBAM, group_size=2), group_size=4)
  assert describe(model)['attention_fields'] == {'group_size': 2}


class Own(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    return x


class Subclass(CBAM):
  pass


@pytest.mark.parametrize(
  'model',
  [
    create_model('resnet18', attention=Own),
    create_model('resnet18', attention=Subclass),
    create_model('resnet18', stage_attention=CBAM),
    create_model('resnet18', attention=CBAM, stage_attention=BAM),
  ],
  ids=['own', 'subclass', 'elsewhere', 'two'],
)
def test_attention_that_no_name_stands_for_is_refused(model):
  with pytest.raises(UserError, match=r'the attention of this network is .* Save the variables'):
    describe(model)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': 'resnet5'}, "the model is 'resnet5'"),
    ({'attention': 'cbma'}, "the attention is 'cbma'"),
    ({'attention_fields': {'ordre': 1}}, "no field 'ordre'"),
    ({'fields': {'widht': 2}}, "no field 'widht'"),
    ({'fields': None}, 'describes no network'),
    ({'fields': 5}, 'describes no network'),
    ({'fields': {'num_classes': 'ten'}}, "num_classes is 'ten'; give an integer of at least 1, or"),
    ({'fields': {'num_classes': True}}, 'num_classes is True'),
    ({'fields': {'group_size': 0}}, 'group_size is 0; give an integer of at least 1, or None'),
    ({'fields': {'stage_sizes': 5}}, 'stage_sizes is 5; give a list of integers'),
    ({'fields': {'stage_sizes': [2, 'two']}}, 'stage_sizes is'),
    ({'fields': {'width': float('nan')}}, 'width is nan; give a finite number'),
    ({'fields': {'remat': 'no'}}, "remat is 'no'; give true or false"),
    ({'fields': {'stem': None}}, 'stem is None; give a text'),
    ({'fields': {'dtype': 'float33'}}, "dtype is 'float33'; give one of bfloat16, float16"),
    ({'fields': {'param_dtype': 'int32'}}, "param_dtype is 'int32'"),
    ({'fields': {'stage_attention': 'bam'}}, "no field 'stage_attention'"),
    ({'fields': {'attention': 'cbam'}}, "no field 'attention'"),
    ({'fields': {'parent': None}}, "no field 'parent'"),
    ({'attention_fields': {'dtype': 'nope'}}, "attention 'cbam' .* dtype is 'nope'.* or None"),
    ({'attention_fields': {'pools': 'avg'}}, "pools is 'avg'; give a list of texts"),
    ({'attention_fields': {'reduction': '16'}}, "reduction is '16'"),
    ({'model': ['resnet18']}, 'resnet18'),
  ],
)
def test_a_description_of_nothing_is_refused(change, message):
  description = {'model': 'resnet18', 'attention': 'cbam', 'attention_fields': {}, 'fields': {}}
  with pytest.raises(UserError, match=message):
    from_description(description | change)


@pytest.mark.parametrize('description', [None, {}, [], 'resnet18'])
def test_no_description_at_all(description):
  with pytest.raises(UserError, match='describes no network'):
    from_description(description)


def test_every_field_is_of_a_known_kind():
  modules = [make() for make in (*MODELS.values(), *ATTENTIONS.values()) if make]
  fields = [field for module in modules for field in dataclasses.fields(module)]
  kinds = {field.type.removesuffix(' | None') for field in fields if field.name not in UNDESCRIBED}
  assert kinds <= KINDS.keys()


@pytest.mark.parametrize('fields', [{'stage_sizes': [1] * 70}, {'width': 1e300}])
def test_what_no_network_can_be_made_of_is_blamed_on_the_fields(fields):
  description = {'model': 'resnet18', 'attention': 'cbam', 'attention_fields': {}, 'fields': fields}
  model = from_description(description)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  name = next(iter(fields))
  with (
    pytest.raises(UserError, match=rf"resnet18 with the fields .*'{name}': .* cannot be made"),
    blaming_fields(model),
  ):
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
