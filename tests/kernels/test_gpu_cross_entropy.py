"""The cross-entropy's GPU kernels, interpreted on a CPU, against float64 formulas; broken copies of them rejected."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import gpu

SMALL = gpu.Tile(tokens=16, columns=32, depth=16, warps=4, stages=2)
RAGGED = gpu.Blocks(SMALL, SMALL, splits=3, chunk=96)
# A chunk that ends within a tile, whose other columns belong to the next chunk.
UNEVEN = dataclasses.replace(RAGGED, chunk=80)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, options and blocks of one call."""

    n: int
    d: int
    v: int
    softcap: float | None = None
    bias: bool = False
    blocks: gpu.Blocks | None = None


CASES = {
    "one of each": Case(1, 1, 1),
    "defaults": Case(130, 200, 300, softcap=3.0),
    "everything ragged": Case(37, 40, 301, softcap=5.0, bias=True, blocks=RAGGED),
    "uneven chunks": Case(21, 16, 250, bias=True, blocks=UNEVEN),
    "everything even": Case(32, 32, 192, blocks=RAGGED),
    "more splits than columns": Case(5, 24, 33, softcap=2.0, blocks=dataclasses.replace(RAGGED, splits=7)),
}


def inputs(case, seed=0):
    """Return float64 arrays; logits have a deviation near 2, some tokens are ignored, some targets lie outside."""
    random = np.random.RandomState(seed)
    e_ND, c_VD = random.randn(case.n, case.d), 2 * random.randn(case.v, case.d) / math.sqrt(case.d)
    bias_V = random.randn(case.v) if case.bias else None
    targets_N = random.randint(0, case.v, case.n)
    soft_N, hot_N = random.randn(2, case.n)
    if case.n > 4:
        targets_N[1], targets_N[2] = -1, case.v  # ignored; the target of another device's part of the vocabulary
        soft_N[1] = hot_N[1] = 0.0
        targets_N[3] = case.v - 1
    return e_ND, c_VD, bias_V, targets_N.astype(np.int32), soft_N, hot_N


def exact(case, e_ND, c_VD, bias_V, targets_N, soft_N, hot_N, derivative_of_cap=True, ignores_soft=False):
    """Return (lse_N, picked_N, de_ND, dc_VD, dbias_V) by the formulas, in float64."""
    logits_NV = e_ND @ c_VD.T + (0.0 if bias_V is None else bias_V[None])
    if case.softcap:
        logits_NV = case.softcap * np.tanh(logits_NV / case.softcap)
    max_N1 = logits_NV.max(axis=1, keepdims=True)
    lse_N = np.log(np.exp(logits_NV - max_N1).sum(axis=1)) + max_N1[:, 0]
    hit_NV = targets_N[:, None] == np.arange(case.v)[None]
    softmax_NV = np.exp(logits_NV - lse_N[:, None])
    d_NV = softmax_NV * (hot_N if ignores_soft else soft_N)[:, None] - hit_NV * hot_N[:, None]
    if case.softcap and derivative_of_cap:
        d_NV *= 1 - (logits_NV / case.softcap) ** 2
    return lse_N, np.where(hit_NV, logits_NV, 0.0).sum(axis=1), d_NV @ c_VD, d_NV.T @ e_ND, d_NV.sum(axis=0)


def found_forward(case, arrays, dtype=jnp.float32):
    """Return (lse_N, picked_N) of the kernel, as float64."""
    tables = [None if x is None else jnp.asarray(x, dtype) for x in arrays[:3]]
    options = {"softcap": case.softcap, "blocks": case.blocks, "interpret": True}
    results = jax.jit(lambda tables, targets_N: gpu.forward(*tables, targets_N, **options))(tables, arrays[3])
    assert results[0].dtype == results[1].dtype == jnp.float32
    return [np.asarray(x, np.float64) for x in results]


def found_backward(case, arrays, dtype=jnp.float32, **options):
    """Return (de_ND, dc_VD, dbias_V or None) of the kernels for the exact lse_N, as float64."""
    tables = [None if x is None else jnp.asarray(x, dtype) for x in arrays[:3]]
    rounded = [None if x is None else np.asarray(x, np.float64) for x in tables]
    rows = [jnp.asarray(x, jnp.float32) for x in (exact(case, *rounded, *arrays[3:])[0], *arrays[4:])]
    options |= {"softcap": case.softcap, "blocks": case.blocks, "interpret": True}
    grads = jax.jit(lambda tables, *rows: gpu.backward(*tables, *rows, **options))(tables, arrays[3], *rows)
    assert all(x is None or x.dtype == dtype for x in grads)
    return [None if x is None else np.asarray(x, np.float64) for x in grads]


def found(case, arrays, dtype=jnp.float32, **options):
    """Return what `exact` does from the kernels."""
    return found_forward(case, arrays, dtype) + found_backward(case, arrays, dtype, **options)


def assert_close(case, results, expected, dtype=jnp.float32):
    """Compare by the rounding of sums: eps times the size of a term (about 4) times the root of their number.

    A logit sums D products in float32, so that every result has that error too; gradients are rounded to `dtype` in
    each term. The factor 8 leaves room for the worst of many elements.
    """
    wide, eps = 8 * float(jnp.finfo(jnp.float32).eps), 8 * float(jnp.finfo(dtype).eps)
    logit = wide * 4 * math.sqrt(case.d)
    tokens, columns = logit * case.n + 4 * eps * math.sqrt(case.n), logit + 4 * eps * math.sqrt(case.d)
    names = ("lse_N", "picked_N", "de_ND", "dc_VD", "dbias_V")
    for name, a, b, atol in zip(names, results, expected, (logit, logit, columns, tokens, tokens), strict=False):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=wide if name.endswith("_N") else eps, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_formulas(name):
    case = CASES[name]
    arrays = inputs(case)
    assert_close(case, found(case, arrays), exact(case, *arrays))


def test_bfloat16_is_rounded_only_where_it_is_stored():
    case = CASES["defaults"]
    arrays = inputs(case)
    rounded = [None if x is None else np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:3]]
    assert_close(case, found(case, arrays, jnp.bfloat16), exact(case, *rounded, *arrays[3:]), jnp.bfloat16)


def test_rows_with_a_bias_of_minus_infinity_do_not_count(monkeypatch):
    """So are vocabularies padded that are cut over devices; here whole tiles, and a whole split, are padding."""
    case = Case(20, 16, 200, bias=True, blocks=RAGGED)
    e_ND, c_VD, bias_V, targets_N, soft_N, hot_N = inputs(case)
    targets_N = targets_N % 100
    bias_V[100:] = -np.inf
    arrays = e_ND, c_VD, bias_V, targets_N, soft_N, hot_N
    results = found(case, arrays)
    assert_close(case, results, exact(case, *arrays))
    assert not results[3][100:].any()
    monkeypatch.setattr(gpu, "_finite", lambda max_T: max_T)
    with pytest.raises(AssertionError, match="lse_N"):
        assert_close(case, found_forward(case, arrays), exact(case, *arrays))


def test_where_all_rows_are_padding_nothing_is_nan():
    case = Case(3, 16, 40, bias=True, blocks=RAGGED)
    e_ND, c_VD, bias_V, targets_N, *_ = inputs(case)
    tables = (
        jnp.asarray(e_ND, jnp.float32),
        jnp.asarray(c_VD, jnp.float32),
        jnp.full_like(bias_V, -jnp.inf, jnp.float32),
    )
    lse_N, _ = gpu.forward(*tables, jnp.full_like(targets_N, 40), blocks=RAGGED, interpret=True)
    assert (np.asarray(lse_N) == -np.inf).all()


# What could be wrong. Each must fail the comparison that the kernels pass.


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("everything ragged", {"derivative_of_cap": False}),
        ("everything even", {"ignores_soft": True}),
    ],
)
def test_wrong_formulas_are_rejected(name, wrong):
    case = CASES[name]
    arrays = inputs(case)
    with pytest.raises(AssertionError, match="de_ND"):
        assert_close(case, exact(case, *arrays, **wrong), exact(case, *arrays))


@pytest.mark.parametrize(
    ("name", "part", "broken"),
    [
        ("everything ragged", "_inside", lambda first, size, limit: None),
        ("everything ragged", "_both", lambda rows_in, columns_in: rows_in if rows_in is None else rows_in[:, None]),
        ("everything ragged", "_capped", lambda x, softcap: jnp.clip(x, -softcap, softcap)),
    ],
)
def test_broken_kernels_are_rejected(name, part, broken, monkeypatch):
    case = CASES[name]
    arrays = inputs(case)
    monkeypatch.setattr(gpu, part, broken)
    with pytest.raises(AssertionError, match="lse_N"):
        assert_close(case, found_forward(case, arrays), exact(case, *arrays))


def test_columns_of_a_later_chunk_are_not_those_of_the_first(monkeypatch):
    """Without the chunk's start, targets and rows of the classifier are those of the first chunk."""
    case = CASES["uneven chunks"]
    arrays = inputs(case)
    original = gpu._dlogits
    monkeypatch.setattr(gpu, "_dlogits", lambda *a, **options: original(*a[:-1], jnp.int32(0), **options))
    found_grads, expected = found_backward(case, arrays), exact(case, *arrays)
    with pytest.raises(AssertionError, match="de_ND"):
        assert_close(case, [*expected[:2], *found_grads], expected)


def hot_columns(every):
    """Tokens whose probability sits in 16 of 512 columns, targets among them: every `every`-th, or side by side."""
    case = Case(64, 32, 512, blocks=gpu.Blocks(SMALL, SMALL, splits=2, chunk=64))
    random = np.random.RandomState(0)
    base_D = random.randn(case.d)
    c_VD = 0.01 * random.randn(case.v, case.d)
    hot = np.arange(16) * every
    c_VD[hot] = 20 * base_D / np.square(base_D).sum() + 0.3 * random.randn(16, case.d)
    e_ND = base_D + 0.01 * random.randn(case.n, case.d)
    soft_N = hot_N = np.full(case.n, 1e-6)  # far below any threshold: the test comes before the upstream gradient
    return case, (e_ND, c_VD, None, hot[random.randint(0, 16, case.n)].astype(np.int32), soft_N, hot_N)


@pytest.mark.parametrize(("every", "chunks_kept"), [(1, 1), (32, 8)])
def test_the_filter_drops_what_is_small_before_the_upstream_gradient(every, chunks_kept):
    case, arrays = hot_columns(every)
    eps = 2.0**-12
    de_ND, dc_VD, _ = found_backward(case, arrays, filter_eps=eps)
    _, _, whole_de_ND, whole_dc_VD, _ = exact(case, *arrays)
    kept = [dc_VD[start : start + 64].any() for start in range(0, case.v, 64)]
    assert sum(kept) == chunks_kept
    # What a token loses is at most soft * eps * |row of the classifier| for each row in a tile that was dropped.
    row = np.linalg.norm(arrays[1], axis=1)
    lost = 1e-6 * eps * np.sort(row)[: case.v - 16].sum()
    assert np.linalg.norm(de_ND - whole_de_ND, axis=1).max() <= lost + 1e-5 * np.abs(whole_de_ND).max()
    assert np.abs(dc_VD - whole_dc_VD)[dc_VD.any(axis=1)].max() <= 1e-5 * np.abs(whole_dc_VD).max()


def test_a_threshold_that_nothing_reaches_drops_everything():
    case, arrays = hot_columns(1)
    de_ND, dc_VD, _ = found_backward(case, arrays, filter_eps=2.0)
    assert not de_ND.any() and not dc_VD.any()


def test_a_tile_that_holds_a_target_is_kept():
    """|softmax - onehot| is near 1 there although no probability is above the threshold."""
    case = Case(16, 16, 64, blocks=RAGGED)
    targets_N = np.full(16, 40, np.int32)
    ones_N = np.ones(16)
    arrays = np.zeros((16, 16)) + 1e-3, np.random.RandomState(0).randn(64, 16), None, targets_N, ones_N, ones_N
    _, dc_VD, _ = found_backward(case, arrays, filter_eps=0.5)
    assert dc_VD[32:].any() and not dc_VD[:32].any()


def test_ignored_tokens_do_not_keep_a_tile():
    case, (e_ND, c_VD, bias_V, targets_N, _, _) = hot_columns(1)
    zero_N = np.zeros(case.n)
    tables = [jnp.asarray(x, jnp.float32) for x in (e_ND, c_VD)]
    targets_N, zero_N = jnp.full_like(targets_N, -1), jnp.asarray(zero_N, jnp.float32)
    options = {"width": 64, "softcap": None, "tile": SMALL, "interpret": True}
    lse_N, _ = gpu.forward(*tables, bias_V, targets_N, blocks=case.blocks, interpret=True)
    for soft_N, kept in ((zero_N, False), (zero_N.at[3].set(1.0), True)):
        found_N = gpu._dlogits(
            *tables, bias_V, targets_N, lse_N, soft_N, zero_N, jnp.int32(0), filter_eps=2.0**-12, **options
        )
        assert bool(found_N[1]) is kept


def test_summing_over_chunks_in_float32_is_the_more_exact():
    case = Case(16, 32, 2048, blocks=dataclasses.replace(RAGGED, chunk=32))
    arrays = inputs(case)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:2]]
    expected_ND = exact(case, *rounded, *arrays[2:])[2]
    error = {
        how: np.abs(found_backward(case, arrays, jnp.bfloat16, accumulate=how)[0] - expected_ND).mean()
        for how in ("float32", "input")
    }
    assert 2 * error["float32"] < error["input"] < 0.1 * np.abs(expected_ND).mean()


def sizes(jaxpr):
    """Yield the number of elements of everything that a program computes, loops and branches included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(x.aval.shape) for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for parameter in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                yield from sizes(inner) if hasattr(inner, "eqns") else ()


def test_the_logits_of_the_whole_vocabulary_never_exist():
    n, d, v = 8192, 64, 32768
    shapes = [jax.ShapeDtypeStruct(*x) for x in (((n, d), jnp.bfloat16), ((v, d), jnp.bfloat16), ((n,), jnp.int32))]
    row = jax.ShapeDtypeStruct((n,), jnp.float32)
    forward = jax.make_jaxpr(lambda e, c, t: gpu.forward(e, c, None, t))(*shapes)
    backward = jax.make_jaxpr(lambda e, c, t, r: gpu.backward(e, c, None, t, r, r, r, filter_eps=2e-4))(*shapes, row)
    assert max(sizes(forward.jaxpr)) < n * v / 100
    largest = max(sizes(backward.jaxpr))
    assert largest == gpu.CHUNK_BYTES // 2  # the gradient of one chunk's logits, found inside the loop
    assert largest < n * v / 10


def test_what_the_kernels_cannot_serve_is_said_in_one_line():
    e_ND, c_VD = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((9, 8), jnp.bfloat16)
    assert gpu.supports(e_ND, c_VD) is None
    for bad in ((e_ND, c_VD.astype(jnp.float32)), (e_ND.astype(jnp.int8), c_VD.astype(jnp.int8)), (e_ND[:0], c_VD)):
        assert "\n" not in gpu.supports(*bad)
