"""NVIDIA GPUs: flash attention (Dao et al. 2022, 2023) as Pallas kernels through Triton.

Three kernels, one program per block of queries (forward, dq) or of keys (dk and dv), each walking only through the
blocks it can see: causality and window cut the range of the loop, and so do the documents of a packed row. Blocks that
are visible as a whole are not masked. The two backward kernels both compute the scores again, so that nothing is summed
across programs: the same inputs give the same bits.
Products of float32 are TF32, as XLA's are on these GPUs; jax.default_matmul_precision("highest") makes them exact.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels.attention.gpu_kernels import Case, Tile, dkv_kernel, dq_kernel, forward_kernel, padded_head
from kernels.attention.vjp import Options, row_deltas, sink_gradients

DTYPES = ("bfloat16", "float16", "float32")
WIDEST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


# By (padded head width, bytes per number): the largest tried that spill no register under any option, also ragged ones.
# Fewer than 64 rows means mma.sync in place of Hopper's wgmma: dk and dv of a wide head leave no registers for more.
SIZES = {
    (64, 2): Blocks(Tile(128, 64, 8, 3), dq=Tile(64, 64, 4, 3), dkv=Tile(64, 64, 4, 2)),
    (128, 2): Blocks(Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 2), dkv=Tile(32, 128, 8, 2)),
    (256, 2): Blocks(Tile(128, 64, 8, 2), dq=Tile(128, 32, 8, 2), dkv=Tile(32, 32, 8, 2)),
    (64, 4): Blocks(Tile(128, 64, 8, 3), dq=Tile(64, 64, 8, 2), dkv=Tile(32, 128, 8, 2)),
    (128, 4): Blocks(Tile(128, 32, 8, 2), dq=Tile(32, 32, 8, 2), dkv=Tile(32, 32, 8, 2)),
    (256, 4): Blocks(Tile(32, 32, 8, 2), dq=Tile(32, 16, 8, 2), dkv=Tile(16, 16, 8, 2)),
}


def supports(q_BSHA, k_BTKA, options: Options) -> str | None:
    """Return None if the kernels can serve arrays of these shapes and dtypes, else one line saying why not."""
    del options  # all are served
    if q_BSHA.dtype != k_BTKA.dtype:
        return f"the GPU kernels need one dtype, not {q_BSHA.dtype} queries with {k_BTKA.dtype} keys"
    if q_BSHA.dtype.name not in DTYPES:
        return f"the GPU kernels take {', '.join(DTYPES)}, not {q_BSHA.dtype}"
    if q_BSHA.shape[3] > WIDEST_HEAD:
        return f"the GPU kernels take heads of width {WIDEST_HEAD} at most, not {q_BSHA.shape[3]}"
    if 0 in q_BSHA.shape or 0 in k_BTKA.shape:
        return "the GPU kernels need at least one query, one key and one head"
    return None


def default_blocks(s: int, t: int, a: int, dtype) -> Blocks:
    """Return sizes that compile for sm_90a without spilled registers and within its 227 KiB of shared memory."""
    sizes = SIZES[max(64, padded_head(a)), jnp.dtype(dtype).itemsize]
    tiles = [
        dataclasses.replace(x, queries=_within(s, 16, x.queries), keys=_within(t, 16, x.keys))
        for x in (sizes.forward, sizes.dq, sizes.dkv)
    ]
    if a > 128 and t % 64:
        # Masking the last keys takes registers that wider blocks do not leave.
        tiles[0] = dataclasses.replace(tiles[0], keys=min(tiles[0].keys, 32))
    return Blocks(*tiles)


def forward(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    q_segments_BS,
    kv_segments_BT,
    sinks_H,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks | None = None,
    interpret=False,
):
    """Return (out_BSHA in the dtype of q, lse_BHS float32); a query that sees nothing gets 0 and -inf (or its sink)."""
    case = _case(q_BSHA, k_BTKA, causal, window, softcap, scale)
    b, s, h, a = q_BSHA.shape
    tile = (blocks or default_blocks(s, case.t, a, q_BSHA.dtype)).forward
    count = pl.cdiv(s, tile.queries)
    spec = _query_specs(case, tile, count)
    segments, segment_specs = _segment_inputs(q_segments_BS, kv_segments_BT, tile.queries, tile.keys, spec)
    return pl.pallas_call(
        functools.partial(forward_kernel, tile=tile, case=case),
        grid=(count, h, b),
        in_specs=[spec["q"], spec["kv"], spec["kv"], *segment_specs, None if sinks_H is None else spec["head"]],
        out_specs=[spec["q"], spec["row"]],
        out_shape=[
            jax.ShapeDtypeStruct(q_BSHA.shape, q_BSHA.dtype),
            jax.ShapeDtypeStruct((b, h, s), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="attention_forward",
    )(q_BSHA, k_BTKA, v_BTKA, *segments, sinks_H)


def backward(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    q_segments_BS,
    kv_segments_BT,
    sinks_H,
    out_BSHA,
    lse_BHS,
    dout_BSHA,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks | None = None,
    interpret=False,
):
    """Return (dq, dk, dv, dsinks or None) in the dtypes of the inputs; dk and dv are summed over a group in float32."""
    case = _case(q_BSHA, k_BTKA, causal, window, softcap, scale)
    b, s, h, a = q_BSHA.shape
    blocks = blocks or default_blocks(s, case.t, a, q_BSHA.dtype)
    delta_BHS = row_deltas(out_BSHA, dout_BSHA)
    rows = (dout_BSHA, lse_BHS, delta_BHS)

    tile = blocks.dq
    count = pl.cdiv(s, tile.queries)
    spec = _query_specs(case, tile, count)
    segments, segment_specs = _segment_inputs(q_segments_BS, kv_segments_BT, tile.queries, tile.keys, spec)
    dq_BSHA = pl.pallas_call(
        functools.partial(dq_kernel, tile=tile, case=case),
        grid=(count, h, b),
        in_specs=[spec["q"], spec["kv"], spec["kv"], *segment_specs, spec["q"], spec["row"], spec["row"]],
        out_specs=spec["q"],
        out_shape=jax.ShapeDtypeStruct(q_BSHA.shape, q_BSHA.dtype),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="attention_dq",
    )(q_BSHA, k_BTKA, v_BTKA, *segments, *rows)

    tile = blocks.dkv
    spec = _key_specs(case, tile)
    segments, segment_specs = _segment_inputs(kv_segments_BT, q_segments_BS, tile.keys, tile.queries, spec)
    dk_BTKA, dv_BTKA = pl.pallas_call(
        functools.partial(dkv_kernel, tile=tile, case=case),
        grid=(pl.cdiv(case.t, tile.keys), k_BTKA.shape[2], b),
        in_specs=[spec["q"], spec["kv"], spec["kv"], *segment_specs, spec["q"], spec["row"], spec["row"]],
        out_specs=[spec["kv"], spec["kv"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BTKA, v_BTKA)],
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="attention_dkv",
    )(q_BSHA, k_BTKA, v_BTKA, *segments, *rows)

    return dq_BSHA, dk_BTKA, dv_BTKA, sink_gradients(sinks_H, lse_BHS, delta_BHS)


def _case(q_BSHA, k_BTKA, causal, window, softcap, scale):
    _, s, h, a = q_BSHA.shape
    _, t, kv, _ = k_BTKA.shape
    return Case(s, t, a, h // kv, causal, window, softcap, scale)


def _query_specs(case, tile, count):
    """Blocks of a program (block of queries, head, row of the batch); under causality the longest walks start first."""
    head = padded_head(case.a)

    def block(i):
        return count - 1 - i if case.causal else i

    return {
        "q": pl.BlockSpec((None, tile.queries, None, head), lambda i, h, b: (b, block(i), h, 0)),
        "kv": pl.BlockSpec((None, case.t, None, head), lambda i, h, b: (b, 0, lax.div(h, case.group), 0)),
        "row": pl.BlockSpec((None, None, tile.queries), lambda i, h, b: (b, h, block(i))),
        "own": pl.BlockSpec((None, tile.queries), lambda i, h, b: (b, block(i))),
        "other": pl.BlockSpec((None, case.t), lambda i, h, b: (b, 0)),
        "limit": pl.BlockSpec((None, None), lambda i, h, b: (b, block(i))),
        "head": pl.BlockSpec((None,), lambda i, h, b: (h,)),
    }


def _key_specs(case, tile):
    """Blocks of a program (block of keys, key head, row of the batch), with all queries of the heads of its group."""
    return {
        "q": pl.BlockSpec((None, case.s, case.group, padded_head(case.a)), lambda j, k, b: (b, 0, k, 0)),
        "kv": pl.BlockSpec((None, tile.keys, None, padded_head(case.a)), lambda j, k, b: (b, j, k, 0)),
        "row": pl.BlockSpec((None, case.group, case.s), lambda j, k, b: (b, k, 0)),
        "own": pl.BlockSpec((None, tile.keys), lambda j, k, b: (b, j)),
        "other": pl.BlockSpec((None, case.s), lambda j, k, b: (b, 0)),
        "limit": pl.BlockSpec((None, None), lambda j, k, b: (b, j)),
    }


def _segment_inputs(own, other, own_block, other_block, spec):
    """Inputs and their blocks: own and other segments; the first other block that may share one, the last plus 1."""
    if own is None:
        return [None] * 4, [None] * 4

    def least_and_largest(x, block):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge").reshape(x.shape[0], -1, block)
        return jnp.min(x, axis=2), jnp.max(x, axis=2)

    own_least_BX, own_largest_BX = least_and_largest(own, own_block)
    other_least_BY, other_largest_BY = least_and_largest(other, other_block)
    meet_BXY = own_least_BX[:, :, None] <= other_largest_BY[:, None]
    meet_BXY &= other_least_BY[:, None] <= own_largest_BX[:, :, None]
    first_BX = jnp.argmax(meet_BXY, axis=2).astype(jnp.int32)
    last_BX = meet_BXY.shape[2] - 1 - jnp.argmax(meet_BXY[:, :, ::-1], axis=2).astype(jnp.int32)
    stop_BX = jnp.where(jnp.any(meet_BXY, axis=2), last_BX + 1, 0)
    return [own, other, first_BX, stop_BX], [spec["own"], spec["other"], spec["limit"], spec["limit"]]


def _within(size, low, high):
    return max(low, min(high, pl.next_power_of_2(size)))
