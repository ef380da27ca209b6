"""Every implementation of the cross-entropy against float64 autodiff of the reference, and wrong formulas rejected."""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import backends
from kernels.cross_entropy import api, reference

IMPLEMENTATIONS = typing.get_args(api.Implementation)
# What follows from agreement with float64 is asked of interpreted kernels by CI only: they take seconds.
PLAIN = [pytest.param(x, marks=pytest.mark.slow if x in backends.PLATFORMS else ()) for x in IMPLEMENTATIONS]
IGNORE = -100
D = 13
# (tokens, vocabulary, softcap, bias): ragged everywhere, one token, fewer rows than a tile, a real vocabulary.
CASES = {
    "one token": (1, 5, None, False),
    "fewer tokens than rows": (7, 260, None, True),
    "capped": (513, 500, 3.0, True),
    "a row short of a block": (130, 8191, 3.0, False),
    "the vocabulary of GPT-2": (3, 50257, None, False),
}


def inputs(n, v, bias=False, d=D, seed=0, ignored=0.2):
    """Return float64 e_ND, c_VD, bias_V or None and int32 targets_N; logits have a deviation near 2."""
    random = np.random.RandomState(seed)
    e_ND, c_VD = random.randn(n, d), 2 * random.randn(v, d) / math.sqrt(d)
    bias_V = random.randn(v) if bias else None
    targets_N = random.randint(0, v, n)
    targets_N[random.rand(n) < ignored] = IGNORE
    targets_N[0] = v - 1
    return e_ND, c_VD, bias_V, targets_N.astype(np.int32)


def upstream(n):
    return np.random.RandomState(1).randn(2, n)


def losses_and_gradients(losses, e_ND, c_VD, bias_V, targets_N, dtype, **options):
    """Return (nll_N, lse_N, de_ND, dc_VD[, dbias_V]) as float64, the gradients for one random upstream of both."""
    tables = [jnp.asarray(x, dtype) for x in (e_ND, c_VD, bias_V) if x is not None]
    up_2N = jnp.asarray(upstream(len(targets_N)), jnp.promote_types(dtype, jnp.float32))

    def total(tables):
        bias_V = tables[2] if len(tables) == 3 else None
        nll_N, lse_N = losses(tables[0], tables[1], targets_N, bias_V=bias_V, **options)
        return jnp.sum(up_2N[0] * nll_N) + jnp.sum(up_2N[1] * lse_N), (nll_N, lse_N)

    grads, values = jax.jit(jax.grad(total, has_aux=True))(tables)
    return [np.asarray(x, np.float64) for x in (*values, *grads)]


def per_token(implementation, **more):
    return functools.partial(
        api.linear_cross_entropy, reduction="none", return_lse=True, implementation=implementation, **more
    )


@functools.cache
def exact(case, rounded_to=None):
    """Return float64 values from autodiff of the reference; of inputs first rounded to a dtype, if one is given."""
    n, v, softcap, bias = CASES[case]
    *tables, targets_N = inputs(n, v, bias)
    if rounded_to is not None:
        tables = [None if x is None else np.asarray(jnp.asarray(x, rounded_to), np.float64) for x in tables]
    with jax.enable_x64(True):
        return losses_and_gradients(per_token("reference"), *tables, targets_N, jnp.float64, softcap=softcap)


def tolerances(n, v, dtype):
    """Return the error allowed in nll, lse, de, dc, dbias: eps times the size of a term and the root of their number.

    A logit is a sum of D products of size about 1, summed in float32 at least; a gradient is a sum over rows or tokens
    of terms below 4, each rounded to `dtype`. The factor 8 leaves room for the worst of many elements.
    """
    wide = 8 * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    eps = 8 * float(jnp.finfo(dtype).eps)
    logit = wide * 4 * math.sqrt(D)
    return [logit, logit, 2 * eps * math.sqrt(D), 2 * eps * math.sqrt(n), 2 * eps * math.sqrt(n)]


def assert_exact(found, expected, n, v, dtype):
    names = ("nll_N", "lse_N", "de_ND", "dc_VD", "dbias_V")
    for name, a, b, tolerance in zip(names, found, expected, tolerances(n, v, dtype), strict=False):
        rtol = 8 * float(jnp.finfo(jnp.float32 if name.endswith("_N") else dtype).eps)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestAgainstFloat64:
    @pytest.mark.parametrize("case", CASES)
    def test_losses_and_gradients_are_those_of_float64(self, implementation, case):
        n, v, softcap, bias = CASES[case]
        found = losses_and_gradients(per_token(implementation), *inputs(n, v, bias), jnp.float32, softcap=softcap)
        assert_exact(found, exact(case), n, v, jnp.float32)

    def test_bfloat16_inputs_give_float32_losses_and_bfloat16_gradients(self, implementation):
        case = "capped"
        n, v, softcap, bias = CASES[case]
        *tables, targets_N = inputs(n, v, bias)
        call = per_token(implementation, softcap=softcap)
        tables = [jnp.asarray(x, jnp.bfloat16) for x in tables]
        nll_N, lse_N = jax.eval_shape(lambda e, c, b: call(e, c, targets_N, bias_V=b), *tables)
        assert nll_N.dtype == lse_N.dtype == jnp.float32
        grads = jax.eval_shape(jax.grad(lambda x: jnp.sum(call(x[0], x[1], targets_N, bias_V=x[2])[0])), tables)
        assert {x.dtype for x in grads} == {jnp.dtype(jnp.bfloat16)}
        found = losses_and_gradients(call, *tables, targets_N, jnp.bfloat16)
        assert_exact(found, exact(case, "bfloat16"), n, v, jnp.bfloat16)

    def test_ignored_tokens_give_zero_and_zero_gradients(self, implementation):
        e_ND, c_VD, bias_V, targets_N = inputs(7, 5, True)
        none_N = np.full_like(targets_N, IGNORE)
        found = losses_and_gradients(per_token(implementation), e_ND, c_VD, bias_V, none_N, jnp.float32)
        assert all((x == 0).all() for x in found)
        for reduction in ("mean", "sum"):
            loss, grads = jax.value_and_grad(
                lambda e_ND, reduction=reduction: api.linear_cross_entropy(
                    e_ND, jnp.asarray(c_VD, jnp.float32), none_N, reduction=reduction, implementation=implementation
                )
            )(jnp.asarray(e_ND, jnp.float32))
            assert loss == 0
            assert not np.asarray(grads).any()
        nll_N, lse_N, de_ND, *_ = losses_and_gradients(
            per_token(implementation), e_ND, c_VD, bias_V, targets_N, jnp.float32
        )
        for x in (nll_N == 0, lse_N == 0, (de_ND == 0).all(axis=1)):
            assert (x == (targets_N == IGNORE)).all()


@pytest.mark.parametrize("implementation", PLAIN)
class TestProperties:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("return_lse", [False, True])
    def test_reductions_are_those_of_the_losses(self, implementation, reduction, return_lse):
        n, v, softcap, _ = CASES["capped"]
        e_ND, c_VD, _, targets_N = inputs(n, v)
        tables = jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32)

        def loss(tables, implementation, reduction, return_lse):
            found = api.linear_cross_entropy(
                *tables,
                targets_N,
                softcap=softcap,
                reduction=reduction,
                return_lse=return_lse,
                implementation=implementation,
            )
            return found[0] if return_lse else found

        found = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2, 3))(
            tables, implementation, reduction, return_lse
        )

        def by_hand(tables):
            nll_N = reference.token_losses(
                *tables, None, jnp.where(targets_N == IGNORE, -1, targets_N), softcap=softcap
            )[0]
            return jnp.sum(nll_N) / (np.sum(targets_N != IGNORE) if reduction == "mean" else 1)

        want = jax.value_and_grad(by_hand)(tables)
        scale = 1 if reduction == "sum" else 1 / n
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=scale * tolerances(n, v, jnp.float32)[3])

    def test_another_ignore_index_is_obeyed(self, implementation):
        e_ND, c_VD, _, targets_N = inputs(9, 5)
        renamed_N = np.where(targets_N == IGNORE, -1, targets_N)
        call = per_token(implementation)
        found = losses_and_gradients(call, e_ND, c_VD, None, renamed_N, jnp.float32, ignore_index=-1)
        for a, b in zip(found, losses_and_gradients(call, e_ND, c_VD, None, targets_N, jnp.float32), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_impossible_targets_give_nan(self, implementation):
        e_ND, c_VD, _, targets_N = inputs(9, 5, ignored=0)
        targets_N[3], targets_N[5] = 5, -7
        nll_N, _ = per_token(implementation)(jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32), targets_N)
        assert np.isnan(nll_N).nonzero()[0].tolist() == [3, 5]

    def test_large_logits_do_not_overflow(self, implementation):
        e_ND, c_VD, _, targets_N = inputs(7, 260)
        found = losses_and_gradients(per_token(implementation), 1e3 * e_ND, c_VD, None, targets_N, jnp.float32)
        assert all(np.isfinite(x).all() for x in found)

    def test_one_vector_added_to_all_rows_changes_nothing(self, implementation):
        """The rows of the gradient of the logits sum to 0: wrong signs, one-hots and padding break this."""
        e_ND, c_VD, _, targets_N = inputs(130, 500)
        call = functools.partial(api.linear_cross_entropy, reduction="sum", implementation=implementation)
        grad = jax.jit(jax.value_and_grad(call, argnums=(0, 1)))
        shift_1D = np.random.RandomState(2).randn(1, D)
        tables = [jnp.asarray(x, jnp.float32) for x in (e_ND, c_VD, c_VD + shift_1D)]
        loss, (de_ND, dc_VD) = grad(tables[0], tables[1], targets_N)
        shifted, (dshifted_ND, _) = grad(tables[0], tables[2], targets_N)
        assert float(shifted) == pytest.approx(float(loss), rel=1e-5)
        np.testing.assert_allclose(de_ND, dshifted_ND, atol=2e-5)
        np.testing.assert_allclose(np.asarray(dc_VD).sum(axis=0), 0, atol=1e-4)

    def test_the_order_of_the_vocabulary_does_not_matter(self, implementation):
        e_ND, c_VD, _, targets_N = inputs(130, 500)
        order_V = np.random.RandomState(3).permutation(500)
        moved_N = np.where(targets_N == IGNORE, IGNORE, np.argsort(order_V)[targets_N]).astype(np.int32)
        call = per_token(implementation)
        nll_N, lse_N, de_ND, dc_VD = losses_and_gradients(call, e_ND, c_VD, None, targets_N, jnp.float32)
        other = losses_and_gradients(call, e_ND, c_VD[order_V], None, moved_N, jnp.float32)
        for a, b in zip((nll_N, lse_N, de_ND, dc_VD[order_V]), other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)

    def test_training_sums_are_the_losses_and_only_the_first_carries_gradients(self, implementation):
        n, v, softcap, _ = CASES["capped"]
        e_ND, c_VD, bias_V, targets_N = inputs(n, v, True)
        z = 1e-2

        def sums(tables, implementation, weights=(1.0, 0.0, 0.0)):
            found = api.loss_sums(
                *tables[:2], targets_N, bias_V=tables[2], softcap=softcap, z_weight=z, implementation=implementation
            )
            return sum(w * x for w, x in zip(weights, found, strict=True)), found

        def by_hand(tables):
            nll_N, lse_N = per_token("reference", softcap=softcap)(*tables[:2], targets_N, bias_V=tables[2])
            nll, squares = jnp.sum(nll_N), jnp.sum(jnp.square(lse_N))
            return nll + z * squares, (nll + z * squares, nll, squares)

        with jax.enable_x64(True):
            want, values = jax.grad(by_hand, has_aux=True)([jnp.asarray(x) for x in (e_ND, c_VD, bias_V)])
        tables = [jnp.asarray(x, jnp.float32) for x in (e_ND, c_VD, bias_V)]
        run = jax.jit(jax.grad(sums, has_aux=True), static_argnums=(1, 2))
        grads, found = run(tables, implementation)
        np.testing.assert_allclose(found, values, rtol=1e-5)
        for a, b, tolerance in zip(grads, want, tolerances(n, v, jnp.float32)[2:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2 * tolerance)
        halves, _ = run(tables, implementation, (-0.5, 0.0, 0.0))
        for a, b in zip(halves, grads, strict=True):
            np.testing.assert_allclose(a, -0.5 * np.asarray(b), rtol=1e-6, atol=1e-7)
        others, _ = run(tables, implementation, (0.0, 1.0, 1.0))
        assert not any(np.asarray(x).any() for x in others)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_in_float64_only_float64_rounding_is_left(implementation):
    n, v, softcap, bias = CASES["capped"]
    with jax.enable_x64(True):
        found = losses_and_gradients(per_token(implementation), *inputs(n, v, bias), jnp.float64, softcap=softcap)
    assert_exact(found, exact("capped"), n, v, jnp.float64)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
def test_moving_ignored_tokens_to_the_end_changes_nothing(implementation, compacted):
    n, v = 300, 260
    arrays = inputs(n, v, ignored=0.8)
    found = losses_and_gradients(per_token(implementation, compacted=compacted), *arrays, jnp.float32)
    with jax.enable_x64(True):
        want = losses_and_gradients(per_token("reference"), *arrays, jnp.float64)
    assert_exact(found, want, n, v, jnp.float32)


def test_the_reference_is_the_textbook_formula():
    n, v, softcap, _ = CASES["capped"]
    e_ND, c_VD, bias_V, targets_N = inputs(n, v, True)
    up_2N = upstream(n)
    capped_NV = softcap * np.tanh((e_ND @ c_VD.T + bias_V) / softcap)
    valid_N = targets_N != IGNORE
    lse_N = np.where(valid_N, np.log(np.exp(capped_NV).sum(axis=1)), 0)
    nll_N = np.where(valid_N, lse_N - capped_NV[np.arange(n), np.maximum(targets_N, 0)], 0)
    d_NV = np.exp(capped_NV - lse_N[:, None]) * up_2N.sum(axis=0)[:, None]
    d_NV[np.arange(n)[valid_N], targets_N[valid_N]] -= up_2N[0, valid_N]
    d_NV[~valid_N] = 0
    d_NV *= 1 - (capped_NV / softcap) ** 2
    expected = (nll_N, lse_N, d_NV @ c_VD, d_NV.T @ e_ND, d_NV.sum(axis=0))
    for a, b in zip(exact("capped"), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_threshold_of_the_filter_follows_the_dtype():
    found = [api.auto_filter_eps(x) for x in (jnp.bfloat16, jnp.float16, jnp.float32)]
    assert found == [2.0**-12, 2.0**-15, 2.0**-28]


def test_bad_arguments_are_refused_in_one_line():
    e_ND, c_VD, bias_V, targets_N = (jnp.asarray(x) for x in inputs(7, 5, True))
    for bad in ((e_ND[:, 1:], c_VD, targets_N), (e_ND, c_VD, targets_N[1:]), (e_ND[None], c_VD, targets_N)):
        with pytest.raises(ValueError, match="shapes do not fit"):
            api.linear_cross_entropy(*bad)
    call = functools.partial(api.linear_cross_entropy, e_ND, c_VD, targets_N)
    for message, options in {
        "shapes do not fit.*bias": {"bias_V": bias_V[1:]},
        "softcap must be positive": {"softcap": 0.0},
        "accumulate must be": {"accumulate": "bfloat16"},
        "has no implementation 'triton'; choose from": {"implementation": "triton"},
        "'tpu' cannot serve this call: e must be bfloat16 or float32": {"implementation": "tpu"},
        "'gpu' cannot serve this call": {"implementation": "gpu"},
    }.items():
        with pytest.raises(ValueError, match=message), jax.enable_x64(True):
            api.linear_cross_entropy(
                *(jnp.asarray(x, jnp.float64) for x in (e_ND, c_VD)), targets_N, **options
            ) if "implementation" in options else call(**options)


# Plausible mistakes. Each must fail the comparison that the real implementations pass.


def _from_logits(logits_NV, targets_N):
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    valid_N = targets_N != IGNORE
    picked_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(valid_N, lse_N - picked_N, 0.0), jnp.where(valid_N, lse_N, 0.0)


def padded_vocabulary(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """Rows of zeros up to a multiple of 128, never masked: each adds exp(0) to the sum."""
    pad = -c_VD.shape[0] % 128
    return _from_logits(
        reference.logits(e_ND, jnp.pad(c_VD, ((0, pad), (0, 0))), jnp.pad(bias_V, (0, pad)), softcap), targets_N
    )


def counts_ignored(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """Ignored targets clipped to token 0."""
    return _from_logits(reference.logits(e_ND, c_VD, bias_V, softcap), jnp.maximum(targets_N, 0))


def no_softcap_derivative(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """The cap's value without the factor 1 - (x / cap)^2 in the gradient."""
    raw_NV = reference.logits(e_ND, c_VD, bias_V)
    return _from_logits(raw_NV + jax.lax.stop_gradient(softcap * jnp.tanh(raw_NV / softcap) - raw_NV), targets_N)


def softcap_derivative_of_the_raw_logit(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """1 - (x / cap)^2 of the logit before the cap."""
    raw_NV = reference.logits(e_ND, c_VD, bias_V)
    capped_NV = softcap * jnp.tanh(raw_NV / softcap)
    slope_NV = jax.lax.stop_gradient(1 - jnp.square(raw_NV / softcap))
    shown_NV = raw_NV * slope_NV
    return _from_logits(shown_NV + jax.lax.stop_gradient(capped_NV - shown_NV), targets_N)


def bias_outside_the_cap(e_ND, c_VD, targets_N, *, bias_V, softcap):
    return _from_logits(reference.logits(e_ND, c_VD, None, softcap) + bias_V[None], targets_N)


def no_gradient_through_lse(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """The second result as a plain number: a z-loss in the value only."""
    nll_N, lse_N = _from_logits(reference.logits(e_ND, c_VD, bias_V, softcap), targets_N)
    return nll_N, jax.lax.stop_gradient(lse_N)


def forgets_the_tail(e_ND, c_VD, targets_N, *, bias_V, softcap):
    """Whole blocks of tokens only."""
    whole = e_ND.shape[0] // 128 * 128
    nll_N, lse_N = _from_logits(reference.logits(e_ND, c_VD, bias_V, softcap), targets_N)
    inside_N = jnp.arange(e_ND.shape[0]) < whole
    return nll_N * inside_N, lse_N * inside_N


@pytest.mark.parametrize(
    "wrong",
    [
        padded_vocabulary,
        counts_ignored,
        no_softcap_derivative,
        softcap_derivative_of_the_raw_logit,
        bias_outside_the_cap,
        no_gradient_through_lse,
        forgets_the_tail,
    ],
)
def test_wrong_formulas_are_rejected(wrong):
    n, v, softcap, bias = CASES["capped"]
    found = losses_and_gradients(wrong, *inputs(n, v, bias), jnp.float32, softcap=softcap)
    with pytest.raises(AssertionError, match=r"nll_N|lse_N|de_ND|dc_VD"):
        assert_exact(found, exact("capped"), n, v, jnp.float32)
