"""Plain XLA over chunks of tokens: at most [chunk, V] logits exist at any time.

`loss_sums` forms the gradients during the forward pass: its two results are scalars, so d(loss)/d(logits) is known up
to a scalar factor, and the logits need not be computed again for the backward pass (3 products of N V D, not 4).
"""

import functools

import jax
import jax.numpy as jnp


def _chunks(e_ND, targets_N, chunk, ignore_index):
    """Cut tokens into [chunks, chunk]; the tail is padded with ignored targets."""
    n = e_ND.shape[0]
    chunk = min(chunk, n)
    pad = -n % chunk
    if pad:
        e_ND = jnp.pad(e_ND, ((0, pad), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, pad), constant_values=ignore_index)
    return e_ND.reshape(-1, chunk, e_ND.shape[1]), targets_N.reshape(-1, chunk)


def _forward(e_CD, c_VD, targets_C, ignore_index, softcap):
    """One chunk: (logits after the cap, lse, logit of the target, valid)."""
    logits_CV = jax.lax.dot_general(
        e_CD, c_VD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.promote_types(e_CD.dtype, jnp.float32)
    )
    if softcap is not None:
        logits_CV = softcap * jnp.tanh(logits_CV / softcap)
    max_C = jnp.max(logits_CV, axis=-1)
    lse_C = max_C + jnp.log(jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=-1))
    valid_C = targets_C != ignore_index
    picked_C = jnp.take_along_axis(logits_CV, jnp.where(valid_C, targets_C, 0)[:, None], axis=-1)[:, 0]
    return logits_CV, lse_C, picked_C, valid_C


def token_losses(e_ND, c_VD, targets_N, *, ignore_index=-100, softcap=None, chunk=512):
    """Return (nll_N, lse_N) as the reference does; the backward pass recomputes each chunk's logits."""

    @jax.checkpoint
    def one(e_CD, targets_C):
        _, lse_C, picked_C, valid_C = _forward(e_CD, c_VD, targets_C, ignore_index, softcap)
        return jnp.where(valid_C, lse_C - picked_C, 0.0), lse_C

    e_XCD, targets_XC = _chunks(e_ND, targets_N, chunk, ignore_index)
    nll_XC, lse_XC = jax.lax.map(lambda pair: one(*pair), (e_XCD, targets_XC))
    n = e_ND.shape[0]
    return nll_XC.reshape(-1)[:n], lse_XC.reshape(-1)[:n]


def loss_sums(e_ND, c_VD, targets_N, *, ignore_index=-100, softcap=None, chunk=512, z_weight=0.0):
    """Return (sum of nll, sum of lse squared) over the tokens that are not ignored.

    The gradient is that of nll + z_weight * lse_squared, scaled by the upstream gradient of the *first* result: pass
    the weight of the z-loss here and keep the second result out of what is differentiated.
    """
    return _loss_sums(e_ND, c_VD, targets_N, ignore_index, softcap, chunk, z_weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _loss_sums(e_ND, c_VD, targets_N, ignore_index, softcap, chunk, z_weight):
    def one(sums, pair):
        _, lse_C, picked_C, valid_C = _forward(pair[0], c_VD, pair[1], ignore_index, softcap)
        return _add(sums, lse_C, picked_C, valid_C), None

    zero = jnp.zeros((), jnp.promote_types(e_ND.dtype, jnp.float32))
    return jax.lax.scan(one, (zero, zero), _chunks(e_ND, targets_N, chunk, ignore_index))[0]


def _add(sums, lse_C, picked_C, valid_C):
    nll, squares = sums
    return (
        nll + jnp.sum(jnp.where(valid_C, lse_C - picked_C, 0.0)),
        squares + jnp.sum(jnp.where(valid_C, jnp.square(lse_C), 0.0)),
    )


def _loss_sums_fwd(e_ND, c_VD, targets_N, ignore_index, softcap, chunk, z_weight):
    wide = jnp.promote_types(e_ND.dtype, jnp.float32)

    def one(carry, pair):
        sums, dc_DV = carry
        e_CD, targets_C = pair
        logits_CV, lse_C, picked_C, valid_C = _forward(e_CD, c_VD, targets_C, ignore_index, softcap)
        # d(nll + z lse^2)/d(logits) = softmax (1 + 2 z lse) - onehot(target)
        weight_C = jnp.where(valid_C, 1.0 + 2.0 * z_weight * lse_C, 0.0)
        d_CV = jnp.exp(logits_CV - lse_C[:, None]) * weight_C[:, None]
        hit_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == targets_C[:, None]
        d_CV = d_CV - jnp.where(hit_CV & valid_C[:, None], 1.0, 0.0)
        if softcap is not None:
            d_CV = d_CV * (1.0 - jnp.square(logits_CV / softcap))
        d_CV = d_CV.astype(e_CD.dtype)
        de_CD = jax.lax.dot_general(d_CV, c_VD, (((1,), (0,)), ((), ())), preferred_element_type=wide)
        # Contracting the first axis of the large operand ran at 50 GFLOP/s on a CPU core, this at 75: the small operand
        # is transposed for real, which the barrier keeps XLA from folding into the product.
        e_DC = jax.lax.optimization_barrier(e_CD.T)
        dc_DV += jax.lax.dot_general(e_DC, d_CV, (((1,), (0,)), ((), ())), preferred_element_type=wide)
        return (_add(sums, lse_C, picked_C, valid_C), dc_DV), de_CD.astype(e_CD.dtype)

    zero = jnp.zeros((), wide)
    chunks = _chunks(e_ND, targets_N, chunk, ignore_index)
    (sums, dc_DV), de_XCD = jax.lax.scan(one, ((zero, zero), jnp.zeros(c_VD.shape[::-1], wide)), chunks)
    de_ND = de_XCD.reshape(-1, e_ND.shape[1])[: e_ND.shape[0]]
    return sums, (de_ND, dc_DV.T.astype(c_VD.dtype))


def _loss_sums_bwd(ignore_index, softcap, chunk, z_weight, residuals, upstream):
    del ignore_index, softcap, chunk, z_weight
    de_ND, dc_VD = residuals
    scale = upstream[0]
    return (de_ND * scale.astype(de_ND.dtype), dc_VD * scale.astype(dc_VD.dtype), None)


_loss_sums.defvjp(_loss_sums_fwd, _loss_sums_bwd)
