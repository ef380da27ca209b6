"""Every implementation of the cross-entropy against float64 autodiff of the reference, and wrong formulas rejected."""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import api, chunked, reference

IMPLEMENTATIONS = typing.get_args(api.Implementation)
IGNORE = -100
D = 13


def inputs(n, v, d=D, seed=0, ignored=0.2):
    """Return float64 e_ND, c_VD and int32 targets_N, of which a share is ignored; logits have a deviation near 2."""
    random = np.random.RandomState(seed)
    e_ND, c_VD = random.randn(n, d), 2 * random.randn(v, d) / math.sqrt(d)
    targets_N = random.randint(0, v, n)
    targets_N[random.rand(n) < ignored] = IGNORE
    targets_N[0] = v - 1
    return e_ND, c_VD, targets_N.astype(np.int32)


def value_and_gradients(loss, e_ND, c_VD, targets_N, **options):
    """Return (loss, nll, lse squared, de_ND, dc_VD) as float64 NumPy arrays, compiled with the inputs' dtype."""

    def scalar(e_ND, c_VD):
        value, nll, squares = loss(e_ND, c_VD, targets_N, **options)
        return value, (value, nll, squares)

    (de_ND, dc_VD), sums = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(e_ND, c_VD)
    return [np.asarray(x, np.float64) for x in (*sums, de_ND, dc_VD)]


@functools.cache
def exact(n, v, softcap=None, z_weight=0.0):
    """Return float64 values from autodiff of the reference."""
    with jax.enable_x64(True):
        found = value_and_gradients(
            api.linear_cross_entropy,
            *map(jnp.asarray, inputs(n, v)),
            softcap=softcap,
            z_weight=z_weight,
            implementation="reference",
        )
    return found


def tolerances(n, v, dtype):
    """Return the error allowed in each result: eps times the root of the number of terms times their size.

    A logit is a sum of D products rounded to `dtype`, of size about 2; the factor 8 leaves room for the worst of many.
    """
    eps = 8 * float(jnp.finfo(dtype).eps)
    wide = 8 * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    nll = math.log(v) + 4
    total = n * nll * wide * math.sqrt(n) + (math.sqrt(n * D) * 2 * eps if dtype != jnp.bfloat16 else 0)
    return [total, total, total * nll, 2 * eps * math.sqrt(D), 2 * eps * math.sqrt(n)]


def assert_exact(found, expected, n, v, dtype):
    names = ("loss", "nll", "lse_squared", "de_ND", "dc_VD")
    for name, a, b, tolerance in zip(names, found, expected, tolerances(n, v, dtype), strict=True):
        np.testing.assert_allclose(a, b, rtol=8 * float(jnp.finfo(dtype).eps), atol=tolerance, err_msg=name)


def run(implementation, n, v, dtype, **options):
    e_ND, c_VD, targets_N = inputs(n, v)
    call = functools.partial(api.linear_cross_entropy, implementation=implementation)
    return value_and_gradients(call, jnp.asarray(e_ND, dtype), jnp.asarray(c_VD, dtype), targets_N, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("n", "v", "softcap", "z_weight"),
    [
        (1, 5, None, 0.0),
        (7, 260, None, 0.0),
        (513, 5, None, 1e-2),
        (513, 500, 3.0, 0.0),
        (1025, 260, 3.0, 1e-2),
        (7, 8191, 3.0, 1e-2),
        (1025, 8191, None, 0.0),
    ],
)
def test_values_and_gradients_are_those_of_float64(implementation, n, v, softcap, z_weight):
    found = run(implementation, n, v, jnp.float32, softcap=softcap, z_weight=z_weight)
    assert_exact(found, exact(n, v, softcap, z_weight), n, v, jnp.float32)


@pytest.mark.parametrize("chunk", [1, 4, 7, 13, 64])
def test_the_chunk_changes_nothing(monkeypatch, chunk):
    monkeypatch.setattr(api, "CHUNK", chunk)
    found = run("chunked", 13, 260, jnp.float32, softcap=3.0, z_weight=1e-2)
    assert_exact(found, exact(13, 260, 3.0, 1e-2), 13, 260, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_float64_only_float64_rounding_is_left(implementation):
    with jax.enable_x64(True):
        found = run(implementation, 1025, 260, jnp.float64, softcap=3.0, z_weight=1e-2)
    assert_exact(found, exact(1025, 260, 3.0, 1e-2), 1025, 260, jnp.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_give_float32_sums_and_bfloat16_gradients(implementation):
    n, v = 513, 500
    e_ND, c_VD, targets_N = inputs(n, v)
    e_ND, c_VD = jnp.asarray(e_ND, jnp.bfloat16), jnp.asarray(c_VD, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnames="implementation")
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(e_ND, c_VD, implementation):
        return api.linear_cross_entropy(
            e_ND, c_VD, targets_N, softcap=3.0, z_weight=1e-2, implementation=implementation
        )[0]

    value, (de_ND, dc_VD) = loss(e_ND, c_VD, implementation)
    assert value.dtype == jnp.float32
    assert de_ND.dtype == dc_VD.dtype == jnp.bfloat16
    # The same rounded inputs in float64: what is left is the rounding of logits' gradients and of the results.
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (e_ND, c_VD)]
        want, grads = loss(*wide, "reference")
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(de_ND, np.float64), grads[0], rtol=4 * eps, atol=2 * eps * math.sqrt(D))
    np.testing.assert_allclose(np.asarray(dc_VD, np.float64), grads[1], rtol=4 * eps, atol=eps * math.sqrt(n))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_tokens_give_zero_and_zero_gradients(implementation):
    e_ND, c_VD, targets_N = inputs(7, 5)
    e_ND, c_VD = jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32)
    call = functools.partial(api.linear_cross_entropy, implementation=implementation)
    found = value_and_gradients(call, e_ND, c_VD, np.full_like(targets_N, IGNORE), z_weight=1e-2, softcap=3.0)
    assert all((x == 0).all() for x in found)
    *_, de_ND, _ = value_and_gradients(call, e_ND, c_VD, targets_N, z_weight=1e-2)
    assert ((de_ND == 0).all(axis=1) == (targets_N == IGNORE)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_another_ignore_index_is_obeyed(implementation):
    e_ND, c_VD, targets_N = inputs(9, 5)
    call = functools.partial(api.linear_cross_entropy, implementation=implementation)
    tables = jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32)
    renamed_N = np.where(targets_N == IGNORE, -1, targets_N)
    for a, b in zip(
        value_and_gradients(call, *tables, targets_N),
        value_and_gradients(call, *tables, renamed_N, ignore_index=-1),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_reference_is_the_textbook_formula():
    n, v, z_weight = 7, 260, 1e-2
    e_ND, c_VD, targets_N = inputs(n, v)
    logits_NV = e_ND @ c_VD.T
    lse_N = np.log(np.exp(logits_NV).sum(axis=1))
    valid_N = targets_N != IGNORE
    nll = (lse_N - logits_NV[np.arange(n), targets_N])[valid_N].sum()
    squares = (lse_N[valid_N] ** 2).sum()
    d_NV = np.exp(logits_NV - lse_N[:, None]) * (1 + 2 * z_weight * lse_N[:, None])
    d_NV[np.arange(n)[valid_N], targets_N[valid_N]] -= 1
    d_NV[~valid_N] = 0
    expected = (nll + z_weight * squares, nll, squares, d_NV @ c_VD, d_NV.T @ e_ND)
    for a, b in zip(exact(n, v, None, z_weight), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_losses_per_token_and_their_gradients(implementation, softcap):
    n, v = 517, 260
    e_ND, c_VD, targets_N = inputs(n, v)
    weights_2N = np.random.RandomState(1).randn(2, n)

    @functools.partial(jax.jit, static_argnames="implementation")
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def weighted(e_ND, c_VD, implementation):
        nll_N, lse_N = api.linear_cross_entropy(
            e_ND, c_VD, targets_N, softcap=softcap, reduction="none", implementation=implementation
        )
        total = jnp.sum(nll_N * weights_2N[0].astype(e_ND.dtype)) + jnp.sum(lse_N * weights_2N[1].astype(e_ND.dtype))
        return total, (nll_N, lse_N)

    narrow = [jnp.asarray(x, jnp.float32) for x in (e_ND, c_VD)]
    grads, losses = weighted(*narrow, implementation)
    with jax.enable_x64(True):
        want, values = weighted(jnp.asarray(e_ND), jnp.asarray(c_VD), "reference")
    assert (np.asarray(losses[0])[targets_N == IGNORE] == 0).all()
    for a, b in zip((*losses, *grads), (*values, *want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=8 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(n))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(implementation):
    e_ND, c_VD, targets_N = inputs(7, 260)
    call = functools.partial(api.linear_cross_entropy, implementation=implementation)
    found = value_and_gradients(call, jnp.asarray(1e3 * e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32), targets_N)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_is_scaled_by_what_follows(implementation):
    e_ND, c_VD, targets_N = inputs(7, 5)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def scaled(e_ND, c_VD, factor):
        return factor * api.linear_cross_entropy(e_ND, c_VD, targets_N, implementation=implementation)[0]

    tables = jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32)
    for once, half in zip(scaled(*tables, 1.0), scaled(*tables, -0.5), strict=True):
        np.testing.assert_allclose(half, -0.5 * np.asarray(once), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_loss_carries_gradients(implementation):
    e_ND, c_VD, targets_N = inputs(7, 5)

    @jax.jit
    @jax.grad
    def others(e_ND):
        _, nll, squares = api.linear_cross_entropy(
            e_ND, jnp.asarray(c_VD, jnp.float32), targets_N, z_weight=0.1, implementation=implementation
        )
        return nll + squares

    assert not np.asarray(others(jnp.asarray(e_ND, jnp.float32))).any()


def test_shapes_that_do_not_fit_are_refused():
    e_ND, c_VD, targets_N = (jnp.asarray(x) for x in inputs(7, 5))
    for bad in ((e_ND[:, 1:], c_VD, targets_N), (e_ND, c_VD, targets_N[1:]), (e_ND[None], c_VD, targets_N)):
        with pytest.raises(ValueError, match="shapes do not fit"):
            api.linear_cross_entropy(*bad)
    with pytest.raises(ValueError, match="z_weight needs"):
        api.linear_cross_entropy(e_ND, c_VD, targets_N, reduction="none", z_weight=0.1)


# Plausible mistakes. Each must fail the comparison that the real implementations pass.


def padded_vocabulary(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """Rows of zeros up to a multiple of 128, never masked: each adds exp(0) to the sum."""
    wide_WD = jnp.pad(c_VD, ((0, -c_VD.shape[0] % 128), (0, 0)))
    return api.linear_cross_entropy(
        e_ND, wide_WD, targets_N, softcap=softcap, z_weight=z_weight, implementation="reference"
    )


def counts_ignored(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """Ignored targets clipped to token 0."""
    return api.linear_cross_entropy(
        e_ND, c_VD, jnp.maximum(targets_N, 0), softcap=softcap, z_weight=z_weight, implementation="reference"
    )


def ignored_in_z(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """The z-loss over all tokens."""
    nll_N, lse_N = reference.token_losses(e_ND, c_VD, targets_N, softcap=softcap)
    nll, squares = jnp.sum(nll_N), jnp.sum(jnp.square(lse_N))
    return nll + z_weight * squares, nll, squares


def no_softcap_derivative(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """The cap's value without the factor 1 - (x / cap)^2 in the gradient."""
    logits_NV = e_ND @ c_VD.T
    logits_NV += jax.lax.stop_gradient(softcap * jnp.tanh(logits_NV / softcap) - logits_NV)
    return _from_logits(logits_NV, targets_N, z_weight)


def no_z_gradient(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """The z-loss added to the value only."""
    loss, nll, squares = api.linear_cross_entropy(
        e_ND, c_VD, targets_N, softcap=softcap, z_weight=0.0, implementation="chunked"
    )
    return loss + z_weight * jax.lax.stop_gradient(squares), nll, squares


def forgets_the_tail(e_ND, c_VD, targets_N, *, softcap, z_weight):
    """Whole chunks only."""
    whole = e_ND.shape[0] // 512 * 512
    return api.linear_cross_entropy(e_ND[:whole], c_VD, targets_N[:whole], softcap=softcap, z_weight=z_weight)


def _from_logits(logits_NV, targets_N, z_weight):
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    valid_N = targets_N != IGNORE
    picked_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
    nll = jnp.sum(jnp.where(valid_N, lse_N - picked_N, 0.0))
    squares = jnp.sum(jnp.where(valid_N, jnp.square(lse_N), 0.0))
    return nll + z_weight * squares, nll, squares


@pytest.mark.parametrize(
    "wrong",
    [padded_vocabulary, counts_ignored, ignored_in_z, no_softcap_derivative, no_z_gradient, forgets_the_tail],
)
def test_wrong_formulas_are_rejected(wrong):
    n, v = 513, 500
    e_ND, c_VD, targets_N = inputs(n, v)
    found = value_and_gradients(
        wrong, jnp.asarray(e_ND, jnp.float32), jnp.asarray(c_VD, jnp.float32), targets_N, softcap=3.0, z_weight=1e-2
    )
    with pytest.raises(AssertionError, match=r"loss|de_ND"):
        assert_exact(found, exact(n, v, 3.0, 1e-2), n, v, jnp.float32)


def temporary_bytes(implementation, n, v, d=32):
    def loss(e_ND, c_VD, targets_N):
        return api.linear_cross_entropy(e_ND, c_VD, targets_N, implementation=implementation)[0]

    shapes = [jax.ShapeDtypeStruct(*x) for x in (((n, d), jnp.float32), ((v, d), jnp.float32), ((n,), jnp.int32))]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_of_all_tokens_never_exist():
    n, v = 16 * api.CHUNK, 50257
    assert temporary_bytes("chunked", n, v) < n * v * 4 / 3
    assert temporary_bytes("reference", n, v) >= n * v * 4


def test_memory_does_not_grow_with_the_tokens():
    v = 5003
    few, many = (temporary_bytes("chunked", k * api.CHUNK, v) for k in (4, 32))
    # 28 more chunks may cost their embeddings and the gradients of these, not their logits.
    assert many - few < 28 * api.CHUNK * v * 4 / 20


def test_per_token_losses_recompute_their_logits():
    n, v, d = 16 * api.CHUNK, 5003, 32

    def loss(e_ND, c_VD, targets_N):
        return jnp.sum(chunked.token_losses(e_ND, c_VD, targets_N, chunk=api.CHUNK)[0])

    shapes = [jax.ShapeDtypeStruct(*x) for x in (((n, d), jnp.float32), ((v, d), jnp.float32), ((n,), jnp.int32))]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4 / 3
