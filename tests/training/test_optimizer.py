"""The optimizer against PyTorch's recursion, the schedules against the paper's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cbam_jax.errors import UserError
from cbam_jax.training.optimizer import learning_rate_schedule, sgd

# ---- SGD -------------------------------------------------------------------------------------


def pytorch_sgd(params, gradients, rates, momentum, weight_decay, nesterov):
  """What the documentation of torch.optim.SGD computes, with no dampening."""
  buffer = None
  for gradient, rate in zip(gradients, rates, strict=True):
    gradient = gradient + weight_decay * params
    if momentum:
      buffer = gradient if buffer is None else momentum * buffer + gradient
      gradient = gradient + momentum * buffer if nesterov else buffer
    params = params - rate * gradient
  return params


@pytest.mark.parametrize(
  ('momentum', 'weight_decay', 'nesterov'),
  [(0.9, 1e-2, False), (0.9, 1e-2, True), (0.0, 1e-2, False), (0.9, 0.0, False)],
)
def test_sgd_is_pytorchs(x64, momentum, weight_decay, nesterov):
  rng = np.random.default_rng(0)
  params, gradients = rng.normal(size=4), rng.normal(size=(6, 4))
  rates = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
  optimizer = sgd(
    lambda step: jnp.where(step < 3, 0.1, 0.01),
    momentum=momentum,
    weight_decay=weight_decay,
    nesterov=nesterov,
  )
  # Scales and biases decay as kernels do.
  tree = {'kernel': jnp.asarray(params), 'scale': jnp.asarray(params[:1])}
  state = optimizer.init(tree)
  for gradient in gradients:
    updates, state = optimizer.update(
      {'kernel': jnp.asarray(gradient), 'scale': jnp.asarray(gradient[:1])}, state, tree
    )
    tree = optax.apply_updates(tree, updates)
  expected = pytorch_sgd(params, gradients, rates, momentum, weight_decay, nesterov)
  np.testing.assert_allclose(tree['kernel'], expected, rtol=1e-12)
  np.testing.assert_allclose(tree['scale'], expected[:1], rtol=1e-12)


def test_two_steps_by_hand():
  optimizer = sgd(0.5, momentum=0.5, weight_decay=0.25)
  params = jnp.array([4.0])
  state = optimizer.init(params)
  for gradient, expected in ((1.0, 3.0), (2.0, 1.125)):
    # Buffer 1 + 0.25 * 4 = 2, then 0.5 * 2 + 2 + 0.25 * 3 = 3.75; half of it is taken off.
    updates, state = optimizer.update(jnp.array([gradient]), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, [expected])


# ---- schedules -------------------------------------------------------------------------------


def rates(kind: str, steps, **options) -> list[float]:
  schedule = learning_rate_schedule(kind, **({'peak': 0.1, 'steps_per_epoch': 10} | options))
  return [float(schedule(jnp.asarray(step))) for step in steps]


def test_step_drops_to_a_tenth_every_thirty_epochs():
  steps = [0, 1, 299, 300, 599, 600, 899]
  np.testing.assert_allclose(
    rates('step', steps, epochs=90), [0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6
  )


def test_step_takes_fractions_of_an_epoch():
  np.testing.assert_allclose(
    rates('step', [24, 25, 49, 50], epochs=6, step_epochs=2.5), [0.1, 0.01, 0.01, 0.001], rtol=1e-6
  )
  np.testing.assert_allclose(rates('step', [0, 9], epochs=1, step_epochs=30), [0.1, 0.1])


def test_step_warms_up_without_moving_its_drops():
  steps = [0, 25, 49, 50, 299, 300]
  np.testing.assert_allclose(
    rates('step', steps, epochs=90, warmup_epochs=5),
    [0, 0.05, 0.098, 0.1, 0.1, 0.01],
    rtol=1e-5,
  )


def test_cosine_falls_from_the_peak_to_zero():
  assert rates('cosine', [0, 50, 100], epochs=10) == pytest.approx([0.1, 0.05, 0.0], abs=1e-8)
  eighth = 0.05 * (1 + np.cos(np.pi / 4))
  assert rates('cosine', [25, 75], epochs=10) == pytest.approx([eighth, 0.1 - eighth], rel=1e-5)


def test_cosine_warms_up_from_zero():
  steps = [0, 10, 20, 60, 100]
  assert rates('cosine', steps, epochs=10, warmup_epochs=2) == pytest.approx(
    [0, 0.05, 0.1, 0.05, 0], abs=1e-8
  )


@pytest.mark.parametrize('kind', ['step', 'cosine'])
def test_a_run_shorter_than_its_warm_up_only_rises(kind):
  values = rates(kind, range(10), epochs=1, warmup_epochs=5)
  np.testing.assert_allclose(values, np.arange(10) * 0.1 / 50, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('kind', ['step', 'cosine'])
def test_schedules_work_under_jit(kind):
  schedule = learning_rate_schedule(kind, 0.1, steps_per_epoch=10, epochs=90, warmup_epochs=1)
  for step in (0, 5, 450):
    np.testing.assert_allclose(jax.jit(schedule)(step), schedule(step), rtol=1e-6)


def test_an_unknown_schedule_is_refused():
  with pytest.raises(UserError, match=r"the schedule is 'cosin'; .*Did you mean 'cosine'"):
    learning_rate_schedule('cosin', 0.1, steps_per_epoch=1, epochs=1)
