"""Where arrays live: one mesh, one table from logical axes to mesh axes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinyjax.errors import UserError

# Data parallelism: rows of a batch are split, parameters are whole on every device.
RULES: dict[str, str | None] = {
    "batch": "data",
    "layers": None,
    "vocab": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head": None,
    "mlp": None,
    "norm": None,
}


def data_mesh(devices=None) -> Mesh:
    """Return a mesh with the one axis `data` over `devices` (default: all)."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), ("data",))


def devices_for(rows: int, devices: list) -> list:
    """Return the first of `devices`, as many as divide `rows`: so that any batch runs on any machine."""
    return devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]


def of_axes(mesh: Mesh, axes: Any, rules: dict[str, str | None] = RULES) -> Any:
    """Return a tree of NamedShardings for a tree of logical PartitionSpecs. KeyError for an axis without a rule."""

    def one(names):
        return NamedSharding(mesh, PartitionSpec(*(None if n is None else rules[n] for n in names)))

    return jax.tree.map(one, axes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Return the sharding of [rows, ...]: split over `data`. UserError when the rows do not divide."""
    n = mesh.shape["data"]
    if rows % n:
        raise UserError(f"data.batch: {rows} rows per microbatch do not divide over {n} devices; use a multiple of {n}")
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))
