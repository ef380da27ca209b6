"""Every implementation of attention against float64 NumPy, forward and gradients, and wrong formulas rejected."""

import dataclasses
import functools
from typing import get_args

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case

from kernels import backends
from kernels.attention import api

IMPLEMENTATIONS = get_args(api.Implementation)
# Interpreting a kernel takes seconds. What follows from agreement with float64 is checked on them by CI only; those for
# GPUs have quick tests of their own.
PLAIN = [pytest.param(name, marks=pytest.mark.slow if name in backends.PLATFORMS else ()) for name in IMPLEMENTATIONS]
QUICK = [pytest.param(name, marks=pytest.mark.slow if name == "gpu" else ()) for name in IMPLEMENTATIONS]
EPS = float(jnp.finfo(jnp.float32).eps)
CASES = {
    "one token": Case(1, 1, 1, 1, 1, 16),
    "one token of a long row": Case(1, 1, 33, 3, 1, 24, sinks=True),
    "one kv head": Case(2, 7, 7, 3, 1, 24, segments=True),
    "everything": Case(2, 33, 33, 3, 3, 64, window=5, softcap=2.0, scale=0.3, segments=True, sinks=True),
    "long and odd, groups side by side": Case(1, 261, 261, 4, 2, 64),
    "capped, packed, wide heads": Case(1, 261, 261, 2, 1, 80, softcap=2.0, segments=True),
    "the last of many": Case(1, 7, 261, 3, 3, 128, window=5, sinks=True),
    "more queries than keys": Case(1, 33, 7, 2, 1, 16),
    "both ways": Case(1, 33, 261, 2, 2, 16, causal=False, segments=True),
    "window of one": Case(1, 33, 33, 2, 2, 16, window=1),
    "widest heads, window beyond all": Case(1, 33, 33, 2, 1, 256, window=40, softcap=5.0),
    "queries that see nothing": Case(2, 33, 33, 2, 2, 16, foreign=True),
    "queries that see a sink only": Case(2, 33, 33, 2, 2, 16, foreign=True, sinks=True),
}


@functools.cache
def compiled(implementation, case):
    """Return the jitted function of arrays to (out, gradients); it is shared by all inputs of one case."""

    @jax.jit
    def both(arrays, dout, segments):
        def call(q, k, v, sinks):
            return api.attention(
                q, k, v, segment_ids=segments, sinks_H=sinks, implementation=implementation, **case.options()
            )

        out, pull = jax.vjp(call, *arrays)
        return dict(zip(("out", "dq", "dk", "dv", "dsinks"), (out, *pull(dout)), strict=True))

    return both


def run(implementation, case, x, dtype=jnp.float32):
    """Return out and gradients by name, in the order and precision that they come in."""
    sinks = None if x.sinks is None else jnp.asarray(x.sinks, jnp.promote_types(dtype, jnp.float32))
    arrays = (*(jnp.asarray(y, dtype) for y in (x.q, x.k, x.v)), sinks)
    found = compiled(implementation, case)(arrays, jnp.asarray(x.dout, dtype), x.segment_ids())
    return {name: np.asarray(y) for name, y in found.items() if y is not None}


@functools.cache
def expected(case):
    found = oracle.attention(case, oracle.inputs(case))
    return {name: y for name, y in found.items() if name != "lse"}


@pytest.mark.parametrize("implementation", QUICK)
class TestAgainstFloat64:
    @pytest.mark.parametrize("name", CASES)
    def test_values_and_gradients_are_those_of_float64(self, implementation, name):
        case = CASES[name]
        oracle.assert_close(run(implementation, case, oracle.inputs(case)), expected(case), case, EPS)

    def test_bfloat16_inputs_keep_float32_scores(self, implementation):
        case = Case(1, 133, 133, 4, 2, 80, softcap=5.0, sinks=True)
        x = oracle.inputs(case)
        rounded = {name: np.asarray(jnp.asarray(getattr(x, name), jnp.bfloat16), np.float64) for name in "qkv"}
        rounded["dout"] = np.asarray(jnp.asarray(x.dout, jnp.bfloat16), np.float64)
        x = dataclasses.replace(x, **rounded)
        found = run(implementation, case, x, jnp.bfloat16)
        assert {y.dtype for name, y in found.items() if name != "dsinks"} == {jnp.bfloat16.dtype}
        want = oracle.attention(case, x)
        # Probabilities, their gradients and the result are rounded once each; a score in bfloat16 would be off by
        # eps times its size, near 3, and every probability with it.
        eps = float(jnp.finfo(jnp.bfloat16).eps)
        for name, y in found.items():
            error = np.abs(y.astype(np.float64) - want[name])
            assert np.sqrt(np.mean(error**2)) < eps * np.sqrt(np.mean(want[name] ** 2)), name
            assert error.max() < 4 * eps * np.abs(want[name]).max(), name


@pytest.mark.parametrize("implementation", PLAIN)
class TestProperties:
    def test_later_foreign_and_forgotten_tokens_have_no_influence_at_all(self, implementation):
        case = Case(1, 33, 33, 2, 1, 16, window=8)
        x = oracle.inputs(case)
        segments = (np.arange(33)[None] // 11).astype(np.int32)
        x = dataclasses.replace(x, q_segments=segments, kv_segments=segments)
        k, v = x.k.copy(), x.v.copy()
        for y in (k, v):
            y[:, 20:] += 100.0  # later, and the next document
            y[:, :11] -= 100.0  # the document before
            y[:, 11:12] *= -100.0  # before the window of queries from 19 on
        before = run(implementation, case, x)["out"]
        after = run(implementation, case, dataclasses.replace(x, k=k, v=v))["out"]
        np.testing.assert_array_equal(before[:, 19:20], after[:, 19:20])
        assert (before[:, 20:22] != after[:, 20:22]).any()
        assert (before[:, 18] != after[:, 18]).any()

    def test_packed_documents_are_as_if_alone(self, implementation):
        case = Case(1, 30, 30, 2, 1, 16, sinks=True)
        x = oracle.inputs(case)
        segments = (np.arange(30)[None] >= 15).astype(np.int32)
        packed = run(implementation, case, dataclasses.replace(x, q_segments=segments, kv_segments=segments))
        for part in (slice(0, 15), slice(15, 30)):
            cut = {name: getattr(x, name)[:, part] for name in ("q", "k", "v", "dout")}
            alone = run(implementation, case, dataclasses.replace(x, **cut))
            for name in ("out", "dq", "dk", "dv"):
                np.testing.assert_allclose(packed[name][:, part], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)

    def test_a_sink_far_below_is_none_and_one_far_above_takes_all(self, implementation):
        case = Case(1, 7, 7, 2, 1, 16)
        x = oracle.inputs(case)
        plain = run(implementation, case, x)
        none = run(implementation, case, dataclasses.replace(x, sinks=np.full(2, -1e4)))
        for name, y in plain.items():
            np.testing.assert_allclose(none[name], y, rtol=1e-6, atol=1e-6, err_msg=name)
        everything = run(implementation, case, dataclasses.replace(x, sinks=np.full(2, 1e4)))
        assert all((y == 0).all() for y in everything.values())

    def test_keys_in_another_order_give_the_same(self, implementation):
        case = Case(1, 7, 33, 2, 1, 16, causal=False)
        x = oracle.inputs(case)
        order = np.random.RandomState(1).permutation(33)
        shuffled = run(implementation, case, dataclasses.replace(x, k=x.k[:, order], v=x.v[:, order]))
        for name, y in run(implementation, case, x).items():
            y = y[:, order] if name in ("dk", "dv") else y
            np.testing.assert_allclose(shuffled[name], y, rtol=1e-5, atol=1e-5, err_msg=name)

    def test_scores_far_apart_stay_finite(self, implementation):
        case = Case(2, 7, 7, 2, 2, 16, segments=True)
        x = oracle.inputs(case)
        found = run(implementation, case, dataclasses.replace(x, q=1e3 * x.q, k=1e3 * x.k))
        assert all(np.isfinite(y).all() for y in found.values())


@pytest.mark.parametrize("mistake", oracle.MISTAKES)
def test_mistakes_are_rejected(mistake):
    case = oracle.MISTAKES[mistake]
    x = oracle.inputs(case)
    right = oracle.attention(case, x)
    oracle.assert_close(right, right, case, EPS)
    with pytest.raises(AssertionError):
        oracle.assert_close(oracle.attention(case, x, mistake), right, case, EPS)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_in_float64_only_float64_rounding_is_left(implementation):
    case = CASES["everything"]
    with jax.enable_x64(True):
        found = run(implementation, case, oracle.inputs(case), jnp.float64)
    oracle.assert_close(found, expected(case), case, float(jnp.finfo(jnp.float64).eps))


def test_the_reference_has_second_derivatives():
    case = Case(1, 5, 5, 2, 1, 4, softcap=2.0, sinks=True)
    x = oracle.inputs(case)

    def loss(scale_of_q):
        return jnp.sum(jnp.sin(api.attention(scale_of_q * x.q, x.k, x.v, implementation="reference")))

    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(loss))
        slopes = [slope(jnp.float64(1.0 + d)) for d in (-1e-4, 1e-4)]
        second = jax.jit(jax.grad(jax.grad(loss)))(jnp.float64(1.0))
    assert float(second) == pytest.approx(float(slopes[1] - slopes[0]) / 2e-4, rel=1e-6)


def shapes(case, dtype=jnp.float32):
    q = jax.ShapeDtypeStruct((case.b, case.s, case.h, case.a), dtype)
    k = jax.ShapeDtypeStruct((case.b, case.t, case.k, case.a), dtype)
    return q, k, k


def temporary_bytes(case, **options):
    def loss(q, k, v):
        return jnp.sum(api.attention(q, k, v, **options))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes(case)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_table_of_scores_never_exists_whole():
    case = Case(1, 8192, 8192, 1, 1, 16)
    # The reference holds five tables at once; of 16 blocks XLA's CPU compiler keeps those of several alive together.
    whole, cut = (temporary_bytes(case, implementation=name) for name in ("reference", "chunked"))
    assert whole > 4 * case.s * case.t
    assert cut < whole / 2


def exponentials(case, **options):
    """Return how many scores the traced forward pass of the chunked form exponentiates."""
    jaxpr = jax.make_jaxpr(lambda *x: api.attention(*x, implementation="chunked", **options))(*shapes(case))
    return _score_elements(jaxpr.jaxpr)


def _score_elements(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "exp" and equation.outvars[0].aval.ndim == 4:
            total += equation.outvars[0].aval.size
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                total += _score_elements(inner) if hasattr(inner, "eqns") else 0
    return total


def test_keys_outside_the_window_are_not_touched():
    case = Case(1, 512, 512, 1, 1, 16)
    assert exponentials(case) == 512 * 512 * 5 / 8
    # Blocks of 32 queries and a window of 32: 63 keys each, 32 for the first.
    assert exponentials(case, window=32) == 15 * 32 * 63 + 32 * 32


class TestTheCall:
    def test_cpu_is_served_by_the_chunked_form(self):
        q, k, _ = shapes(Case(1, 8, 8, 1, 1, 16))
        options = api.Options(causal=True, window=None, softcap=None, scale=1.0)
        assert api.choose(q, k, options) == "chunked"
        for name in IMPLEMENTATIONS:
            assert api.choose(q, k, options, name) == name

    def test_a_device_s_kernel_is_chosen_where_it_serves(self, monkeypatch):
        q, k, _ = shapes(Case(1, 8, 8, 1, 1, 16))
        wide = jax.ShapeDtypeStruct(q.shape, jnp.float16)
        options = api.Options(causal=True, window=None, softcap=None, scale=1.0)
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        # Of the eight devices here each has its own part inside shard_map only.
        assert api.choose(q, k, options) == "chunked"
        chosen = []

        def part(x):
            chosen.append(api.choose(q, k, options))
            return x

        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        spec = jax.sharding.PartitionSpec("data")
        jax.eval_shape(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec), jnp.zeros(8))
        assert set(chosen) == {"tpu"}
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        assert api.choose(q, k, options) == "tpu"
        assert api.choose(wide, wide, options) == "chunked"
        with pytest.raises(ValueError, match="'tpu' cannot serve this call: queries are float16"):
            api.choose(wide, wide, options, "tpu")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": np.zeros((1, 5, 2, 4)), "v": np.zeros((1, 5, 2, 4))}, "3 query heads are not a multiple of 2"),
            ({"v": np.zeros((1, 4, 1, 4))}, "shapes do not fit"),
            ({"k": np.zeros((1, 5, 1, 3)), "v": np.zeros((1, 5, 1, 3))}, "shapes do not fit"),
            ({"segment_ids": np.zeros((1, 3), int)}, r"where S and T differ, give a pair"),
            ({"segment_ids": (np.zeros((1, 3), int), None)}, "both of the pair"),
            ({"sinks_H": np.zeros(2)}, "not one for each of 3"),
            ({"window": 0}, "window 0"),
            ({"window": 2, "causal": False}, "needs causal"),
            ({"softcap": 0.0}, "softcap must be positive"),
            (
                {"implementation": "flash"},
                "attention has no implementation 'flash'; choose from reference, chunked, tpu, gpu",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_in_one_line(self, change, message):
        given = {"q": np.zeros((1, 3, 3, 4)), "k": np.zeros((1, 5, 1, 4)), "v": np.zeros((1, 5, 1, 4))} | change
        arrays = [jnp.asarray(given.pop(n), jnp.float32) for n in "qkv"]
        with pytest.raises(ValueError, match=message) as caught:
            api.attention(*arrays, **given)
        assert "\n" not in str(caught.value)
