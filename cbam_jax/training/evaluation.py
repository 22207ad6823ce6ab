"""Evaluation of a run's best checkpoint, and of anyone's network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from cbam_jax.errors import UserError
from cbam_jax.interop.pretrained import Pretrained
from cbam_jax.models.description import describe
from cbam_jax.training.config import OWN_KEYS, default_config
from cbam_jax.training.experiment import Experiment
from cbam_jax.training.state import TrainState
from cbam_jax.training.stored import CheckpointError, best_step, restore
from cbam_jax.training.workdir import Workdir

CONFIDENCE = 0.95


class Run(NamedTuple):
  """The best of a run.

  Attributes:
    network: The network.
    experiment: What it was trained in, made for evaluation.
    step: The step of its checkpoint.
  """

  network: Pretrained
  experiment: Experiment
  step: int


def load_run(workdir: str) -> Run:
  """Reads the best checkpoint of `workdir`; a run may be writing there, and is left alone.

  Raises:
    UserError: If the folder holds no run, or the run has no checkpoint yet.
    CheckpointError: If the checkpoint is damaged, or of another network.
  """
  folder = Workdir(workdir)
  experiment = Experiment(_for_evaluation(folder.config()))
  step, state = _restore_best(folder, experiment)
  classes = folder.class_names()
  if classes is not None:  # a network may have more classes than its data
    unnamed = range(len(classes), experiment.model.num_classes)
    classes = (*classes, *(f'class {i}' for i in unnamed))
  network = Pretrained(experiment.model, state.variables, experiment.preprocessing, classes)
  return Run(network, experiment, step)


def _restore_best(folder: Workdir, experiment: Experiment) -> tuple[int, TrainState]:
  step = best_step(folder.checkpoints)
  while True:
    try:
      return step, restore(folder.checkpoints / str(step), experiment.abstract_state)
    except CheckpointError:
      # The run may have found a better one meanwhile, and dropped this.
      if (now := best_step(folder.checkpoints)) == step:
        raise
      step = now


def evaluate(workdir: str) -> dict[str, Any]:
  """Evaluates the best checkpoint of `workdir` on every test example of its data.

  Returns:
    'step' of the checkpoint, and what `evaluate_network` returns.

  Raises:
    UserError: If the folder holds no run, or the run has no checkpoint yet.
    CheckpointError: If the checkpoint is damaged, or of another network.
  """
  run = load_run(workdir)
  _check_classes(run.network.classes, run.experiment)
  return {'step': run.step, **_evaluate(run.experiment, run.network.variables)}


def evaluate_network(
  network: Pretrained,
  data: str,
  data_dir: str | None = None,
  *,
  batch_size: int = 256,
  workers: int = 0,
) -> dict[str, Any]:
  """Evaluates a network on every test example of a data set, a single central crop of each.

  Args:
    network: The network, and what it takes of a picture.
    data: The data set, as a configuration's `data.name`; or a set of tensorflow-datasets alone,
      such as 'imagenet2012', whose validation images are the ones with labels.
    data_dir: Where it is, as `data.dir`.
    batch_size: Examples at a time, over all devices; rounded up to a multiple of these.
    workers: Processes that decode; 0 for threads of this one.

  Returns:
    What was evaluated: 'model', 'attention', 'data', 'preprocessing' (a dictionary), and how many
    'classes' the network and 'data_classes' the data has, which are compared by place. What came
    out: 'loss', 'top1' and 'top5' (fractions of 1), 'count' of examples, 'unread' ones that no
    decoder could read and that do not count, and 'top1_interval' and 'top5_interval', the 95 %
    confidence intervals (Wilson's) of the fractions over all that the examples stand for.

  Raises:
    UserError: If the data set is not there or does not fit the network, or its classes have the
      network's names in other places.
    RunError: If too many of its images cannot be read.
  """
  config = default_config()
  description = describe(network.model)
  fields = description['fields'] | {'remat': False}
  fields.pop('param_dtype', None)  # the variables are there already, in the type that they have
  with config.unlocked():
    config.model.name = description['model']
    config.model.attention = description['attention']
    config.model.attention_fields = description['attention_fields']
    for field in OWN_KEYS.keys() & fields.keys():
      *parents, key = OWN_KEYS[field].split('.')
      (config[parents[0]] if parents else config)[key] = fields.pop(field)
    config.model.fields = fields
    config.data.update(network.preprocessing.to_dict())
  config.data.name = full_name(data)
  config.data.dir = data_dir
  config.data.workers = workers
  config.eval_batch_size = batch_size
  experiment = Experiment(_for_evaluation(config))
  _check_classes(network.classes, experiment)
  return _evaluate(experiment, network.variables)


def _check_classes(network: Sequence[str] | None, experiment: Experiment) -> None:
  """Refuses names that tell that a label is another class to the network.

  Names with nothing in common, such as words and synsets, tell nothing.
  """
  data_set = getattr(experiment.test_source, 'classes', None)
  if network is None or data_set is None:
    return
  # A run keeps its names with single spaces.
  ours, theirs = ([' '.join(name.split()) for name in names] for names in (network, data_set))
  if set(ours).isdisjoint(theirs):
    return
  for label, (one, other) in enumerate(zip(ours, theirs, strict=False)):
    if one != other:
      raise UserError(
        f'class {label} is {one!r} to the network and {other!r} in the data; evaluate it on a data '
        'set with its classes in its order, or give the network the right --class-names.'
      )


def full_name(data: str) -> str:
  """`data` as a configuration names it: a bare name is a set of tensorflow-datasets."""
  known = data in ('digits', 'folder', 'synthetic') or ':' in data
  return data if known else f'tfds:{data}'


def _evaluate(experiment: Experiment, variables: Any) -> dict[str, Any]:
  from scipy.stats import binomtest

  variables = {'batch_stats': {}} | dict(variables)  # a network without batch norms has none
  config = experiment.config
  metrics: dict[str, Any] = {
    'model': config.model.name,
    'attention': config.model.attention,
    'data': config.data.name,
    'preprocessing': experiment.preprocessing.to_dict(),
    'classes': experiment.model.num_classes,
    'data_classes': experiment.test_source.num_classes,
    **(experiment.evaluate(variables) or {}),
  }
  count = metrics['count']
  metrics['unread'] = len(experiment.test_source) - count
  for name in ('top1', 'top5'):
    right = round(metrics[name] * count)
    interval = binomtest(right, count).proportion_ci(CONFIDENCE, method='wilson')
    metrics[f'{name}_interval'] = (float(interval.low), float(interval.high))
  return metrics


def _for_evaluation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """`config` without what only training asks of the devices, which may be others here."""
  devices = jax.device_count()
  batch_size = -(config.eval_batch_size // -devices) * devices
  config.update(batch_size=batch_size, eval_batch_size=batch_size, accumulate=1)
  config.mesh.fsdp = 1
  config.model.group_size = None
  return config
