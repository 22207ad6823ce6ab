"""Where arrays live: a mesh of all devices, the batch split over it, the state copied or split."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cbam_jax.data import Batch
from cbam_jax.errors import UserError

# An array smaller than this is cheaper to keep whole than to gather at every step.
SMALLEST_SPLIT = 2**14


def make_mesh(fsdp: int = 1) -> Mesh:
  """All devices of all processes, as a grid of axes 'data' and 'fsdp'.

  Args:
    fsdp: Devices that share one copy of the parameters and the optimizer's state; 1 keeps a copy
      on each device. The batch is split over all devices whatever it is.

  Raises:
    UserError: If `fsdp` does not divide the number of devices.
  """
  devices = jax.device_count()
  if fsdp < 1 or devices % fsdp:
    raise UserError(f'mesh.fsdp is {fsdp}; it must divide the {devices} devices.')
  return jax.make_mesh((devices // fsdp, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def split_over_devices(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Where each array of `state` lives: its longest axis that 'fsdp' divides is split over it.

  Args:
    mesh: The devices.
    state: A tree of arrays, or of their shapes.
  """
  parts = mesh.shape['fsdp']

  def place(array: Any) -> NamedSharding:
    axes = [axis for axis, size in enumerate(array.shape) if size % parts == 0]
    if parts == 1 or not axes or array.size < SMALLEST_SPLIT:
      return replicated(mesh)
    longest = max(axes, key=lambda axis: array.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, 'fsdp'))

  return jax.tree.map(place, state)


def to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """The global batch of which each process gives its own share, on the devices."""
  sharding = split_over_devices(mesh)
  # The one transfer that a step asks for; the loop forbids all others.
  with jax.transfer_guard_host_to_device('allow'):
    return {
      name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
    }
