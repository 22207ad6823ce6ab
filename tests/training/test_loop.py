"""Whole runs: what they leave behind, and that an interruption leaves no trace."""

import gc
import io
import json
import math
import struct

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cbam_jax.errors import RunError, UserError
from cbam_jax.training import loop
from cbam_jax.training.checkpoints import Checkpoints
from cbam_jax.training.evaluation import evaluate
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.workdir import Workdir


def final_state(config, folder):
  """The state of the latest checkpoint."""
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    step = checkpoints.latest_step()
    return step, checkpoints.restore(step, Experiment(config).abstract_state)


def lines(folder, split=None) -> list[dict]:
  """What was logged, without the speed, which no two runs share."""
  entries = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  for entry in entries:
    entry.pop('images_per_second', None)
    entry.pop('input_wait', None)
  return [entry for entry in entries if split in (None, entry['split'])]


def assert_same_run(config, one, other) -> None:
  assert lines(one) == lines(other)
  (step, state), (other_step, other_state) = (final_state(config, f) for f in (one, other))
  assert step == other_step
  jax.tree.map(np.testing.assert_array_equal, state, other_state)


class InterruptedError(Exception):
  """What stops a run in these tests."""


def interrupt_at(monkeypatch, step: int):
  """Lets the run stop when it is about to take the step after `step`."""
  real = Experiment.train_step

  def train_step(self, state, batch):
    if int(state.step) == step:
      raise InterruptedError
    return real(self, state, batch)

  monkeypatch.setattr(Experiment, 'train_step', train_step)


# ---- what a run leaves behind ----------------------------------------------------------------


def test_a_run_logs_training_and_test_metrics(tiny_config, finished):
  folder, result = finished
  everything = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  logged = {'step', 'epoch', 'split', 'loss', 'top1', 'top5'}
  for entry in everything:
    if entry['split'] == 'train':
      assert entry.keys() == logged | {
        'learning_rate',
        'images_per_second',
        'input_wait',
        'bad_images',
      }
      assert entry['images_per_second'] > 0
    else:
      assert entry.keys() - {'count'} == logged
    assert math.isfinite(entry['loss'])
    assert 0 <= entry['top1'] <= entry['top5'] <= 1
    assert entry['epoch'] == entry['step'] / 4

  # An epoch has four steps: a line of training after every two, then one of the test set.
  order = [(entry['step'], entry['split']) for entry in everything]
  assert order == [
    (step, split)
    for step in (2, 4, 6, 8, 10, 12)
    for split in (('train', 'test') if step % 4 == 0 else ('train',))
  ]
  rates = [entry['learning_rate'] for entry in everything if entry['split'] == 'train']
  np.testing.assert_allclose(rates, [0.3] * 4 + [0.03] * 2, rtol=1e-6)
  last = everything[-1]
  assert result['count'] == 20
  for key in ('loss', 'top1', 'top5'):
    assert last[key] == result[key]


def test_training_metrics_are_means_over_the_steps_since_the_last_line(
  tiny_config, finished, train, tmp_path
):
  tiny_config.log_every_steps = 1
  train(tiny_config, tmp_path / 'every')
  every, folder = lines(tmp_path / 'every', 'train'), finished[0]
  assert [entry['step'] for entry in every] == list(range(1, 13))
  for i, entry in enumerate(lines(folder, 'train')):
    for key in ('loss', 'top1', 'top5'):
      mean = (every[2 * i][key] + every[2 * i + 1][key]) / 2
      assert entry[key] == pytest.approx(mean, rel=1e-5)


def test_a_run_leaves_its_configuration_and_curves(tiny_config, finished):
  folder, _ = finished
  stored = json.loads((folder / 'config.json').read_text())
  assert stored == json.loads(json.dumps(tiny_config.to_dict()))
  with Image.open(folder / 'curves.png') as picture:
    assert picture.format == 'PNG'
    picture.load()
    # White paper with the blue and the vermilion of the two splits.
    colours = {colour[:3] for _, colour in picture.convert('RGB').getcolors(10**6)}
  assert {(255, 255, 255), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def read_events(file) -> list:
  """The scalars in a file of TensorBoard events, as (tag, step, value)."""
  from tensorboardX.proto.event_pb2 import Event

  data, scalars = file.read_bytes(), []
  while data:  # a record is its length, a checksum of 4 bytes, the record, and another checksum
    (length,) = struct.unpack('<Q', data[:8])
    event = Event.FromString(data[12 : 12 + length])
    scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    data = data[16 + length :]
  return scalars


def test_tensorboard_gets_what_is_logged(finished):
  folder, _ = finished
  (file,) = folder.glob('events.out.tfevents.*')
  events = {(tag, step): value for tag, step, value in read_events(file)}
  for entry in lines(folder):
    for key in ('loss', 'top1', 'top5'):
      value = events[f'{entry["split"]}/{key}', entry['step']]
      assert value == pytest.approx(entry[key], rel=1e-6)
  assert {'train/learning_rate', 'train/images_per_second'} <= {tag for tag, _ in events}


def test_the_best_checkpoint_evaluates_to_what_was_logged(finished):
  folder, _ = finished
  result = evaluate(str(folder))
  best = max(lines(folder, 'test'), key=lambda entry: (entry['top1'], entry['step']))
  assert result['count'] == 20
  for key in ('step', 'loss', 'top1', 'top5'):
    assert result[key] == best[key]


def test_the_configuration_decides_when_the_test_set_is_evaluated(tiny_config, train, tmp_path):
  tiny_config.epochs = 5
  tiny_config.eval_every_epochs = 2
  tiny_config.log_every_steps = 100
  train(tiny_config, tmp_path)
  assert [entry['step'] for entry in lines(tmp_path, 'test')] == [8, 16, 20]
  # What was not logged in between is logged before an evaluation.
  assert [entry['step'] for entry in lines(tmp_path, 'train')] == [8, 16, 20]


# ---- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  'step', [pytest.param(0, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
  tiny_config, finished, monkeypatch, train, tmp_path, step
):
  folder = tmp_path / 'interrupted'
  with monkeypatch.context() as patch:
    interrupt_at(patch, step)
    with pytest.raises(InterruptedError):
      train(tiny_config, folder)
  assert len(lines(folder)) < len(lines(finished[0]))
  # A machine that dies cuts a line short and leaves a checkpoint half-written.
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 7, "epo')
  if step:
    (folder / 'checkpoints' / '8.orbax-checkpoint-tmp').mkdir()
  result = train(tiny_config, folder)
  assert result == finished[1]
  assert_same_run(tiny_config, folder, finished[0])


@pytest.mark.slow
def test_a_run_can_be_interrupted_again_and_again(tiny_config, monkeypatch, train, tmp_path):
  tiny_config.data.augmentation = 'shift_flip'
  whole, pieces = tmp_path / 'whole', tmp_path / 'pieces'
  train(tiny_config, whole)
  for step in (5, 6, 10):
    with monkeypatch.context() as patch:
      interrupt_at(patch, step)
      with pytest.raises(InterruptedError):
        train(tiny_config, pieces)
  train(tiny_config, pieces)
  assert_same_run(tiny_config, whole, pieces)


def test_a_complete_run_is_left_alone(tiny_config, finished, train, monkeypatch):
  folder, result = finished
  before = {
    path: path.read_bytes() for path in (folder / 'checkpoints').rglob('*') if path.is_file()
  }
  metrics = (folder / 'metrics.jsonl').read_bytes()

  def refuse(*args):
    raise AssertionError('a step was taken')

  monkeypatch.setattr(Experiment, 'train_step', refuse)
  assert train(tiny_config, folder) == result
  assert (folder / 'metrics.jsonl').read_bytes() == metrics
  for path, content in before.items():
    assert path.read_bytes() == content


def test_a_complete_run_can_be_made_longer(tiny_config, train, tmp_path):
  tiny_config.epochs = 2
  train(tiny_config, tmp_path)
  tiny_config.epochs = 3
  train(tiny_config, tmp_path)
  assert [entry['step'] for entry in lines(tmp_path, 'test')] == [4, 8, 12]
  assert Workdir(tmp_path).config().epochs == 3


def test_the_optimizer_may_change_on_the_way(tiny_config, finished, train):
  folder, _ = finished
  tiny_config.epochs = 4
  tiny_config.optimizer.momentum = 0.0
  tiny_config.optimizer.schedule = 'cosine'
  train(tiny_config, folder)
  assert lines(folder)[-1]['step'] == 16


def test_a_folder_of_another_run_is_not_touched(tiny_config, finished, train):
  folder, _ = finished
  before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  tiny_config.model.attention = 'se'
  with pytest.raises(UserError, match=r"model.attention is 'none' there, 'se' here"):
    train(tiny_config, folder)
  assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_evaluate_needs_a_run_with_a_checkpoint(tiny_config, tmp_path):
  with pytest.raises(UserError, match='holds no run'):
    evaluate(str(tmp_path))
  Workdir(tmp_path).claim(tiny_config)
  with pytest.raises(UserError, match='holds no evaluated checkpoint'):
    evaluate(str(tmp_path))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # orbax's reads
def test_evaluate_says_that_a_checkpoint_is_damaged(finished):
  folder, _ = finished
  for checkpoint in (folder / 'checkpoints').iterdir():
    for array in (checkpoint / 'state').rglob('*ocdbt'):
      array.write_bytes(array.read_bytes()[:-9])
  before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  with pytest.raises(RunError, match=r'checkpoint .* cannot be read: .*restore it from a backup'):
    evaluate(str(folder))
  gc.collect()
  assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_a_run_that_cannot_be_restored_keeps_its_configuration(tiny_config, finished, train):
  folder, _ = finished
  for checkpoint in (folder / 'checkpoints').iterdir():
    (checkpoint / 'check' / 'metadata').unlink()
  before = (folder / 'config.json').read_bytes()
  tiny_config.epochs = 5
  with pytest.raises(RunError, match=r'none of the checkpoints .* can be read'):
    train(tiny_config, folder)
  assert (folder / 'config.json').read_bytes() == before


def test_a_disk_that_cannot_be_written_is_named(tiny_config, monkeypatch, train, tmp_path):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(loop.Report, 'log', full)
  with pytest.raises(RunError, match=r'cannot be written \(.*No space left.* Make room'):
    train(tiny_config, tmp_path)


def test_a_picture_that_cannot_be_drawn_stops_nothing(tiny_config, tmp_path):
  (tmp_path / 'curves.png').mkdir()
  assert 'curves.png could not be drawn' in output(tiny_config, tmp_path)
  assert lines(tmp_path)[-1]['step'] == 12


# ---- a loss that is not finite ---------------------------------------------------------------


def test_too_few_classes_are_refused_before_anything_is_written(tiny_config, train, tmp_path):
  tiny_config.model.num_classes = 2
  with pytest.raises(
    UserError, match=r'the network has 2 classes .model.num_classes. but tiny has 3'
  ):
    train(tiny_config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, train, tmp_path):
  tiny_config.optimizer.learning_rate = 1e30
  with pytest.raises(RunError, match=r'not finite at step [23]; .*Lower the learning rate'):
    train(tiny_config, tmp_path)
  assert lines(tmp_path) == []
  assert not [path for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()]


def test_a_learning_rate_too_high_leaves_the_checkpoint_before(
  tiny_config, finished, train, tmp_path
):
  folder, _ = finished
  tiny_config.epochs = 4
  tiny_config.optimizer.learning_rate = 1e30
  with pytest.raises(RunError, match=r'not finite at step 1[345]; the newest checkpoint is from'):
    train(tiny_config, folder)
  assert lines(folder)[-1]['step'] == 12
  tiny_config.optimizer.learning_rate = 0.3
  assert train(tiny_config, folder)['count'] == 20


def test_as_many_steps_as_allowed_are_passed_over(tiny_config, tmp_path):
  tiny_config.optimizer.learning_rate = 1e30
  tiny_config.skip_nonfinite = 3
  tiny_config.eval_every_epochs = 3
  console = Console(file=io.StringIO(), width=200)
  with pytest.raises(RunError, match=r'at step [56], nor in the 3 steps before it'):
    loop.train(tiny_config, str(tmp_path), console)
  assert console.file.getvalue().count('and was passed over') == 3


# ---- what a person sees ----------------------------------------------------------------------


def output(config, folder, **options) -> str:
  console = Console(file=io.StringIO(), **options)
  loop.train(config, str(folder), console)
  return console.file.getvalue()


def test_the_output_tells_where_the_run_stands(tiny_config, tmp_path):
  folder = tmp_path / 'a name that would not fit a line of the screen'
  first = output(tiny_config, folder, width=40).splitlines()
  assert first[0].startswith(f'{folder}: starting, 12 steps of 16 images on 8 x ')
  assert len(first) == 4  # then one for each evaluation
  for line, entry in zip(first[1:], lines(folder, 'test'), strict=True):
    assert f'step {entry["step"]:6}' in line
    assert f'test loss {entry["loss"]:.4f}' in line
    assert f'top-1 {100 * entry["top1"]:6.2f} %' in line
  again = output(tiny_config, folder, width=40).splitlines()
  assert 'going on from step 12' in again[0]
  assert again[1] == 'The run is complete: all 12 steps were taken.'


def test_a_terminal_has_a_progress_bar(tiny_config, tmp_path):
  shown = output(tiny_config, tmp_path, width=120, force_terminal=True)
  assert '12/12' in shown
  assert 'epoch 3.0' in shown
  assert 'images/s' in shown
