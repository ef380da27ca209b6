"""NVIDIA GPUs: Pallas kernels (through Triton) for everything that is a logit, XLA's matrix products for what follows.

Forward: each program owns one block of tokens and one of `splits` ranges of the vocabulary, walks through its columns
with running (max, sum of exponentials, target's logit) in registers, and writes those; a sum over splits finishes.
Backward: a kernel computes the logits of one chunk of the vocabulary again and writes their gradient in the dtype of e;
two ordinary matrix products take it from there. No atomics: the same inputs give the same bits.
Products of float32 are TF32, as XLA's are on these GPUs; jax.default_matmul_precision("highest") makes them exact.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2_E = math.log2(math.e)
DTYPES = ("bfloat16", "float16", "float32")
# Programs the forward pass wants: 16 for each of the 132 multiprocessors of an H100 or H200, so that the last, partly
# filled round costs little. A design value; no device has confirmed it.
PROGRAMS = 16 * 132
# A program that sees fewer blocks of columns than this spends its time filling the pipeline (design value, as above).
BLOCKS_PER_PROGRAM = 8
# Largest gradient of logits that exists at a time. The sum of the gradients of e (float32) is the other temporary.
CHUNK_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's logits: tokens x columns, `depth` of D at a time (each a power of two of at least 16)."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int  # loads in flight, software-pipelined by Triton


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of both passes; `splits` ranges of the vocabulary forward, `chunk` columns at a time backward."""

    forward: Tile
    backward: Tile
    splits: int
    chunk: int


def supports(e_ND, c_VD) -> str | None:
    """Return None if the kernels can serve these arrays, else one line saying why not."""
    if e_ND.dtype != c_VD.dtype:
        return f"the GPU kernels need one dtype, not {e_ND.dtype} embeddings with {c_VD.dtype} classifier rows"
    if e_ND.dtype.name not in DTYPES:
        return f"the GPU kernels take {', '.join(DTYPES)}, not {e_ND.dtype}"
    if 0 in e_ND.shape or 0 in c_VD.shape:
        return "the GPU kernels need at least one token, one column and one feature"
    return None


def default_blocks(n: int, d: int, v: int, dtype) -> Blocks:
    """Return sizes that compile for sm_90a without spilled registers and within its 227 KiB of shared memory."""
    itemsize = jnp.dtype(dtype).itemsize
    tokens, columns, line = _within(n, 16, 128), _within(v, 16, 128), 128 // itemsize
    backward = Tile(tokens, columns, _within(d, 16, line), warps=8, stages=4)
    forward = backward
    if line < d <= 4 * line:
        # Half as many columns, so that all of D fits beside the tokens' embeddings, which then stay on chip.
        depth = pl.next_power_of_2(d)
        forward = dataclasses.replace(backward, columns=min(columns, 64), depth=depth, stages=3)
    row_blocks, column_blocks = pl.cdiv(n, forward.tokens), pl.cdiv(v, forward.columns)
    splits = max(1, min(pl.cdiv(PROGRAMS, row_blocks), column_blocks // BLOCKS_PER_PROGRAM))
    chunk = max(CHUNK_BYTES // (n * itemsize) // 128 * 128, 128)
    return Blocks(forward, backward, splits, chunk)


def forward(
    e_ND, c_VD, bias_V, targets_N, *, softcap: float | None = None, blocks: Blocks | None = None, interpret=False
):
    """Return (lse_N, picked_N), float32: log-sum-exp of each token's logits, and the logit of its target.

    logits = e_ND @ c_VD.T (+ bias_V), then softcap * tanh(logits / softcap) if given. A target outside [0, V) picks 0.
    """
    (n, d), v = e_ND.shape, c_VD.shape[0]
    blocks = blocks or default_blocks(n, d, v, e_ND.dtype)
    tile, splits = blocks.forward, blocks.splits
    kernel = functools.partial(_forward_kernel, tile=tile, splits=splits, shape=(n, d, v), softcap=softcap)
    per_split_SN = jax.ShapeDtypeStruct((splits, n), jnp.float32)
    max_SN, sum_SN, picked_SN = pl.pallas_call(
        kernel,
        # Neighbouring programs differ in their tokens and read the same columns: these come from memory once.
        grid=(pl.cdiv(n, tile.tokens), splits),
        in_specs=_in_specs(tile, d, v, bias_V, token_vectors=1),
        out_specs=[pl.BlockSpec((None, tile.tokens), lambda i, s: (s, i))] * 3,
        out_shape=[per_split_SN] * 3,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="cross_entropy_forward",
    )(e_ND, c_VD, bias_V, targets_N)
    # A split without columns, or one in which the bias of all is -inf, has max -inf and sum 0.
    max_N = _finite(jnp.max(max_SN, axis=0))
    sum_N = jnp.sum(sum_SN * jnp.exp(max_SN - max_N[None]), axis=0)
    return max_N + jnp.log(sum_N), jnp.sum(picked_SN, axis=0)


def backward(
    e_ND,
    c_VD,
    bias_V,
    targets_N,
    lse_N,
    soft_N,
    hot_N,
    *,
    softcap: float | None = None,
    filter_eps: float = 0.0,
    accumulate: str = "float32",
    blocks: Blocks | None = None,
    interpret=False,
):
    """Return (de_ND, dc_VD, dbias_V or None) in the dtypes of the inputs, for d(logit) = soft softmax - hot onehot.

    A tile in which every |softmax - onehot| < filter_eps gets no gradient, and a chunk without any other tile costs no
    matrix products; tokens with soft = hot = 0 have no say in this. accumulate="float32" sums de over chunks in
    float32, "input" in the dtype of e, which saves 4 N D bytes. dc is complete within one chunk and needs no sum.
    """
    v = c_VD.shape[0]
    blocks = blocks or default_blocks(*e_ND.shape, v, e_ND.dtype)
    accumulator = jnp.float32 if accumulate == "float32" else e_ND.dtype
    inputs = (e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N)
    options = {"softcap": softcap, "filter_eps": filter_eps, "tile": blocks.backward, "interpret": interpret}

    def add_chunk(sums, start, width):
        d_NW, used, dbias_W = _dlogits(*inputs, start, width=width, **options)

        def products(sums):
            de_ND, dc_VD, dbias_V = sums
            c_WD = lax.dynamic_slice_in_dim(c_VD, start, width)
            de_ND += lax.dot_general(d_NW, c_WD, (((1,), (0,)), ((), ())), preferred_element_type=accumulator)
            dc_WD = lax.dot_general(d_NW, e_ND, (((0,), (0,)), ((), ())), preferred_element_type=dc_VD.dtype)
            dc_VD = lax.dynamic_update_slice_in_dim(dc_VD, dc_WD, start, axis=0)
            if dbias_V is not None:
                dbias_V = lax.dynamic_update_slice_in_dim(dbias_V, dbias_W.astype(dbias_V.dtype), start, axis=0)
            return de_ND, dc_VD, dbias_V

        if not filter_eps:
            return products(sums)
        # A loop of no or one round in place of lax.cond, for which XLA under JAX 0.10 copies dc (1125 MiB for Gemma 2).
        return lax.fori_loop(0, used.astype(jnp.int32), lambda _, sums: products(sums), sums)

    sums = (
        jnp.zeros(e_ND.shape, accumulator),
        jnp.zeros_like(c_VD),
        None if bias_V is None else jnp.zeros_like(bias_V),
    )
    chunk = min(blocks.chunk, v)
    chunks, rest = divmod(v, chunk)
    starts = jnp.arange(chunks, dtype=jnp.int32) * chunk
    sums, _ = lax.scan(lambda sums, start: (add_chunk(sums, start, chunk), None), sums, starts)
    if rest:
        sums = add_chunk(sums, jnp.int32(v - rest), rest)
    de_ND, dc_VD, dbias_V = sums
    return de_ND.astype(e_ND.dtype), dc_VD, dbias_V


def _dlogits(
    e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N, start, *, width, softcap, filter_eps, tile, interpret
):
    """Gradient of the logits of columns start .. start + width: (d_NW, whether any is kept, its sums over tokens)."""
    (n, d), v = e_ND.shape, c_VD.shape[0]
    rows, columns = pl.cdiv(n, tile.tokens), pl.cdiv(width, tile.columns)
    out_specs = [
        pl.BlockSpec((tile.tokens, tile.columns), lambda i, j: (i, j)),
        pl.BlockSpec((None, None), lambda i, j: (i, j)),
    ]
    out_shape = [jax.ShapeDtypeStruct((n, width), e_ND.dtype), jax.ShapeDtypeStruct((rows, columns), jnp.int32)]
    if bias_V is not None:
        out_specs.append(pl.BlockSpec((None, tile.columns), lambda i, j: (i, j)))
        out_shape.append(jax.ShapeDtypeStruct((rows, width), jnp.float32))
    kernel = functools.partial(_backward_kernel, tile=tile, shape=(n, d, width), softcap=softcap, filter_eps=filter_eps)
    d_NW, used_RC, *dbias_RW = pl.pallas_call(
        kernel,
        grid=(rows, columns),
        in_specs=[*_in_specs(tile, d, v, bias_V, token_vectors=4), pl.BlockSpec((None,), lambda i, j: (0,))],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="cross_entropy_backward",
    )(e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N, start[None])
    return d_NW, jnp.any(used_RC), jnp.sum(dbias_RW[0], axis=0) if dbias_RW else None


def _in_specs(tile, d, v, bias_V, token_vectors):
    """Embeddings by block of tokens; the classifier and its bias whole; vectors over tokens by block of tokens."""
    return [
        pl.BlockSpec((tile.tokens, _padded(d, tile.depth)), lambda i, _: (i, 0)),
        pl.BlockSpec((v, _padded(d, tile.depth)), lambda i, _: (0, 0)),
        None if bias_V is None else pl.BlockSpec((v,), lambda i, _: (0,)),
    ] + [pl.BlockSpec((tile.tokens,), lambda i, _: (i,))] * token_vectors


def _forward_kernel(e_ref, c_ref, bias_ref, targets_ref, max_ref, sum_ref, picked_ref, *, tile, splits, shape, softcap):
    n, d, v = shape
    rows_in = _inside(pl.program_id(0) * tile.tokens, tile.tokens, n)
    targets_T = _load(targets_ref, rows_in, other=-1)
    logits = _logits(e_ref, c_ref, bias_ref, rows_in, tile, d, softcap)

    def body(j, carry):
        max_T, sum_T, picked_T = carry
        columns_in = _inside(j * tile.columns, tile.columns, v)
        logits_TC = logits(j * tile.columns, columns_in)
        hit_TC = targets_T[:, None] == j * tile.columns + jnp.arange(tile.columns)[None]
        picked_T += jnp.sum(jnp.where(hit_TC, logits_TC, 0.0), axis=1)
        if columns_in is not None:
            logits_TC = jnp.where(columns_in[None], logits_TC, -jnp.inf)
        new_T = jnp.maximum(max_T, jnp.max(logits_TC, axis=1))
        base_T = _finite(new_T)
        exp_TC = jnp.exp2((logits_TC - base_T[:, None]) * LOG2_E)
        return new_T, sum_T * jnp.exp2((max_T - base_T) * LOG2_E) + jnp.sum(exp_TC, axis=1), picked_T

    blocks = pl.cdiv(v, tile.columns)
    per_split = pl.cdiv(blocks, splits)
    first = pl.program_id(1) * per_split
    zero_T = jnp.zeros((tile.tokens,), jnp.float32)
    carry = (zero_T - jnp.inf, zero_T, zero_T)
    carry = lax.fori_loop(first, jnp.minimum(first + per_split, blocks), body, carry)
    for ref, value_T in zip((max_ref, sum_ref, picked_ref), carry, strict=True):
        plt.store(ref, value_T, mask=rows_in)


def _backward_kernel(
    e_ref, c_ref, bias_ref, targets_ref, lse_ref, soft_ref, hot_ref, start_ref, d_ref, used_ref, *dbias_ref,
    tile, shape, softcap, filter_eps,
):  # fmt: skip
    n, d, width = shape
    rows_in = _inside(pl.program_id(0) * tile.tokens, tile.tokens, n)
    local = pl.program_id(1) * tile.columns
    columns_in = _inside(local, tile.columns, width)
    first = start_ref[...] + local
    logits_TC = _logits(e_ref, c_ref, bias_ref, rows_in, tile, d, softcap)(first, columns_in)
    # Rows past the last token have lse = inf and thus no softmax.
    lse_T = _load(lse_ref, rows_in, other=jnp.inf)
    soft_T, hot_T = _load(soft_ref, rows_in), _load(hot_ref, rows_in)
    softmax_TC = jnp.exp2((logits_TC - lse_T[:, None]) * LOG2_E)
    hit_TC = _load(targets_ref, rows_in, other=-1)[:, None] == first + jnp.arange(tile.columns)[None]
    d_TC = softmax_TC * soft_T[:, None] - jnp.where(hit_TC, hot_T[:, None], 0.0)
    if softcap is not None:
        d_TC *= 1.0 - jnp.square(logits_TC * (1.0 / softcap))
    inside_TC = _both(rows_in, columns_in)
    if filter_eps:
        gap_TC = jnp.where(hit_TC, 1.0 - softmax_TC, softmax_TC)
        counts_TC = _both((soft_T != 0) | (hot_T != 0), columns_in)
        used = jnp.max(jnp.where(counts_TC, gap_TC, 0.0)) >= filter_eps
        d_TC = jnp.where(used, d_TC, 0.0)
        used_ref[...] = used.astype(jnp.int32)
    else:
        used_ref[...] = jnp.int32(1)
    plt.store(d_ref, d_TC.astype(d_ref.dtype), mask=inside_TC)
    if dbias_ref:
        plt.store(dbias_ref[0], jnp.sum(d_TC, axis=0), mask=columns_in)


def _logits(e_ref, c_ref, bias_ref, rows_in, tile, d, softcap):
    """Return (first column, which columns exist) -> logits of the program's tokens, bias and cap applied."""

    def load(ref, rows, k, limit):
        depth_in = _inside(k * tile.depth, tile.depth, d)
        return _load(ref.at[rows, pl.ds(k * tile.depth, tile.depth)], _both(limit, depth_in))

    steps = pl.cdiv(d, tile.depth)
    # With all of D in one step, the tokens' embeddings are loaded once for all columns.
    e_TD = load(e_ref, slice(None), 0, rows_in) if steps == 1 else None

    def logits(first, columns_in):
        def add(k, sum_TC):
            e_TK = load(e_ref, slice(None), k, rows_in) if e_TD is None else e_TD
            c_CK = load(c_ref, pl.ds(first, tile.columns), k, columns_in)
            return sum_TC + jnp.dot(e_TK, c_CK.T, preferred_element_type=jnp.float32)

        sum_TC = jnp.zeros((tile.tokens, tile.columns), jnp.float32)
        sum_TC = add(0, sum_TC) if steps == 1 else lax.fori_loop(0, steps, add, sum_TC)
        if bias_ref is not None:
            sum_TC += _load(bias_ref.at[pl.ds(first, tile.columns)], columns_in).astype(jnp.float32)[None]
        return sum_TC if softcap is None else _capped(sum_TC, softcap)

    return logits


def _capped(x, softcap):
    """softcap * tanh(x / softcap), through exp2; its error is absolute, some 1e-7 * softcap, as a logit needs it."""
    return softcap - 2.0 * softcap / (jnp.exp2(x * (2.0 * LOG2_E / softcap)) + 1.0)


def _finite(max_T):
    """Maxima to subtract: 0 for -inf, since -inf - -inf is NaN."""
    return jnp.where(max_T == -jnp.inf, 0.0, max_T)


def _inside(first, size, limit):
    """Which of first .. first + size are below `limit`; None where blocks of this size end exactly there."""
    return None if limit % size == 0 else first + jnp.arange(size) < limit


def _both(rows_in, columns_in):
    """Mask of a tile from masks of its two axes, None standing for all."""
    if rows_in is None or columns_in is None:
        return rows_in[:, None] if rows_in is not None else columns_in[None] if columns_in is not None else None
    return rows_in[:, None] & columns_in[None]


def _load(ref, mask=None, other=0):
    return plt.load(ref, mask=mask, other=None if mask is None else other)


def _padded(size, block):
    return pl.cdiv(size, block) * block


def _within(size, low, high):
    return max(low, min(high, pl.next_power_of_2(size)))
