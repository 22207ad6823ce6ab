"""The configuration: what it refuses, in which words, and before anything is written."""

import jax
import pytest

from cbam_jax.attention import BAM, CBAM, SqueezeExcitation
from cbam_jax.errors import UserError
from cbam_jax.training.config import build_model, default_config, flattened, validate
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.keys import KEYS

# Key, a value that cannot be, and what the message tells besides the two: what is allowed or
# what to do.
INVALID = [
  ('seed', -1, 'from 0 to under 2**32'),
  ('seed', 2**32, 'from 0 to under 2**32'),
  ('epochs', 0, 'above 0'),
  ('epochs', -1, 'above 0'),
  ('epochs', 1e9, 'at most 1,000,000'),
  ('batch_size', 0, '1 or more'),
  ('batch_size', 12, 'a multiple of 8'),
  ('batch_size', 80, 'choose a batch size of at most that'),
  ('eval_batch_size', 12, 'a multiple of 8'),
  ('eval_batch_size', -8, '1 or more'),
  ('eval_every_epochs', 0, 'above 0'),
  ('log_every_steps', 0, '1 or more'),
  ('dtype', 'float16', 'allowed: float32, bfloat16'),
  ('dtype', 'bfloat', "Did you mean 'bfloat16'"),
  ('label_smoothing', 1.0, 'from 0 to under 1'),
  ('label_smoothing', -0.1, 'from 0 to under 1'),
  ('model.name', 'resnet5', "Did you mean 'resnet50'"),
  ('model.attention', 'cbma', "Did you mean 'cbam'"),
  ('model.attention', 'CBAM', "Did you mean 'cbam'"),
  ('model.attention_fields', {'ratio': 8}, 'it takes'),
  ('model.attention_fields', {'spatial_kernal': 3}, "Did you mean 'spatial_kernel'"),
  ('model.attention_fields', {'reduction': 'half'}, 'it must be a number, such as 16'),
  ('model.attention_fields', {'order': 'paralel'}, "Did you mean 'parallel'"),
  ('model.stem', 'cifar10', "Did you mean 'cifar'"),
  ('model.num_classes', 0, '1 or more, or None'),
  ('model.group_size', 0, '1 or more, or None'),
  ('model.group_size', 5, 'a divisor'),
  ('model.fields', {'widht': 2.0}, 'it takes'),
  ('model.fields', {'num_classes': 10}, 'set model.num_classes instead'),
  ('model.fields', {'dtype': 'bfloat16'}, 'set dtype instead'),
  ('data.name', 'digit', 'tfds:NAME'),
  ('data.name', 'tfds:imagnet2012', "Did you mean 'imagenet2012'"),
  ('data.image_size', 0, 'from 1 to 16384'),
  ('data.image_size', 8, 'make them the same'),
  ('data.resized_side', 5, 'cannot be larger'),
  ('data.augmentation', 'flip', 'allowed: none, shift'),
  ('data.mean', (0.3, 0.3, 0.3), 'one number a channel'),
  ('data.mean', ('grey',), 'numbers, one a channel'),
  ('data.std', (0.0,), 'none of them zero'),
  ('data.workers', -1, 'from 0 to 1024'),
  ('optimizer.learning_rate', 0.0, 'finite and above 0'),
  ('optimizer.learning_rate', float('nan'), 'finite and above 0'),
  ('optimizer.learning_rate', float('inf'), 'finite and above 0'),
  ('optimizer.momentum', 1.0, 'from 0 to under 1'),
  ('optimizer.weight_decay', -1e-4, 'finite and 0 or more'),
  ('optimizer.schedule', 'cosin', "Did you mean 'cosine'"),
  ('optimizer.step_epochs', 0, 'above 0'),
  ('optimizer.warmup_epochs', -1.0, '0 or more, at most 1,000,000'),
  ('checkpoints.keep', 0, '1 or more'),
]


def set_key(config, key: str, value) -> None:
  *parents, name = key.split('.')
  for parent in parents:
    config = config[parent]
  config[name] = value


@pytest.mark.parametrize(('key', 'value', 'remedy'), INVALID)
def test_invalid_values_are_refused_before_anything_is_written(
  tiny_config, train, tmp_path, key, value, remedy
):
  if key == 'model.attention_fields':
    tiny_config.model.attention = 'cbam'
  set_key(tiny_config, key, value)
  with pytest.raises(UserError) as error:
    train(tiny_config, tmp_path / 'run')
  message = str(error.value)
  named = next(iter(value)) if isinstance(value, dict) else value
  assert str(named).removeprefix('tfds:') in message
  assert remedy in message
  assert not (tmp_path / 'run').exists()


def test_mean_and_std_fit_each_other_and_the_images(tiny_config):
  tiny_config.data.std = (0.2, 0.2, 0.2)
  with pytest.raises(UserError, match=r'data.mean is \(0.3,\) and data.std \(0.2, 0.2, 0.2\)'):
    validate(tiny_config)
  tiny_config.data.mean = (0.3, 0.3, 0.3)
  with pytest.raises(UserError, match='the images of tiny have 1 channels'):
    len(Experiment(tiny_config).train_source)


@pytest.mark.parametrize('devices', [1, 3, 16])
def test_the_devices_divide_the_batches(monkeypatch, tiny_config, devices):
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  if 16 % devices:
    with pytest.raises(UserError, match='batch_size is 16, which the 3 devices do not divide'):
      validate(tiny_config)
  else:
    validate(tiny_config)


def test_every_key_says_what_it_takes():
  assert flattened(default_config()).keys() == KEYS.keys()


def test_a_configuration_has_every_key_and_no_other(tiny_config):
  with tiny_config.unlocked():
    tiny_config.optimizer.momentun = 0.8
  with pytest.raises(UserError, match=r"'optimizer.momentun', .* mean 'optimizer.momentum'"):
    validate(tiny_config)
  with tiny_config.unlocked():
    del tiny_config.optimizer.momentun, tiny_config.seed, tiny_config.data.mean
  with pytest.raises(UserError, match=r'has no data.mean, seed; .*default_config\(\)'):
    validate(tiny_config)


def test_open_classes_are_those_of_the_training_set(tiny_config):
  tiny_config.model.num_classes = None
  experiment = Experiment(tiny_config)
  assert experiment.model.num_classes == 3
  assert experiment.config.model.num_classes == 3
  assert tiny_config.model.num_classes is None


def test_a_field_that_no_layer_can_use_is_named(tiny_config):
  tiny_config.model.name = 'resnet50'
  tiny_config.model.fields = {'stage_sizes': ('two',)}
  with pytest.raises(UserError, match="a number in stage_sizes is 'two'; it must be an integer"):
    _ = Experiment(tiny_config).abstract_state


def test_a_run_has_no_more_steps_than_can_be_counted(tiny_config):
  tiny_config.optimizer.warmup_epochs = 1e6
  assert Experiment(tiny_config).total_steps == 12
  tiny_config.epochs = 1e6
  tiny_config.batch_size = 8
  monster = Experiment(tiny_config)
  monster.train_source = range(2**16)
  with pytest.raises(UserError, match='at most 2147483647 steps, so lower them'):
    _ = monster.total_steps


def test_the_default_is_valid_and_has_no_other_keys():
  config = default_config()
  validate(config)
  with pytest.raises(AttributeError, match='learning_rat'):
    config.optimizer.learning_rat = 0.1


@pytest.mark.parametrize(
  ('name', 'made', 'field'),
  [
    ('none', None, {}),
    ('se', SqueezeExcitation, {'reduction': 8}),
    ('cbam', CBAM, {'order': 'parallel'}),
    ('bam', BAM, {'combine': 'product'}),
  ],
)
def test_the_network_is_what_the_configuration_describes(name, made, field):
  config = default_config()
  config.dtype = 'bfloat16'
  config.model.name = 'resnet18'
  config.model.attention = name
  config.model.attention_fields = field
  config.model.num_classes = 7
  config.model.stem = 'cifar'
  config.model.group_size = 32
  config.model.fields = {'width': 0.5}
  model = build_model(config)
  assert model.num_classes == 7
  assert model.stem == 'cifar'
  assert model.group_size == 32
  assert model.dtype == 'bfloat16'
  assert model.width == 0.5
  assert list(model.stage_sizes) == [2, 2, 2, 2]
  factory = model.stage_attention if name == 'bam' else model.attention
  if made is None:
    assert factory is None
    return
  attention = factory(name='attention')
  assert isinstance(attention, made)
  assert {key: getattr(attention, key) for key in field} == field
