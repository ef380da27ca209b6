"""Plain XLA over chunks of tokens: at most [chunk, V] logits exist at any time.

Chunks after the last target are skipped, so ignored tokens (-1) cost nothing once `compact` has moved them to the end.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
    """tokens: tokens per chunk."""

    tokens: int

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")


def default_blocks(n: int, d: int, v: int) -> Blocks:
    """Return the chunk that was fastest on 2 CPU cores among those within a tenth of the dense loss's memory.

    See kernels/BENCHMARKS.md: 256 and 512 tokens are equally fast at V = 8192; at V = 50257, 128 is.
    """
    del d
    return Blocks(tokens=min(n, max(128, min(512, (1 << 21) // v))))


def forward(e_ND, c_VD, bias_V, targets_N, *, softcap=None, blocks=None):
    """Return (lse_N, logit of the target_N) in at least float32; 0 in chunks that are skipped.

    An ignored token in another chunk keeps its log-sum-exp: `backward` needs it to stay finite there.
    """

    def one(i, results_XC, chunks):
        _, *results_C = chunk_forward(chunks[0][i], c_VD, bias_V, chunks[1][i], softcap)
        return tuple(x_XC.at[i].set(x_C) for x_XC, x_C in zip(results_XC, results_C, strict=True))

    n = e_ND.shape[0]
    chunks = chunk_tokens(blocks or default_blocks(n, *c_VD.shape[::-1]), e_ND, targets_N)
    zeros_XC = jnp.zeros(chunks[1].shape, jnp.promote_types(e_ND.dtype, jnp.float32))
    results_XC = for_each_chunk(one, (zeros_XC, zeros_XC), chunks)
    return tuple(x_XC.reshape(-1)[:n] for x_XC in results_XC)


def backward(
    e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N, *, softcap=None, filter_eps=0.0, accumulate=None, blocks=None
):
    """Return (de_ND, dc_VD, dbias_V or None) for d(logit) = soft * softmax - hot * onehot; recomputes the logits.

    Every chunk spans the vocabulary, so `filter_eps` has nothing to skip; sums are in at least float32.
    """
    del filter_eps, accumulate

    def one(i, carry, chunks):
        sums, de_XCD = carry
        e_CD, targets_C, lse_C, soft_C, hot_C = (x_XC[i] for x_XC in chunks)
        logits_CV, _, _ = chunk_forward(e_CD, c_VD, bias_V, targets_C, softcap)
        d_CV = chunk_differentials(logits_CV, lse_C, targets_C, soft_C, hot_C, softcap)
        sums, de_CD = add_products(sums, d_CV, e_CD, c_VD)
        return sums, de_XCD.at[i].set(de_CD)

    n = e_ND.shape[0]
    blocks = blocks or default_blocks(n, *c_VD.shape[::-1])
    chunks = chunk_tokens(blocks, e_ND, targets_N, lse_N, soft_N, hot_N)
    sums, de_XCD = for_each_chunk(one, (zero_sums(e_ND, c_VD, bias_V), jnp.zeros_like(chunks[0])), chunks)
    return de_XCD.reshape(-1, e_ND.shape[1])[:n], *finish(sums, c_VD, bias_V)


def for_each_chunk(body, carry, chunks):
    """Fold body(i, carry, chunks) over the chunks up to the last one with a target; chunks[1] holds the targets."""
    used_X = jnp.any(chunks[1] >= 0, axis=1)
    count = jnp.max(jnp.where(used_X, jnp.arange(1, used_X.size + 1), 0))
    return jax.lax.fori_loop(0, count, lambda i, carry: body(i, carry, chunks), carry)


def chunk_tokens(blocks, e_ND, targets_N, *arrays_N):
    """Cut tokens into [X, C] chunks; the tail is padded with ignored targets."""
    n = e_ND.shape[0]
    chunk = min(blocks.tokens, n)
    pad = -n % chunk
    if pad:
        e_ND = jnp.pad(e_ND, ((0, pad), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, pad), constant_values=-1)
        arrays_N = tuple(jnp.pad(x_N, (0, pad)) for x_N in arrays_N)
    return e_ND.reshape(-1, chunk, e_ND.shape[1]), *(x_N.reshape(-1, chunk) for x_N in (targets_N, *arrays_N))


def chunk_forward(e_CD, c_VD, bias_V, targets_C, softcap):
    """Return (capped logits_CV, lse_C, picked_C) of one chunk; picked is 0 for a target past the vocabulary."""
    wide = jnp.promote_types(e_CD.dtype, jnp.float32)
    logits_CV = jax.lax.dot_general(e_CD, c_VD, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    if bias_V is not None:
        logits_CV = logits_CV + bias_V[None].astype(wide)
    if softcap is not None:
        logits_CV = softcap * jnp.tanh(logits_CV / softcap)
    max_C = jnp.max(logits_CV, axis=-1)
    lse_C = max_C + jnp.log(jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=-1))
    safe_C = jnp.maximum(targets_C, 0)
    picked_C = jnp.take_along_axis(logits_CV, safe_C[:, None], axis=-1, mode="fill", fill_value=0)[:, 0]
    return logits_CV, lse_C, picked_C


def chunk_differentials(logits_CV, lse_C, targets_C, soft_C, hot_C, softcap):
    """Return the gradient of the uncapped logits: (soft * softmax - hot * onehot) times the cap's derivative."""
    d_CV = jnp.exp(logits_CV - lse_C[:, None]) * soft_C[:, None]
    hit_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == targets_C[:, None]
    d_CV = d_CV - jnp.where(hit_CV, hot_C[:, None], 0.0)
    return d_CV if softcap is None else d_CV * (1.0 - jnp.square(logits_CV / softcap))


def zero_sums(e_ND, c_VD, bias_V):
    """Return zeros for (dc_DV, dbias_V or None) in at least float32."""
    wide = jnp.promote_types(e_ND.dtype, jnp.float32)
    return jnp.zeros(c_VD.shape[::-1], wide), None if bias_V is None else jnp.zeros(bias_V.shape, wide)


def add_products(sums, d_CV, e_CD, c_VD):
    """Add one chunk's share to (dc_DV, dbias_V or None); return (sums, de_CD)."""
    dc_DV, dbias_V = sums
    wide = dc_DV.dtype
    if dbias_V is not None:
        dbias_V = dbias_V + jnp.sum(d_CV, axis=0)
    d_CV = d_CV.astype(e_CD.dtype)
    de_CD = jax.lax.dot_general(d_CV, c_VD, (((1,), (0,)), ((), ())), preferred_element_type=wide)
    # Contracting the first axis of the large operand ran at 50 GFLOP/s on a CPU core, this at 75: the small operand is
    # transposed for real, which the barrier keeps XLA from folding into the product.
    e_DC = jax.lax.optimization_barrier(e_CD.T)
    dc_DV = dc_DV + jax.lax.dot_general(e_DC, d_CV, (((1,), (0,)), ((), ())), preferred_element_type=wide)
    return (dc_DV, dbias_V), de_CD.astype(e_CD.dtype)


def finish(sums, c_VD, bias_V):
    """Return (dc_VD, dbias_V or None) in the dtypes of c and bias."""
    dc_DV, dbias_V = sums
    return dc_DV.T.astype(c_VD.dtype), None if bias_V is None else dbias_V.astype(bias_V.dtype)
