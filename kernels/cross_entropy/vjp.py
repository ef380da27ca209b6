"""Losses per token with gradients, from the two functions that every implementation gives: `forward` and `backward`."""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels import backends


@dataclasses.dataclass(frozen=True)
class Options:
    """The implementation and how it computes; see `api.linear_cross_entropy`. Each chooses its own block sizes."""

    implementation: str
    module: ModuleType
    softcap: float | None = None
    filter_eps: float = 0.0
    accumulate: str = "float32"


def token_losses(e_ND, c_VD, bias_V, targets_N, options):
    """Return (nll_N, lse_N) in at least float32, both 0 where the target is -1, both with gradients.

    NaN for a target past the vocabulary.
    """
    return _losses(*_statistics(e_ND, c_VD, bias_V, targets_N, options), targets_N, c_VD.shape[0])


def parallel_token_losses(e_ND, c_VD, bias_V, targets_N, options, axis):
    """Return what `token_losses` does where each device of a `shard_map` has equally many rows of the vocabulary.

    What crosses the axis is ordinary JAX, so that its derivative is too: the gradient of a shard's log-sum-exp is its
    share of the whole softmax.
    """
    rows = c_VD.shape[0]
    local_N = _local_targets(targets_N, rows, jax.lax.axis_index(axis))
    lse_N, picked_N = _combine(*_statistics(e_ND, c_VD, bias_V, local_N, options), axis)
    return _losses(lse_N, picked_N, targets_N, rows * jax.lax.axis_size(axis))


def _local_targets(targets_N, rows, index):
    """Return targets counted from shard `index`'s first row; those of other shards become `rows`, which hits none."""
    local_N = targets_N - index * rows
    ours_N = (local_N >= 0) & (local_N < rows)
    return jnp.where(ours_N, local_N, jnp.where(targets_N >= 0, rows, -1))


def _combine(lse_N, picked_N, axis):
    """Join the shards' log-sum-exps and take the target's logit from the one that has it, the others giving 0."""
    max_N = jax.lax.pmax(jax.lax.stop_gradient(lse_N), axis)
    lse_N = max_N + jnp.log(jax.lax.psum(jnp.exp(lse_N - max_N), axis))
    return lse_N, jax.lax.psum(picked_N, axis)


def _losses(lse_N, picked_N, targets_N, vocabulary):
    valid_N = targets_N >= 0
    nll_N = jnp.where(targets_N < vocabulary, lse_N - picked_N, jnp.nan)
    return jnp.where(valid_N, nll_N, 0.0), jnp.where(valid_N, lse_N, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _statistics(e_ND, c_VD, bias_V, targets_N, options):
    """Return (lse_N, logit of the target_N)."""
    arrays = (e_ND, c_VD, bias_V, targets_N)
    return backends.perform(options.module.forward, options.implementation, arrays, {"softcap": options.softcap})


def _forward(e_ND, c_VD, bias_V, targets_N, options):
    lse_N, picked_N = _statistics(e_ND, c_VD, bias_V, targets_N, options)
    return (lse_N, picked_N), (e_ND, c_VD, bias_V, targets_N, lse_N)


def _backward(options, residuals, upstream):
    soft_N, minus_hot_N = upstream
    how = {name: getattr(options, name) for name in ("softcap", "filter_eps", "accumulate")}
    arrays = (*residuals, soft_N, -minus_hot_N)
    gradients = backends.perform(options.module.backward, options.implementation, arrays, how)
    return *gradients, None


_statistics.defvjp(_forward, _backward)
