"""The state of a run: a frozen pytree of arrays, created in its sharding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinyjax import sharding, tree
from tinyjax.models.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes from step to step."""

    step: jax.Array  # int32, updates done
    skipped: jax.Array  # int32, of these, updates withheld because loss or gradient was not finite
    params: Any  # float32, by path
    opt_state: Any  # optax's


# Streams of randomness derived from a run's seed.
INIT, DROPOUT = 0, 1


def create(model: Model, optimizer: optax.GradientTransformation, key) -> State:
    """Return the state before the first step. Traceable: under `jit` with `out_shardings` no array is made twice."""
    params = model.init(jax.random.fold_in(key, INIT))
    zero = jnp.zeros((), jnp.int32)
    return State(zero, zero, params, optimizer.init(params))


def spec(model: Model, optimizer: optax.GradientTransformation, mesh) -> State:
    """Return the state as ShapeDtypeStructs with shardings: parameters by their axes, optimizer slots like theirs."""
    shapes = jax.eval_shape(lambda: create(model, optimizer, jax.random.key(0)))
    of_params = sharding.of_axes(mesh, model.logical_axes())
    whole = sharding.replicated(mesh)
    by_path = tree.flatten(of_params)
    sizes = tree.flatten(shapes.params)

    def place(path, leaf):
        # A slot such as Adam's mean is a copy of the parameters' tree: its path ends with the parameter's.
        parts = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        for i in range(len(parts)):
            name = "/".join(parts[i:])
            if name in sizes and sizes[name].shape == leaf.shape:
                return by_path[name]
        return whole

    slots = jax.tree_util.tree_map_with_path(place, shapes.opt_state)
    places = State(whole, whole, of_params, slots)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def initial(model: Model, optimizer: optax.GradientTransformation, mesh, seed: int) -> State:
    """Return the state before the first step, each array born where it belongs."""
    places = jax.tree.map(lambda x: x.sharding, spec(model, optimizer, mesh))
    make = jax.jit(lambda key: create(model, optimizer, key), out_shardings=places)
    return make(jax.random.key(seed))
