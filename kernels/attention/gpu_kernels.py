"""The three programs of flash attention on NVIDIA GPUs, and the ranges of blocks that they walk through."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's scores at a time: queries x keys (powers of two of at least 16)."""

    queries: int
    keys: int
    warps: int
    stages: int  # loads in flight, software-pipelined by Triton


@dataclasses.dataclass(frozen=True)
class Case:
    """What the kernels know when they are compiled: sizes and options of the primitives."""

    s: int
    t: int
    a: int
    group: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float

    @property
    def offset(self):
        """Query i stands at position i + offset among the keys."""
        return self.t - self.s


def forward_kernel(
    q_ref, k_ref, v_ref, own_ref, other_ref, first_ref, stop_ref, sink_ref, out_ref, lse_ref, *, tile, case
):
    """One block of queries of one head: its output and log-sum-exp. `own` are segments of queries, `other` of keys."""
    start = _first_query(tile, case)
    rows_in, head_in = _inside(start, tile.queries, case.s), _inside(0, padded_head(case.a), case.a)
    q_QA = _load(q_ref, _both(rows_in, head_in))
    own_Q = None if own_ref is None else _load(own_ref, rows_in)

    def body(masked, j, carry):
        out_QA, max_Q, sum_Q = carry
        keys, keys_in, mask_QC = _other_keys(j, start, own_Q, other_ref, masked, tile, case)
        k_CA = _load(k_ref.at[keys], _both(keys_in, head_in))
        scores_QC, _ = _scores(q_QA, k_CA, case)
        if mask_QC is not None:
            scores_QC = jnp.where(mask_QC, scores_QC, -jnp.inf)
        new_Q = jnp.maximum(max_Q, jnp.max(scores_QC, axis=1))
        # A query that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base_Q = new_Q if mask_QC is None else jnp.where(new_Q == -jnp.inf, 0.0, new_Q)
        probs_QC = jnp.exp2(scores_QC - base_Q[:, None])
        decay_Q = jnp.exp2(max_Q - base_Q)
        v_CA = _load(v_ref.at[keys], _both(keys_in, head_in))
        out_QA = out_QA * decay_Q[:, None] + _dot(probs_QC.astype(v_CA.dtype), v_CA)
        return out_QA, new_Q, sum_Q * decay_Q + jnp.sum(probs_QC, axis=1)

    out_QA = jnp.zeros((tile.queries, padded_head(case.a)), jnp.float32)
    max_Q = jnp.full((tile.queries,), -jnp.inf, jnp.float32)
    sum_Q = jnp.zeros((tile.queries,), jnp.float32)
    if sink_ref is not None:
        max_Q, sum_Q = sum_Q + sink_ref[...].astype(jnp.float32) * LOG2_E, sum_Q + 1.0
    ranges = _keys_seen(start, tile, case)
    out_QA, max_Q, sum_Q = _walk(ranges, first_ref, stop_ref, body, (out_QA, max_Q, sum_Q))
    out_QA = out_QA / jnp.where(sum_Q == 0.0, 1.0, sum_Q)[:, None]
    plt.store(out_ref, out_QA.astype(out_ref.dtype), mask=_both(rows_in, head_in))
    plt.store(lse_ref, (max_Q + jnp.log2(sum_Q)) * (1.0 / LOG2_E), mask=rows_in)


def dq_kernel(
    q_ref, k_ref, v_ref, own_ref, other_ref, first_ref, stop_ref, dout_ref, lse_ref, delta_ref, dq_ref, *, tile, case
):
    """One block of queries of one head: its gradient. `own` are segments of queries, `other` of keys."""
    start = _first_query(tile, case)
    rows_in, head_in = _inside(start, tile.queries, case.s), _inside(0, padded_head(case.a), case.a)
    q_QA, dout_QA = (_load(ref, _both(rows_in, head_in)) for ref in (q_ref, dout_ref))
    lse_Q, delta_Q = _load(lse_ref, rows_in, other=jnp.inf) * LOG2_E, _load(delta_ref, rows_in)
    own_Q = None if own_ref is None else _load(own_ref, rows_in)

    def body(masked, j, dq_QA):
        keys, keys_in, mask_QC = _other_keys(j, start, own_Q, other_ref, masked, tile, case)
        k_CA, v_CA = (_load(ref.at[keys], _both(keys_in, head_in)) for ref in (k_ref, v_ref))
        scores_QC, passed_QC = _scores(q_QA, k_CA, case)
        probs_QC = jnp.exp2(scores_QC - lse_Q[:, None])
        dscores_QC = probs_QC * (_dot(dout_QA, v_CA.T) - delta_Q[:, None])
        dscores_QC = dscores_QC if passed_QC is None else dscores_QC * passed_QC
        # Chosen after the arithmetic: a query that sees nothing has lse = -inf and probabilities of inf.
        dscores_QC = dscores_QC if mask_QC is None else jnp.where(mask_QC, dscores_QC, 0.0)
        return dq_QA + _dot(dscores_QC.astype(k_CA.dtype), k_CA)

    dq_QA = jnp.zeros((tile.queries, padded_head(case.a)), jnp.float32)
    dq_QA = _walk(_keys_seen(start, tile, case), first_ref, stop_ref, body, dq_QA)
    plt.store(dq_ref, (dq_QA * case.scale).astype(dq_ref.dtype), mask=_both(rows_in, head_in))


def dkv_kernel(
    q_ref, k_ref, v_ref, own_ref, other_ref, first_ref, stop_ref, dout_ref, lse_ref, delta_ref, dk_ref, dv_ref,
    *, tile, case,
):  # fmt: skip
    """One block of keys of one key head: gradients of keys and values over all heads of the group.

    `own` are segments of keys, `other` of queries; `first` and `stop` count blocks of queries.
    """
    start = pl.program_id(0) * tile.keys
    keys_in, head_in = _inside(start, tile.keys, case.t), _inside(0, padded_head(case.a), case.a)
    k_CA, v_CA = (_load(ref, _both(keys_in, head_in)) for ref in (k_ref, v_ref))
    own_C = None if own_ref is None else _load(own_ref, keys_in)
    index_C = start + jnp.arange(tile.keys)

    def body(g, masked, i, carry):
        dk_CA, dv_CA = carry
        queries = pl.ds(i * tile.queries, tile.queries)
        rows_in = _inside(i * tile.queries, tile.queries, case.s) if masked else None
        q_QA, dout_QA = (_load(ref.at[queries, g], _both(rows_in, head_in)) for ref in (q_ref, dout_ref))
        # Rows past the last query have lse = inf and thus no probabilities.
        lse_Q = _load(lse_ref.at[g, queries], rows_in, other=jnp.inf) * LOG2_E
        delta_Q = _load(delta_ref.at[g, queries], rows_in)
        # Keys x queries: both products below then take what was computed as it lies in registers.
        scores_CQ, passed_CQ = _scores(k_CA, q_QA, case)
        probs_CQ = jnp.exp2(scores_CQ - lse_Q[None])
        mask_CQ = None
        if masked:
            other_Q = None if other_ref is None else _load(other_ref.at[queries], rows_in)
            index_Q = i * tile.queries + jnp.arange(tile.queries)
            mask_CQ = _visible(index_Q[None], index_C[:, None], _across(other_Q, 0), _across(own_C, 1), case)
        probs_CQ = probs_CQ if mask_CQ is None else jnp.where(mask_CQ, probs_CQ, 0.0)
        dv_CA += _dot(probs_CQ.astype(dout_QA.dtype), dout_QA)
        dscores_CQ = probs_CQ * (_dot(v_CA, dout_QA.T) - delta_Q[None])
        dscores_CQ = dscores_CQ if passed_CQ is None else dscores_CQ * passed_CQ
        return dk_CA + _dot(dscores_CQ.astype(q_QA.dtype), q_QA), dv_CA

    def head(g, carry):
        return _walk(ranges, first_ref, stop_ref, functools.partial(body, g), carry)

    ranges = _queries_seeing(start, tile, case)
    zero_CA = jnp.zeros((tile.keys, padded_head(case.a)), jnp.float32)
    carry = (zero_CA, zero_CA)
    dk_CA, dv_CA = lax.fori_loop(0, case.group, head, carry)
    plt.store(dk_ref, (dk_CA * case.scale).astype(dk_ref.dtype), mask=_both(keys_in, head_in))
    plt.store(dv_ref, dv_CA.astype(dv_ref.dtype), mask=_both(keys_in, head_in))


def _first_query(tile, case):
    i = pl.program_id(0)
    return (pl.cdiv(case.s, tile.queries) - 1 - i if case.causal else i) * tile.queries


def _other_keys(j, start, own_Q, other_ref, masked, tile, case):
    """Block j of keys for queries from `start`: (slice, which keys exist, mask); None where nothing is to be masked."""
    keys = pl.ds(j * tile.keys, tile.keys)
    if not masked:
        return keys, None, None
    keys_in = _inside(j * tile.keys, tile.keys, case.t)
    other_C = None if other_ref is None else _load(other_ref.at[keys], keys_in)
    index_Q, index_C = start + jnp.arange(tile.queries), j * tile.keys + jnp.arange(tile.keys)
    mask_QC = _visible(index_Q[:, None], index_C[None], _across(own_Q, 1), _across(other_C, 0), case)
    if keys_in is not None:
        mask_QC = keys_in[None] if mask_QC is None else mask_QC & keys_in[None]
    return keys, keys_in, mask_QC


def _visible(query, key, query_segment, key_segment, case):
    """Mask over indices of queries and keys that broadcast against each other; None if nothing restricts."""
    mask = None
    if case.causal:
        mask = key <= query + case.offset
    if case.window is not None:
        mask &= key > query + case.offset - case.window
    if query_segment is not None:
        same = query_segment == key_segment
        mask = same if mask is None else mask & same
    return mask


def _scores(x_XA, y_YA, case):
    """Scores in units of ln 2 (for exp2), and the share of their gradient that passes the cap (None without one)."""
    raw_XY = _dot(x_XA, y_YA.T)
    if case.softcap is None:
        return raw_XY * (case.scale * LOG2_E), None
    # tanh(z) = 1 - 2 / (exp(2 z) + 1): two fast instructions where libdevice's tanh branches.
    tanh_XY = 1.0 - 2.0 / (jnp.exp2(raw_XY * (2.0 * LOG2_E * case.scale / case.softcap)) + 1.0)
    return tanh_XY * (case.softcap * LOG2_E), 1.0 - tanh_XY * tanh_XY


def _walk(ranges, first_ref, stop_ref, body, carry):
    """Run body(masked, block, carry) over the blocks of `ranges`: (first, first whole, after last whole, stop)."""
    first, whole, after, stop = ranges
    if first_ref is not None:
        first, stop = jnp.maximum(first, first_ref[...]), jnp.minimum(stop, stop_ref[...])
        return lax.fori_loop(first, stop, functools.partial(body, True), carry)
    for start, end, masked in ((first, whole, True), (whole, after, False), (after, stop, True)):
        if isinstance(start, int) and isinstance(end, int) and start >= end:
            continue
        carry = lax.fori_loop(start, end, functools.partial(body, masked), carry)
    return carry


def _keys_seen(start, tile, case):
    """Blocks of keys that queries start .. start + tile.queries see: the ranges that `_walk` takes."""
    at = start + case.offset
    first, whole, after, stop = 0, 0, case.t // tile.keys, pl.cdiv(case.t, tile.keys)
    if case.causal:
        after = _blocks(at + 1, case.t, tile.keys)
        stop = _blocks(at + tile.queries, case.t, tile.keys, up=True)
    if case.window is not None:
        first = _blocks(at + 1 - case.window, case.t, tile.keys)
        whole = _blocks(at + tile.queries - case.window, case.t, tile.keys, up=True)
    return _ordered(first, whole, after, stop)


def _queries_seeing(start, tile, case):
    """Blocks of queries that see keys start .. start + tile.keys: the ranges that `_walk` takes."""
    at = start - case.offset
    first, whole, after, stop = 0, 0, case.s // tile.queries, pl.cdiv(case.s, tile.queries)
    if case.causal:
        first = _blocks(at, case.s, tile.queries)
        whole = _blocks(at + tile.keys - 1, case.s, tile.queries, up=True)
    if case.window is not None:
        after = _blocks(at + case.window, case.s, tile.queries)
        stop = _blocks(at + tile.keys - 1 + case.window, case.s, tile.queries, up=True)
    return _ordered(first, whole, after, stop)


def _blocks(index, limit, block, up=False):
    """How many blocks end at or before `index` (up: begin before it), clipped to 0 .. limit."""
    index = jnp.clip(index, 0, limit)
    return lax.div(index + (block - 1 if up else 0), block)


def _ordered(first, whole, after, stop):
    if all(isinstance(x, int) for x in (first, whole, after, stop)):
        return first, whole, after, stop
    whole = jnp.clip(whole, first, stop)
    return first, whole, jnp.clip(after, whole, stop), stop


def _across(x, axis):
    return None if x is None else jnp.expand_dims(x, axis)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


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


def padded_head(a: int) -> int:
    """Return the width of a tile that holds a head: a power of two."""
    return max(16, pl.next_power_of_2(a))
