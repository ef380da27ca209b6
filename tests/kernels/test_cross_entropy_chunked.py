"""The plain XLA forms: any chunk gives the same, memory stays small, ignored chunks are not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import api, chunked, fused


def arrays(n, v, d=13, ignored=0.2):
    random = np.random.RandomState(0)
    targets_N = np.where(random.rand(n) < ignored, -1, random.randint(0, v, n)).astype(np.int32)
    floats = [jnp.asarray(x, jnp.float32) for x in (random.randn(n, d), random.randn(v, d) / 2, random.randn(v))]
    return *floats, jnp.asarray(targets_N)


@pytest.mark.parametrize("tokens", [1, 4, 7, 13, 64])
def test_the_chunk_changes_nothing(tokens):
    e_ND, c_VD, bias_V, targets_N = arrays(13, 260)
    one, many = chunked.Blocks(tokens), chunked.Blocks(13)
    found, want = (chunked.forward(e_ND, c_VD, bias_V, targets_N, softcap=3.0, blocks=x) for x in (one, many))
    np.testing.assert_allclose(found, want, atol=2e-6)
    rows = jnp.asarray(np.random.RandomState(1).randn(2, 13) * (np.asarray(targets_N) >= 0), jnp.float32)
    found, want = (
        chunked.backward(e_ND, c_VD, bias_V, targets_N, want[0], *rows, softcap=3.0, blocks=x) for x in (one, many)
    )
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    value, want = (
        jax.value_and_grad(lambda e, x: fused.loss_sums(e, c_VD, bias_V, targets_N, 3.0, 1e-2, x)[0])(e_ND, x)
        for x in (one, many)
    )
    for a, b in zip(value, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_chunks_after_the_last_target_are_not_computed():
    """Their embeddings are NaN, which any product would spread."""
    e_ND, c_VD, bias_V, targets_N = arrays(40, 260, ignored=0)
    e_ND, targets_N = e_ND.at[8:].set(jnp.nan), targets_N.at[5:].set(-1)
    found = chunked.forward(e_ND, c_VD, bias_V, targets_N, blocks=chunked.Blocks(8))
    assert np.isfinite(np.asarray(found)).all()
    rows = jnp.asarray(targets_N >= 0, jnp.float32)
    grads = chunked.backward(e_ND, c_VD, bias_V, targets_N, found[0], rows, rows, blocks=chunked.Blocks(8))
    assert all(np.isfinite(np.asarray(x)).all() for x in grads)
    one_chunk_more = chunked.forward(e_ND, c_VD, bias_V, targets_N.at[8].set(0), blocks=chunked.Blocks(8))
    assert np.isnan(np.asarray(one_chunk_more)).any()


def test_scattered_targets_are_gathered_into_few_chunks():
    """With ignored tokens moved to the end, one chunk holds all targets, and the NaN of the others are never met."""
    v = 260
    n = 8 * chunked.default_blocks(1 << 20, 13, v).tokens
    e_ND, c_VD, _, targets_N = arrays(n, v, ignored=0)
    kept_N = np.arange(n) % 8 == 5
    e_ND, targets_N = jnp.where(kept_N[:, None], e_ND, jnp.nan), jnp.where(kept_N, targets_N, -100)

    @functools.partial(jax.jit, static_argnames="compacted")
    def gradient(c_VD, compacted):
        call = functools.partial(api.linear_cross_entropy, implementation="chunked", compacted=compacted)
        return jax.grad(lambda c_VD: call(e_ND, c_VD, targets_N))(c_VD)

    assert np.isfinite(gradient(c_VD, True)).all()
    assert np.isnan(gradient(c_VD, False)).any()


def temporary_bytes(implementation, n, v, d, **options):
    def loss(e_ND, c_VD, targets_N):
        return api.linear_cross_entropy(e_ND, c_VD, targets_N, implementation=implementation, **options)

    def total(e_ND, c_VD, targets_N):
        return jnp.sum(loss(e_ND, c_VD, targets_N))

    shapes = [jax.ShapeDtypeStruct(*x) for x in (((n, d), jnp.float32), ((v, d), jnp.float32), ((n,), jnp.int32))]
    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tenth_of_the_memory_of_the_dense_loss(reduction):
    n, d, v = 4096, 256, 50257
    ours, dense = (temporary_bytes(x, n, v, d, reduction=reduction) for x in ("chunked", "reference"))
    print(f"temporary memory: chunked {ours / 2**20:.0f} MiB, dense {dense / 2**20:.0f} MiB")
    assert dense >= n * v * 4
    assert ours <= dense / 10


def test_memory_does_not_grow_with_the_tokens():
    v, d = 5003, 32
    few, many = (temporary_bytes("chunked", k * 512, v, d) for k in (4, 32))
    # 28 more chunks may cost copies of their embeddings and of the gradients of these, not their logits.
    assert many - few < 28 * 512 * (4 * d * 4 + 64)
