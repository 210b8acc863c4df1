"""Devices: the mesh, how a batch is spread over it, and global arrays from each process's rows.

What papers of 2022 call pjit is `jax.jit` with shardings. Axes are "auto": the compiler places the collectives.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vlkd_jax.errors import UserError


def make_mesh(data: int = -1) -> jax.sharding.Mesh:
    """A mesh with the axis `data` over that many devices (-1: all).

    Raises:
      UserError: more devices asked for than there are.
    """
    count = jax.device_count()
    size = count if data == -1 else data
    if not 1 <= size <= count:
        raise UserError(f"config.mesh.data is {data}, and there are {count} devices; use 1 to {count}, or -1 for all")
    return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_rows(mesh: jax.sharding.Mesh, tree):
    """A batch that every process holds whole (numpy): split over `data` where its rows divide evenly, else repeated."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    return jax.device_put(tree, replicated(mesh) if rows % mesh.size else over_data(mesh))


def put(mesh: jax.sharding.Mesh, tree):
    """A batch of this process's rows (numpy) as global arrays, split over `data`."""
    sharding = over_data(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
