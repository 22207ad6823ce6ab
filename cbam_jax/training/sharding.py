"""Where arrays live: one mesh of all devices, the batch split over it, the state on each."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cbam_jax.data import Batch

DATA_AXIS = 'data'


def make_mesh() -> Mesh:
  """All devices of all processes, in a row named 'data'."""
  return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def split_over_data(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_devices(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """The global batch of which each process gives its own share, on the devices."""
  sharding = split_over_data(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()
  }
