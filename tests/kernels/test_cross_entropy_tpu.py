"""The TPU kernels of the cross-entropy, interpreted: tiles, edges, the filter, races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import chips
from kernels.cross_entropy import chunked, shapes, tpu, tpu_kernels

EPS = float(jnp.finfo(jnp.float32).eps)


def arrays(n, v, d=24, ignored=0.2, seed=0):
    """Return e_ND, c_VD, bias_V, targets_N, soft_N, hot_N; logits have a deviation near 2."""
    random = np.random.RandomState(seed)
    targets_N = np.where(random.rand(n) < ignored, -1, random.randint(0, v, n)).astype(np.int32)
    floats = [random.randn(n, d), 2 * random.randn(v, d) / np.sqrt(d), random.randn(v)]
    rows = [random.randn(n) * (targets_N >= 0) for _ in range(2)]
    return (
        *(jnp.asarray(x, jnp.float32) for x in floats),
        jnp.asarray(targets_N),
        *(jnp.asarray(x, jnp.float32) for x in rows),
    )


def both(e_ND, c_VD, bias_V, targets_N, soft_N, hot_N, blocks, interpret=True, softcap=None, filter_eps=0.0):
    """Return lse_N, picked_N and the gradients of the kernels."""
    more = {"softcap": softcap, "blocks": blocks, "interpret": interpret}
    lse_N, picked_N = tpu.forward(e_ND, c_VD, bias_V, targets_N, **more)
    grads = tpu.backward(e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N, filter_eps=filter_eps, **more)
    return [x for x in (lse_N, picked_N, *grads) if x is not None]


def plain(e_ND, c_VD, bias_V, targets_N, soft_N, hot_N, softcap=None):
    lse_N, picked_N = chunked.forward(e_ND, c_VD, bias_V, targets_N, softcap=softcap)
    grads = chunked.backward(e_ND, c_VD, bias_V, targets_N, lse_N, soft_N, hot_N, softcap=softcap)
    return [x for x in (lse_N, picked_N, *grads) if x is not None]


def assert_equal(found, want, targets_N):
    """Losses where there is a target, gradients everywhere; up to N terms of size 4 in float32."""
    valid_N = np.asarray(targets_N) >= 0
    for k, (a, b) in enumerate(zip(found, want, strict=True)):
        a, b = (np.where(valid_N, x, 0) if k < 2 else np.asarray(x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=8 * 4 * EPS * np.sqrt(len(valid_N)), err_msg=str(k))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("n", "v", "bias"), [(1, 5, True), (256, 257, False), (300, 391, True)])
def test_tiles_are_those_of_the_plain_form(resident, n, v, bias):
    e_ND, c_VD, bias_V, *rest = arrays(n, v)
    these = (e_ND, c_VD, bias_V if bias else None, *rest)
    found = both(*these, tpu.Blocks(n=128, v=128, resident=resident), softcap=3.0)
    assert_equal(found, plain(*these, softcap=3.0), rest[0])


@pytest.mark.parametrize("resident", [False, True])
def test_no_races_and_nothing_uninitialised_is_read(resident, capfd):
    inputs = arrays(300, 260)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
    found = both(*inputs, tpu.Blocks(n=128, v=128, resident=resident), interpret)
    assert_equal(found, plain(*inputs), inputs[3])
    assert "RACE" not in "".join(capfd.readouterr())
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("resident", [False, True])
def test_without_masks_at_the_edges_the_test_fails(resident, monkeypatch):
    """What lies outside the arrays is NaN here; on a TPU it is whatever was there."""
    inputs = arrays(300, 260)
    steps = tpu_kernels._steps
    monkeypatch.setattr(tpu_kernels, "_steps", lambda step, used, edges: steps(step, used, []))
    with pytest.raises(AssertionError):
        assert_equal(both(*inputs, tpu.Blocks(n=128, v=128, resident=resident)), plain(*inputs), inputs[3])


@pytest.mark.parametrize("resident", [False, True])
def test_blocks_of_ignored_tokens_are_not_computed(resident):
    inputs = arrays(384, 260)
    e_ND, targets_N = inputs[0].at[128:256].set(jnp.nan), inputs[3].at[128:256].set(-1)
    rows = [x.at[128:256].set(0.0) for x in inputs[4:]]
    lse_N, picked_N, de_ND, dc_VD, dbias_V = both(
        e_ND, *inputs[1:3], targets_N, *rows, tpu.Blocks(n=128, v=128, resident=resident)
    )
    for x in (lse_N, picked_N, de_ND):
        assert not np.asarray(x)[128:256].any()
    assert np.isfinite(dc_VD).all()
    assert np.isfinite(dbias_V).all()


def filtered(e_ND, c_VD, targets_N, soft_N, hot_N, eps, before_upstream=True):
    """Dense gradients (de_ND, dc_VD) of which the 128 x 128 tiles below eps are left out; and how many stayed."""
    logits_NV = np.asarray(e_ND, np.float64) @ np.asarray(c_VD, np.float64).T
    prob_NV = np.exp(logits_NV - np.log(np.exp(logits_NV).sum(axis=1, keepdims=True)))
    hot_NV = np.arange(logits_NV.shape[1]) == np.asarray(targets_N)[:, None]
    d_NV = prob_NV * np.asarray(soft_N)[:, None] - hot_NV * np.asarray(hot_N)[:, None]
    size_NV = np.abs(prob_NV - hot_NV if before_upstream else d_NV)
    kept = 0
    for i in range(0, d_NV.shape[0], 128):
        for j in range(0, d_NV.shape[1], 128):
            tile = np.s_[i : i + 128, j : j + 128]
            if size_NV[tile].max() < eps:
                d_NV[tile] = 0
            else:
                kept += 1
    return d_NV @ np.asarray(c_VD), d_NV.T @ np.asarray(e_ND), kept


def hot_columns(n, v, every, sort):
    """Every so many rows of the classifier are likely, others not; with `sort`, likely rows are next to each other."""
    random = np.random.RandomState(0)
    likely_V = np.arange(v) % every == 0
    likely_V = np.sort(likely_V) if sort else likely_V
    e_ND = np.concatenate([np.ones((n, 1)), random.randn(n, 31) / 4], axis=1)
    c_VD = np.concatenate([np.where(likely_V, 20.0, 0.0)[:, None], random.randn(v, 31) / 4], axis=1)
    targets_N = random.choice(np.flatnonzero(likely_V), n).astype(np.int32)
    weight_N = jnp.full(n, 1 / n, jnp.float32)
    return *(jnp.asarray(x, jnp.float32) for x in (e_ND, c_VD)), jnp.asarray(targets_N), weight_N


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("sort", "kept"), [(False, 16), (True, 2)])
def test_the_filter_skips_just_the_tiles_below_its_threshold(resident, sort, kept):
    e_ND, c_VD, targets_N, weight_N = hot_columns(256, 1024, 8, sort)
    blocks = tpu.Blocks(n=128, v=128, resident=resident)
    for eps, tiles in ((2.0**-12, kept), (2.0, 0)):
        want_e, want_c, count = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, eps)
        assert count == tiles
        _, _, de_ND, dc_VD = both(e_ND, c_VD, None, targets_N, weight_N, weight_N, blocks, filter_eps=eps)
        np.testing.assert_allclose(de_ND, want_e, atol=2e-6)
        np.testing.assert_allclose(dc_VD, want_c, atol=2e-6)
    exact_e, exact_c, _ = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, 0.0)
    want_e, want_c, _ = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, 2.0**-12)
    np.testing.assert_allclose(want_e, exact_e, atol=1e-7)
    np.testing.assert_allclose(want_c, exact_c, atol=1e-7)


@pytest.mark.parametrize("resident", [False, True])
def test_a_coarse_filter_shows_that_tiles_are_really_left_out(resident):
    """A threshold high enough to change the result; a filter after the upstream gradient drops other tiles."""
    n, v = 256, 512
    random = np.random.RandomState(0)
    e_ND, c_VD = (jnp.asarray(x, jnp.float32) for x in (random.randn(n, 8), random.randn(v, 8) * 1.2))
    targets_N = jnp.asarray(random.randint(0, 128, n), jnp.int32)
    weight_N = jnp.full(n, 1 / n, jnp.float32)
    prob_NV = np.asarray(jax.nn.softmax(e_ND @ c_VD.T, axis=1))
    largest = sorted(prob_NV[i : i + 128, j : j + 128].max() for i in (0, 128) for j in range(128, v, 128))
    eps = float(largest[2] + largest[3]) / 2
    want = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, eps)
    assert 0 < want[2] < 8
    blocks = tpu.Blocks(n=128, v=128, resident=resident)
    _, _, *found = both(e_ND, c_VD, None, targets_N, weight_N, weight_N, blocks, filter_eps=eps)
    for a, b in zip(found, want, strict=False):
        np.testing.assert_allclose(a, b, atol=1e-6)
    exact = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, 0.0)
    late = filtered(e_ND, c_VD, targets_N, weight_N, weight_N, eps, before_upstream=False)
    assert late[2] == 0
    for wrong in (exact, late):
        with pytest.raises(AssertionError):
            for a, b in zip(found, wrong, strict=False):
                np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("program", ["forward", "backward"])
def test_chosen_and_tried_blocks_fit(name, program):
    shape = shapes.SHAPES[name]
    sizes = (shape.n, shape.d, shape.v)
    chosen = tpu.choose_blocks(program, *sizes, shape.dtype)
    assert chosen.bytes_needed(*sizes, 2, program) <= chosen.vmem
    for chip in chips.CHIPS.values():
        tried = tpu.candidates(program, shape, chip)
        assert tried
        assert all(x.bytes_needed(*sizes, 2, program) <= x.vmem <= chip.vmem_bytes for x in tried)
        assert chip.cores == 1 or not any(x.resident for x in tried)


def test_a_long_batch_of_a_wide_model_is_given_smaller_tiles():
    chosen = tpu.choose_blocks("backward", 1 << 20, 8192, 128256, "float32")
    assert chosen.bytes_needed(1 << 20, 8192, 128256, 4, "backward") <= chosen.vmem
    assert not chosen.resident


@pytest.mark.parametrize("bad", [{"n": 100}, {"v": 0}, {"v": 192}])
def test_tiles_that_are_no_multiple_of_128_are_refused(bad):
    with pytest.raises(ValueError, match="multiple of 128"):
        tpu.Blocks(**bad)


def test_what_the_kernels_cannot_serve_is_said_in_one_line():
    def why(dtype_e, dtype_c, d=8):
        return tpu.supports(*(jax.ShapeDtypeStruct((4, d), x) for x in (dtype_e, dtype_c)))

    assert why(jnp.bfloat16, jnp.bfloat16) is None
    assert why(jnp.float32, jnp.float32) is None
    assert why(jnp.float16, jnp.float16) == "e must be bfloat16 or float32, got float16"
    assert why(jnp.bfloat16, jnp.float32) == "e and c must have one dtype, got bfloat16 and float32"
    assert why(jnp.float32, jnp.float32, 20000) == "D is at most 16384, got 20000"


def test_the_kernels_lower_for_tpu():
    """Mosaic's checks of block shapes need no TPU and no libtpu."""
    for name in ("forward", "backward"):
        run, structs = shapes.program(name, shapes.SHAPES["tiny"], "tpu")
        exported = jax.export.export(
            jax.jit(run),
            platforms=["tpu"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")],
        )(*structs)
        assert "tpu_custom_call" in exported.mlir_module()
