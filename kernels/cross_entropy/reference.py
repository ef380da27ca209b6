"""The shortest correct form: all logits at once. Every other implementation is tested against its float64 values."""

import jax
import jax.numpy as jnp


def token_losses(e_ND, c_VD, targets_N, *, ignore_index=-100, softcap=None):
    """Return (nll_N, lse_N) in at least float32: lse - logit of the target (0 if ignored), and the log-sum-exp."""
    logits_NV = jnp.einsum("nd,vd->nv", e_ND, c_VD, preferred_element_type=jnp.promote_types(e_ND.dtype, jnp.float32))
    if softcap is not None:
        logits_NV = softcap * jnp.tanh(logits_NV / softcap)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    valid_N = targets_N != ignore_index
    picked_N = jnp.take_along_axis(logits_NV, jnp.where(valid_N, targets_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(valid_N, lse_N - picked_N, 0.0), lse_N


def loss_sums(e_ND, c_VD, targets_N, *, ignore_index=-100, softcap=None):
    """Return (sum of nll, sum of lse squared) over the tokens that are not ignored."""
    nll_N, lse_N = token_losses(e_ND, c_VD, targets_N, ignore_index=ignore_index, softcap=softcap)
    return jnp.sum(nll_N), jnp.sum(jnp.where(targets_N != ignore_index, jnp.square(lse_N), 0.0))
