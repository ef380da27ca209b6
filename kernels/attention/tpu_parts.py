"""What the forward and the backward kernel of the TPU share; everything works on transposed scores [keys, queries].

With queries in the lanes, the softmax's statistics are rows: sums and maxima over keys are plain additions and
comparisons of registers, and a log-sum-exp is stored as it is, not repeated over 128 lanes.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention.tpu_plan import Plan, span

LOG2E = math.log2(math.e)
# The score of a masked key, and where running maxima start: 2 to the power of their difference is 0, so a row that has
# seen nothing has weights 0. Both are far below all scores, and their difference is finite.
MASKED, LOWEST = -2e30, -1e30


def dot(x, y, contract, precision=None):
    """Contract axis contract[0] of x with contract[1] of y, both of rank 2, into float32."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)


def in_key_lanes(plan: Plan, rows_ref, head: int):
    """Return [bq, lanes of the key head's tile]: the query head's columns where its key head has its own, else 0.

    So a product with the whole tile of keys, which costs what one with a head's own lanes would, is one with its head.
    """
    a = plan.width_padded
    mine = span(head, plan.cluster_heads, a)
    theirs = span(head // plan.group, plan.cluster, a)
    tile = rows_ref[0, :, mine.start : mine.stop]
    wide, kv_wide = mine.stop - mine.start, theirs.stop - theirs.start
    if a == wide == kv_wide:
        return tile
    if wide == kv_wide and mine.offset == theirs.offset:
        lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
        return jnp.where((lane >= mine.offset) & (lane < mine.offset + a), tile, jnp.zeros_like(tile))
    # A product with a matrix of zeros and ones moves the lanes, exactly.
    source = jax.lax.broadcasted_iota(jnp.int32, (wide, kv_wide), 0) - mine.offset
    target = jax.lax.broadcasted_iota(jnp.int32, (wide, kv_wide), 1) - theirs.offset
    moves = (source == target) & (target >= 0) & (target < a)
    precision = jax.lax.Precision.HIGHEST if tile.dtype == jnp.float32 else None
    return dot(tile, moves.astype(jnp.float32).astype(tile.dtype), (1, 0), precision).astype(tile.dtype)


def scores(plan: Plan, k, q):
    """Return (scores [bk, bq] in base 2 before masking, share of their gradient that the cap lets pass or None)."""
    raw = dot(k, q, (1, 1))
    if plan.softcap is None:
        return raw * (plan.scale * LOG2E), None
    tanh = jnp.tanh(raw * (plan.scale / plan.softcap))
    return tanh * (plan.softcap * LOG2E), 1.0 - tanh * tanh


def visible(plan: Plan, i, j, q_segments_ref, kv_segments_ref):
    """Return bool [bk, bq] for block i of queries and block j of keys."""
    bq, bk = plan.blocks.q, plan.blocks.kv
    shape = (bk, bq)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    distance = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - key
    ahead = j * bk - i * bq - (plan.t - plan.s)
    parts = []
    if plan.causal:
        parts.append(distance >= ahead)
    elif plan.t_padded != plan.t:
        parts.append(key < plan.t - j * bk)
    if plan.window is not None:
        parts.append(distance < ahead + plan.window)
    if plan.segments:
        row = kv_segments_ref[0, pl.ds(j, 1), :]
        column = jnp.broadcast_to(row, (128, bk)).T
        # Every lane of `column` holds the key's segment.
        parts.append(jnp.concatenate([column] * (bq // 128), axis=1) == q_segments_ref[0])
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


def for_visited_blocks(plan: Plan, visits_ref, step):
    """Call step(j, masked) for every block j of keys that block program_id(2) of queries visits."""
    row = pl.program_id(2) + (pl.program_id(0) * plan.q_blocks if plan.segments else 0)
    first, full, full_end, end = (visits_ref[4 * row + n] for n in range(4))
    if plan.masked:
        before = full - first

        @pl.loop(0, before + end - full_end)
        def _(n):
            step(jnp.where(n < before, first + n, full_end + n - before), True)

    @pl.loop(full, full_end)
    def _(j):
        step(j, False)
