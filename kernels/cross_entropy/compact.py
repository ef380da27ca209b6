"""Move tokens with a target to the front, so that whole blocks of ignored ones follow and can be skipped."""

import jax.numpy as jnp


def order(targets_N):
    """Return a permutation of tokens: those with a target (>= 0) first, each kind in its old order."""
    return jnp.argsort(targets_N < 0, stable=True)


def restore(x_N, order_N):
    """Undo x_N[order_N]."""
    return jnp.zeros_like(x_N).at[order_N].set(x_N, unique_indices=True)
