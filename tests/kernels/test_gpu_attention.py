"""The attention's GPU kernels, interpreted on a CPU, against float64 formulas; broken copies of them rejected."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import gpu, gpu_kernels
from kernels.attention.vjp import Options


def tiles(queries, keys):
    """Return equal tiles for the three kernels."""
    return gpu.Blocks(*[gpu.Tile(queries, keys, warps=4, stages=2)] * 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, options and blocks of one call: B 1, S, T, H, K, A of the arrays."""

    s: int
    t: int
    heads: tuple[int, int] = (2, 1)
    a: int = 16
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    segments: bool = False
    sinks: bool = False
    blocks: gpu.Blocks | None = tiles(16, 16)

    def options(self):
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.a**-0.5}


CASES = {
    "one of each": Case(1, 1, heads=(1, 1)),
    "causal": Case(70, 70, blocks=tiles(16, 32)),
    "window and cap": Case(70, 70, heads=(2, 2), window=20, softcap=5.0),
    "window of one": Case(33, 33, window=1, sinks=True),
    "everything": Case(33, 40, heads=(3, 1), a=24, window=9, softcap=2.0, segments=True, sinks=True),
    "more keys": Case(20, 50, window=9),
    "queries that see nothing": Case(50, 20, window=7, segments=True),
    "not causal": Case(40, 50, causal=False, sinks=True, blocks=tiles(32, 16)),
    "not causal, even": Case(32, 32, causal=False),
    "default blocks": Case(130, 130, heads=(4, 2), a=80, softcap=3.0, segments=True, blocks=None),
}


def inputs(case, seed=0):
    """Return float64 arrays: q, k, v, query and key segments or None, sinks or None, and the upstream gradient."""
    random = np.random.RandomState(seed)
    h, kv = case.heads
    q, k, v, dout = (
        random.randn(1, n, heads, case.a) for n, heads in ((case.s, h), (case.t, kv), (case.t, kv), (case.s, h))
    )
    q_segments = kv_segments = None
    if case.segments:
        ids = np.sort(random.randint(0, 4, max(case.s, case.t)))[None].astype(np.int32)
        q_segments, kv_segments = ids[:, -case.s :].copy(), ids[:, -case.t :]
        q_segments[:, 0] = 9  # a query whose segment has no key
    return q, k, v, q_segments, kv_segments, random.randn(h) if case.sinks else None, dout


def exact(case, q, k, v, q_segments, kv_segments, sinks, dout, wrong=None):
    """Return (out, lse, dq, dk, dv, dsinks or None) by the formulas, in float64; `wrong` names a mistake to make."""
    (_, s, h, a), (_, t, kv, _) = q.shape, k.shape
    scale, group = a**-0.5, h // kv
    of_head = np.arange(h) % kv if wrong == "heads interleaved" else np.arange(h) // group
    k_BTHA, v_BTHA = k[:, :, of_head], v[:, :, of_head]
    raw = np.einsum("bsha,btha->bhst", q, k_BTHA) * scale
    scores = case.softcap * np.tanh(raw / case.softcap) if case.softcap else raw
    at = np.arange(s)[:, None] + (0 if wrong == "queries come first" else t - s)
    mask = np.ones((s, t), bool)
    if case.causal:
        mask &= np.arange(t)[None] <= at - (wrong == "causal off by one")
    if case.window:
        mask &= np.arange(t)[None] > at - case.window - (wrong == "window off by one")
    mask = mask[None, None]
    if q_segments is not None:
        mask = mask & (q_segments[:, None, :, None] == kv_segments[:, None, None, :])
    scores = np.where(mask, scores, -np.inf)
    sink = np.full((1, h, s), -np.inf) if sinks is None else np.broadcast_to(sinks[None, :, None], (1, h, s))
    top = np.maximum(scores.max(axis=-1), sink)
    base = np.where(np.isinf(top), 0.0, top)
    probs, total = np.exp(scores - base[..., None]), np.exp(sink - base)
    total = probs.sum(axis=-1) + total
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    probs /= np.where(total == 0, 1.0, total)[..., None]
    dprobs = np.einsum("bsha,btha->bhst", dout, v_BTHA)
    delta = 0.0 if wrong == "delta omitted" else (probs * dprobs).sum(axis=-1)[..., None]
    dscores = probs * (dprobs - delta)
    if case.softcap and wrong != "cap without derivative":
        dscores = dscores * (1 - np.tanh(raw / case.softcap) ** 2)

    def of_key_heads(x_BTHA):
        return np.stack([x_BTHA[:, :, of_head == head].sum(axis=2) for head in range(kv)], axis=2)

    out = np.einsum("bhst,btha->bsha", probs, v_BTHA)
    dq = np.einsum("bhst,btha->bsha", dscores, k_BTHA) * scale
    dk = of_key_heads(np.einsum("bhst,bsha->btha", dscores, q) * scale)
    dv = of_key_heads(np.einsum("bhst,bsha->btha", probs, dout))
    dsinks = None if sinks is None else -(np.exp(sink - lse) * (probs * dprobs).sum(axis=-1)).sum(axis=(0, 2))
    return out, lse, dq, dk, dv, dsinks


def found(case, arrays, dtype=jnp.float32, forward_only=False):
    """Return what `exact` does from the kernels, as float64, or the first two of it."""
    q, k, v, q_segments, kv_segments, sinks, dout = arrays
    tables = [None if x is None else jnp.asarray(x, dtype) for x in (q, k, v, sinks, dout)]
    options = {**case.options(), "blocks": case.blocks, "interpret": True}

    @jax.jit
    def run(q, k, v, sinks, dout):
        arrays = q, k, v, q_segments, kv_segments, sinks
        out, lse = gpu.forward(*arrays, **options)
        return (out, lse) if forward_only else (out, lse, *gpu.backward(*arrays, out, lse, dout, **options))

    results = run(*tables)
    assert results[1].dtype == jnp.float32
    assert {x.dtype for i, x in enumerate(results) if i != 1 and x is not None} == {jnp.dtype(dtype)}
    return [None if x is None else np.asarray(x, np.float64) for x in results]


def assert_close(case, results, expected, dtype=jnp.float32):
    """Compare by the rounding of sums, the probabilities in `dtype`: eps times a term times the root of their number.

    Terms of a gradient are below 16 here; the factor 8 leaves room for the worst of many elements.
    """
    wide, eps = 8 * float(jnp.finfo(jnp.float32).eps), 8 * float(jnp.finfo(dtype).eps)
    rows = 4 * math.sqrt(max(case.s, case.t) * case.heads[0] / case.heads[1])
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, a, b in zip(names, results, expected, strict=False):
        if a is not None:
            atol = wide * 4 * math.sqrt(case.a) if name == "lse" else eps * (1 if name == "out" else rows)
            np.testing.assert_allclose(a, b, rtol=wide if name == "lse" else eps, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_formulas(name):
    case = CASES[name]
    arrays = inputs(case)
    assert_close(case, found(case, arrays), exact(case, *arrays))


def test_bfloat16_holds_the_probabilities_and_nothing_else():
    case = dataclasses.replace(CASES["everything"], s=40)
    arrays = inputs(case)
    rounded = [
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) if x is not None and x.dtype == np.float64 else x
        for x in arrays
    ]
    assert_close(case, found(case, rounded, jnp.bfloat16), exact(case, *rounded), jnp.bfloat16)


def test_a_query_that_sees_nothing_gives_zero():
    case = CASES["queries that see nothing"]
    out, lse, dq, *_ = found(case, inputs(case))
    blind = np.isneginf(lse[0, 0])
    assert blind[: case.s - case.t].all() and not blind.all()
    assert not out[0, blind].any() and not dq[0, blind].any()


# What could be wrong. Each must fail the comparison that the kernels pass.


@pytest.mark.parametrize(
    ("name", "wrong", "first"),
    [
        ("causal", "causal off by one", "out"),
        ("window and cap", "window off by one", "out"),
        ("more keys", "queries come first", "out"),
        ("default blocks", "heads interleaved", "out"),
        ("window and cap", "cap without derivative", "dq"),
        ("causal", "delta omitted", "dq"),
    ],
)
def test_wrong_formulas_are_rejected(name, wrong, first):
    case = CASES[name]
    arrays = inputs(case)
    with pytest.raises(AssertionError, match=first):
        assert_close(case, exact(case, *arrays, wrong=wrong), exact(case, *arrays))


_ordered = gpu_kernels._ordered


@pytest.mark.parametrize(
    ("name", "part", "broken"),
    [
        ("not causal", "_inside", lambda first, size, limit: None),
        ("causal", "_ordered", lambda first, whole, after, stop: _ordered(first, whole, after + 1, stop)),
    ],
)
def test_broken_kernels_are_rejected(name, part, broken, monkeypatch):
    case = CASES[name]
    arrays = inputs(case)
    monkeypatch.setattr(gpu_kernels, part, broken)
    with pytest.raises(AssertionError, match="out"):
        assert_close(case, found(case, arrays, forward_only=True), exact(case, *arrays))


def test_segments_of_blocks_that_were_skipped_matter(monkeypatch):
    """The range of blocks in which a segment occurs, one block short at its end."""
    case = CASES["default blocks"]
    case = dataclasses.replace(case, a=16, blocks=tiles(16, 16))
    arrays = inputs(case)
    original = gpu._segment_inputs

    def short(*a):
        values, specs = original(*a)
        return [*values[:3], jnp.maximum(values[3] - 1, values[2])], specs

    assert_close(case, found(case, arrays, forward_only=True), exact(case, *arrays))
    monkeypatch.setattr(gpu, "_segment_inputs", short)
    with pytest.raises(AssertionError, match="out"):
        assert_close(case, found(case, arrays, forward_only=True), exact(case, *arrays))


def test_documents_of_a_packed_row_do_not_walk_through_each_other():
    """Each block of 16 queries meets the blocks of its own documents only, also where causality would allow more."""
    ids = np.repeat(np.arange(4), 32)[None].astype(np.int32)
    (_, _, first_BX, stop_BX), _ = gpu._segment_inputs(ids, ids, 16, 16, {"own": None, "other": None, "limit": None})
    assert first_BX.tolist() == [[0, 0, 2, 2, 4, 4, 6, 6]]
    assert stop_BX.tolist() == [[2, 2, 4, 4, 6, 6, 8, 8]]
    foreign = np.full_like(ids, 7)
    (*_, stop_BX), _ = gpu._segment_inputs(ids, foreign, 16, 16, {"own": None, "other": None, "limit": None})
    assert not stop_BX.any()


@hypothesis.settings(deadline=None, max_examples=150, derandomize=True)
@hypothesis.given(
    s=st.integers(1, 40),
    t=st.integers(1, 40),
    queries=st.sampled_from([4, 8]),
    keys=st.sampled_from([4, 8]),
    window=st.one_of(st.none(), st.integers(1, 30)),
    causal=st.booleans(),
)
def test_ranges_leave_out_what_cannot_be_seen_and_mask_what_may_not(s, t, queries, keys, window, causal):
    window = window if causal else None
    case = gpu_kernels.Case(s, t, 16, 1, causal, window, None, 1.0)
    tile = gpu.Tile(queries, keys, 4, 2)
    at = np.arange(s)[:, None] + t - s
    visible_ST = np.ones((s, t), bool)
    if causal:
        visible_ST = np.arange(t)[None] <= at
    if window is not None:
        visible_ST &= np.arange(t)[None] > at - window
    for of, table, rows, columns, limit in (
        (gpu_kernels._keys_seen, visible_ST, queries, keys, t),
        (gpu_kernels._queries_seeing, visible_ST.T, keys, queries, s),
    ):
        for start in range(0, table.shape[0], rows):
            first, whole, after, stop = (int(x) for x in of(start, tile, case))
            for block in range(-(-limit // columns)):
                seen = table[start : start + rows, block * columns : (block + 1) * columns]
                assert first <= block < stop or not seen.any()
                # A block of which some is past the end is never taken as a whole.
                assert not whole <= block < after or (seen.all() and (block + 1) * columns <= limit)
            assert first >= 0 and stop <= -(-limit // columns)
            assert first <= whole <= after <= stop or first >= stop


def test_what_the_kernels_cannot_serve_is_said_in_one_line():
    options = Options(causal=True, window=None, softcap=None, scale=1.0)
    q, k = jnp.zeros((1, 4, 2, 8), jnp.bfloat16), jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    assert gpu.supports(q, k, options) is None
    wide = jnp.zeros((1, 4, 2, 264), jnp.bfloat16)
    bad = (q, k.astype(jnp.float32)), (q.astype(jnp.int8), k.astype(jnp.int8)), (wide, wide), (q[:, :0], k)
    for pair in bad:
        assert "\n" not in gpu.supports(*pair, options)
