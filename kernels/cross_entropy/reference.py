"""The shortest correct form: all logits at once. Every other implementation is tested against its float64 values."""

import jax
import jax.numpy as jnp


def logits(e_ND, c_VD, bias_V=None, softcap=None):
    """Return capped logits [N, V] in at least float32: cap * tanh((e c^T + bias) / cap)."""
    wide = jnp.promote_types(e_ND.dtype, jnp.float32)
    logits_NV = jnp.einsum("nd,vd->nv", e_ND, c_VD, preferred_element_type=wide)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V[None].astype(wide)
    return logits_NV if softcap is None else softcap * jnp.tanh(logits_NV / softcap)


def token_losses(e_ND, c_VD, bias_V, targets_N, *, softcap=None):
    """Return (nll_N, lse_N) in at least float32, both 0 where the target is -1.

    nll is NaN for a target past the vocabulary.
    """
    logits_NV = logits(e_ND, c_VD, bias_V, softcap)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    valid_N = targets_N >= 0
    safe_N = jnp.where(valid_N, targets_N, 0)
    picked_N = jnp.take_along_axis(logits_NV, safe_N[:, None], axis=-1, mode="fill", fill_value=jnp.nan)[:, 0]
    return jnp.where(valid_N, lse_N - picked_N, 0.0), jnp.where(valid_N, lse_N, 0.0)
