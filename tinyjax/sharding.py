"""Where arrays live: one mesh, one table from logical axes to mesh axes."""

import functools
from collections.abc import Callable
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


def within(mesh: Mesh, function: Callable) -> Callable:
    """Return `function`, to be jitted, with `mesh` in sight of `per_device` while it is traced."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def per_device(function: Callable, in_axes: tuple, out_axes: Any, rules: dict[str, str | None] = RULES) -> Callable:
    """Return `function` run by every device on its own share, where a mesh of several devices is in sight.

    The compiler cannot divide kernels by itself, and gathers a loop over chunks of tokens. in_axes and out_axes give
    logical axis names per argument and result, as PartitionSpecs; `function` itself sums with `add_shares` over what it
    is not given whole. Gradients of arguments that are whole are summed over the devices. Arrays that the devices do
    not divide evenly are left to the compiler, all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def place(names):
        return PartitionSpec(*(None if n is None else rules[n] for n in names))

    def divides(x, names):
        return all(n is None or size % mesh.shape[n] == 0 for size, n in zip(x.shape, names, strict=False))

    in_specs = tuple(place(names) for names in in_axes)
    out_specs = jax.tree.map(place, out_axes, is_leaf=lambda x: isinstance(x, PartitionSpec))

    @functools.wraps(function)
    def shared(*args):
        if not all(x is None or divides(x, names) for x, names in zip(args, in_specs, strict=True)):
            return function(*args)
        # check_vma: Pallas calls do not say over which axes their results vary.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return shared


def add_shares(values: Any, axis: str = "batch", rules: dict[str, str | None] = RULES) -> Any:
    """Return a tree of sums over the devices that share a logical axis; inside `per_device` or outside of it."""
    name = rules[axis]
    if name is None or name not in jax.sharding.get_abstract_mesh().manual_axes:
        return values
    return jax.lax.psum(values, name)
