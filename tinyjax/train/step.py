"""One update as a free function of data: (state, batch) -> (state, metrics)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinyjax import sharding
from tinyjax.models.model import Model
from tinyjax.objectives.objective import Objective
from tinyjax.optim.optimizers import Optimizer
from tinyjax.optim.schedules import Schedule
from tinyjax.train.run_config import Config
from tinyjax.train.state import DROPOUT, State


def gradients(model: Model, objective: Objective, params, batch, key, microbatches: int):
    """Return (grads of sum / count, count, metrics as sums) of a batch taken in equal parts of rows.

    Sums and counts are added over the parts and divided once, so that the result is that of the whole batch however
    tokens are spread over the parts. `key` is None where nothing is random.
    """

    def part(batch, key):
        def total(params):
            (value, count), metrics = objective.loss(model, params, batch, key)
            return value, (count, metrics | {"loss": value})

        grads, (count, metrics) = jax.grad(total, has_aux=True)(params)
        return grads, count, metrics

    if microbatches == 1:
        grads, count, metrics = part(batch, key)
    else:
        parts = jax.tree.map(lambda x: x.reshape((microbatches, -1, *x.shape[1:])), batch)
        keys = None if key is None else jax.random.split(key, microbatches)
        shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums, inputs):
            return jax.tree.map(jnp.add, sums, part(*inputs)), None

        (grads, count, metrics), _ = jax.lax.scan(add, zeros, (parts, keys))
    scale = 1.0 / jnp.maximum(count, 1.0)
    return jax.tree.map(lambda g: g * scale, grads), count, metrics


def learning_rate(optimizer: Optimizer, schedule: Schedule, step, steps: int):
    """Return the rate at `step`, float32."""
    return jnp.asarray(optimizer.learning_rate * schedule.factor(step, steps), jnp.float32)


def make_step(model: Model, transform: optax.GradientTransformation, config: Config):
    """Return step(state, batch) -> (state, metrics), to be jitted with the state donated.

    metrics, float32 scalars: count (tokens), sums over tokens (loss, nll, ...), grad_norm, learning_rate, finite.
    A step whose loss or gradient is not finite changes neither parameters nor optimizer; it is counted in the state.
    """
    dropout = getattr(config.model, "dropout", 0.0) > 0
    base = config.train.seed

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        key = None
        if dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(base), DROPOUT), state.step)
        grads, count, sums = gradients(model, config.objective, state.params, batch, key, config.train.microbatches)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        rate = learning_rate(config.optimizer, config.schedule, state.step, config.train.steps)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new = State(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        metrics = sums | {"count": count, "grad_norm": norm, "learning_rate": rate}
        return new, metrics | {"finite": finite.astype(jnp.float32)}

    return step


def compile_step(step, spec: State, mesh: Mesh, several: bool = False):
    """Return `step` jitted, the state donated and kept in the sharding of `spec`.

    With `several`, batches and metrics have a leading axis of steps, all taken in one call.
    """

    def steps(state, batches):
        return jax.lax.scan(step, state, batches)

    places = jax.tree.map(lambda x: x.sharding, spec)
    # Without out_shardings the compiler may choose others than the first call's inputs have: a second compilation.
    out = (places, sharding.replicated(mesh))
    return jax.jit(sharding.within(mesh, steps if several else step), donate_argnums=0, out_shardings=out)
