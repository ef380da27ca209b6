"""The cross-entropy with its vocabulary cut over devices equals that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.cross_entropy import api, vjp

N, D, V, DEVICES = 252, 24, 507, 4


def arrays():
    random = np.random.RandomState(0)
    targets_N = np.where(random.rand(N) < 0.2, -100, random.randint(0, V, N)).astype(np.int32)
    pad = -V % DEVICES
    c_VD = np.concatenate([random.randn(V, D) / 2, np.zeros((pad, D))])
    bias_V = np.concatenate([random.randn(V), np.full(pad, -np.inf)])
    up_2N = random.randn(2, N)
    return [jnp.asarray(x, jnp.float32) for x in (random.randn(N, D), c_VD, bias_V, up_2N)], jnp.asarray(targets_N)


def losses_and_gradients(call, e_ND, c_VD, bias_V, up_2N):
    def total(tables):
        nll_N, lse_N = call(*tables)
        return jnp.sum(up_2N[0] * nll_N) + jnp.sum(up_2N[1] * lse_N), (nll_N, lse_N)

    grads, values = jax.jit(jax.grad(total, has_aux=True))((e_ND, c_VD, bias_V))
    return *values, *grads


def one_device():
    (e_ND, c_VD, bias_V, up_2N), targets_N = arrays()

    def call(e_ND, c_VD, bias_V):
        return api.linear_cross_entropy(
            e_ND, c_VD, targets_N, bias_V=bias_V, reduction="none", return_lse=True, implementation="reference"
        )

    return losses_and_gradients(call, e_ND, c_VD[:V], bias_V[:V], up_2N)


def cut(implementation):
    (e_ND, c_VD, bias_V, up_2N), targets_N = arrays()
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]), ("vocabulary",))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("vocabulary"), P("vocabulary")),
        out_specs=P(),
        check_vma=False,
    )
    def call(e_ND, c_VD, bias_V):
        return api.vocabulary_parallel_cross_entropy(
            e_ND, c_VD, targets_N, axis="vocabulary", bias_V=bias_V, implementation=implementation
        )

    return losses_and_gradients(call, e_ND, c_VD, bias_V, up_2N)


def assert_equal(found, want):
    for name, a, b in zip(("nll", "lse", "de", "dc", "dbias"), found, want, strict=True):
        np.testing.assert_allclose(a[: len(b)], b, rtol=1e-5, atol=2e-5, err_msg=name)
        assert not np.asarray(a[len(b) :]).any()


@pytest.mark.parametrize("implementation", ["chunked", "tpu", "gpu"])
def test_a_cut_vocabulary_gives_the_losses_and_gradients_of_a_whole_one(implementation):
    assert_equal(cut(implementation), one_device())


def unshifted_targets(targets_N, rows, index):
    """Every device takes the target for a row of its own."""
    del index
    return jnp.where(targets_N < rows, targets_N, rows)


def local_softmax(lse_N, picked_N, axis):
    """Every device normalises by its own rows only."""
    return lse_N, jax.lax.psum(picked_N, axis)


@pytest.mark.parametrize(("name", "wrong"), [("_local_targets", unshifted_targets), ("_combine", local_softmax)])
def test_wrong_cuts_are_rejected(monkeypatch, name, wrong):
    monkeypatch.setattr(vjp, name, wrong)
    found = cut("chunked")
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_equal(found, one_device())


def test_the_reference_says_that_it_cannot():
    (e_ND, c_VD, *_), targets_N = arrays()
    with pytest.raises(ValueError, match="the reference holds all logits"):
        api.vocabulary_parallel_cross_entropy(e_ND, c_VD, targets_N, axis="x", implementation="reference")
