"""Plain XLA whose forward pass forms the gradients: for a loss that is one scalar, 3 products of N V D in place of 4.

d(loss)/d(logits) is known up to a scalar factor as soon as a chunk's log-sum-exp is, so its logits are used while they
are there and never computed again (as in torchtune's and Liger's losses).
"""

import functools

import jax
import jax.numpy as jnp

from kernels.cross_entropy import chunked


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def loss_sums(e_ND, c_VD, bias_V, targets_N, softcap=None, z_weight=0.0, blocks=None):
    """Return (loss, nll, lse_squared), sums in at least float32 over the tokens whose target is not -1; NaN
    if one is past the vocabulary.

    loss = nll + z_weight * lse_squared is the only result that carries gradients.
    """

    def one(i, sums, chunks):
        _, lse_C, picked_C = chunked.chunk_forward(chunks[0][i], c_VD, bias_V, chunks[1][i], softcap)
        return _add(sums, lse_C, picked_C, chunks[1][i], c_VD.shape[0])

    return _loss(chunked.for_each_chunk(one, _zeros(e_ND), _chunks(blocks, e_ND, c_VD, targets_N)), z_weight)


def _zeros(e_ND):
    zero = jnp.zeros((), jnp.promote_types(e_ND.dtype, jnp.float32))
    return zero, zero


def _chunks(blocks, e_ND, c_VD, targets_N):
    blocks = blocks or chunked.default_blocks(e_ND.shape[0], *c_VD.shape[::-1])
    return chunked.chunk_tokens(blocks, e_ND, targets_N)


def _add(sums, lse_C, picked_C, targets_C, v):
    nll, squares = sums
    valid_C = targets_C >= 0
    nll_C = jnp.where(targets_C < v, lse_C - picked_C, jnp.nan)
    return (
        nll + jnp.sum(jnp.where(valid_C, nll_C, 0.0)),
        squares + jnp.sum(jnp.where(valid_C, jnp.square(lse_C), 0.0)),
    )


def _loss(sums, z_weight):
    nll, squares = sums
    return nll + z_weight * squares, nll, squares


def _forward(e_ND, c_VD, bias_V, targets_N, softcap, z_weight, blocks):
    def one(i, carry, chunks):
        sums, gradients, de_XCD = carry
        e_CD, targets_C = (x_XC[i] for x_XC in chunks)
        logits_CV, lse_C, picked_C = chunked.chunk_forward(e_CD, c_VD, bias_V, targets_C, softcap)
        # d(nll + z lse^2)/d(logits) = softmax (1 + 2 z lse) - onehot(target)
        hot_C = (targets_C >= 0).astype(lse_C.dtype)
        soft_C = hot_C * (1.0 + 2.0 * z_weight * lse_C)
        d_CV = chunked.chunk_differentials(logits_CV, lse_C, targets_C, soft_C, hot_C, softcap)
        gradients, de_CD = chunked.add_products(gradients, d_CV, e_CD, c_VD)
        return _add(sums, lse_C, picked_C, targets_C, c_VD.shape[0]), gradients, de_XCD.at[i].set(de_CD)

    chunks = _chunks(blocks, e_ND, c_VD, targets_N)
    start = _zeros(e_ND), chunked.zero_sums(e_ND, c_VD, bias_V), jnp.zeros_like(chunks[0])
    sums, gradients, de_XCD = chunked.for_each_chunk(one, start, chunks)
    de_ND = de_XCD.reshape(-1, e_ND.shape[1])[: e_ND.shape[0]]
    return _loss(sums, z_weight), (de_ND, *chunked.finish(gradients, c_VD, bias_V))


def _backward(softcap, z_weight, blocks, residuals, upstream):
    del softcap, z_weight, blocks
    scale = upstream[0]
    de_ND, dc_VD, dbias_V = (None if x is None else (x * scale).astype(x.dtype) for x in residuals)
    return de_ND, dc_VD, dbias_V, None


loss_sums.defvjp(_forward, _backward)
