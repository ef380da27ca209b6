"""Attention against a float64 loop over queries, gradients against autodiff in float64, and wrong masks rejected."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import api, reference

CASES = {
    "one token": (1, 1, 1, 1, 2),
    "one token, grouped": (2, 1, 4, 2, 2),
    "odd length": (2, 7, 2, 2, 4),
    "grouped": (1, 33, 6, 2, 6),
    "one kv head": (2, 13, 3, 1, 8),
    "odd and long": (1, 261, 2, 1, 10),
}


def inputs(b, s, h, k, a, seed=0):
    """Return float64 q_BSHA, k_BTKA, v_BTKA and segment_ids_BS of documents of random lengths, the last one padding."""
    random = np.random.RandomState(seed)
    arrays = [random.randn(b, s, heads, a) for heads in (h, k, k)]
    segment_ids_BS = 1 + np.cumsum(random.rand(b, s) < 0.2, axis=1)
    segment_ids_BS[:, s - s // 5 :] = 0
    return (*arrays, segment_ids_BS.astype(np.int32))


def by_hand(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS=None, softcap=None, scale=None):
    """One query at a time, in float64."""
    b, s, h, a = q_BSHA.shape
    group = h // k_BTKA.shape[2]
    y_BSHA = np.zeros((b, s, h, a))
    for i, t, head in np.ndindex(b, s, h):
        seen = [u for u in range(t + 1) if segment_ids_BS is None or segment_ids_BS[i, u] == segment_ids_BS[i, t]]
        scores_T = k_BTKA[i, seen, head // group] @ q_BSHA[i, t, head] * (a**-0.5 if scale is None else scale)
        if softcap is not None:
            scores_T = softcap * np.tanh(scores_T / softcap)
        weights_T = np.exp(scores_T - scores_T.max())
        y_BSHA[i, t, head] = weights_T / weights_T.sum() @ v_BTKA[i, seen, head // group]
    return y_BSHA


def tolerance(s, a, dtype=jnp.float32):
    """Return eps times the root of the terms of a score and of the average, times 8 for the worst of many elements."""
    return 8 * float(jnp.finfo(dtype).eps) * (math.sqrt(a) + math.sqrt(s))


def call(attention, q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, dtype=jnp.float32, **options):
    arrays = [jnp.asarray(x, dtype) for x in (q_BSHA, k_BTKA, v_BTKA)]
    return np.asarray(jax.jit(functools.partial(attention, **options))(*arrays, segment_ids_BS=segment_ids_BS))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_loop_over_queries(case, packed):
    *arrays, segment_ids_BS = inputs(*CASES[case])
    segment_ids_BS = segment_ids_BS if packed else None
    softcap = 2.0 if packed else None
    found = call(api.attention, *arrays, segment_ids_BS, softcap=softcap)
    expected = by_hand(*arrays, segment_ids_BS, softcap=softcap)
    _, s, _, _, a = CASES[case]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance(s, a))


@pytest.mark.parametrize(("softcap", "scale"), [(0.5, None), (None, 0.3), (1.5, 1.0)])
def test_cap_and_scale(softcap, scale):
    *arrays, segment_ids_BS = inputs(*CASES["grouped"])
    found = call(api.attention, *arrays, segment_ids_BS, softcap=softcap, scale=scale)
    expected = by_hand(*arrays, segment_ids_BS, softcap, scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance(33, 6))


@pytest.mark.parametrize("case", ["one token, grouped", "grouped", "odd and long"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_float64(case, packed):
    *arrays, segment_ids_BS = inputs(*CASES[case])
    segment_ids_BS = segment_ids_BS if packed else None
    softcap = 2.0 if packed else None
    upstream_BSHA = np.random.RandomState(1).randn(*arrays[0].shape)

    def gradients(attention, dtype):
        def total(q_BSHA, k_BTKA, v_BTKA):
            y_BSHA = attention(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS=segment_ids_BS, softcap=softcap)
            return jnp.sum(y_BSHA * upstream_BSHA.astype(dtype))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*(jnp.asarray(x, dtype) for x in arrays))

    found = gradients(api.attention, jnp.float32)
    with jax.enable_x64(True):
        expected = gradients(reference.attention, jnp.float64)
    _, s, h, k, a = CASES[case]
    for name, x, y in zip("qkv", found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance(s * h // k, a), err_msg=name)


def test_later_and_foreign_tokens_have_no_influence_at_all():
    *arrays, segment_ids_BS = inputs(*CASES["grouped"])
    segment_ids_BS[:] = np.arange(33) // 11
    changed = [x.copy() for x in arrays]
    for x in changed[1:]:
        x[:, 15:] += 100.0
        x[:, :11] -= 100.0
    before = call(api.attention, *arrays, segment_ids_BS)
    after = call(api.attention, *changed, segment_ids_BS)
    np.testing.assert_array_equal(before[:, 11:15], after[:, 11:15])
    assert (before[:, 15:] != after[:, 15:]).any()


def test_bfloat16_keeps_its_scores_in_float32():
    a = 10
    *arrays, segment_ids_BS = inputs(*CASES["odd and long"])
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays]
    found = call(api.attention, *arrays, segment_ids_BS, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(
        found.astype(np.float64), by_hand(*rounded, segment_ids_BS), rtol=4 * eps, atol=eps * math.sqrt(a)
    )


def test_scores_far_apart_stay_finite():
    *arrays, segment_ids_BS = inputs(*CASES["odd length"])
    found = call(api.attention, 1e3 * arrays[0], 1e3 * arrays[1], arrays[2], segment_ids_BS)
    assert np.isfinite(found).all()


def test_heads_that_do_not_divide_are_refused():
    q_BSHA, k_BTKA, v_BTKA, _ = inputs(1, 3, 3, 2, 4)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        api.attention(q_BSHA, k_BTKA, v_BTKA)


# Plausible mistakes, as (q, k, v, segments) -> y with the loop above fed wrongly.


def sees_the_next_token(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS):
    mask_ST = np.tril(np.ones((q_BSHA.shape[1],) * 2, bool), k=1)
    return _masked(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, mask_ST)


def misses_itself(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS):
    mask_ST = np.tril(np.ones((q_BSHA.shape[1],) * 2, bool), k=-1)
    mask_ST[0, 0] = True
    return _masked(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, mask_ST)


def ignores_segments(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS):
    return by_hand(q_BSHA, k_BTKA, v_BTKA)


def interleaves_kv_heads(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS):
    """Query head h reads key head h mod K, as np.tile would give, in place of h // (H / K)."""
    group = q_BSHA.shape[2] // k_BTKA.shape[2]
    return by_hand(q_BSHA, np.tile(k_BTKA, (1, 1, group, 1)), np.tile(v_BTKA, (1, 1, group, 1)), segment_ids_BS)


def scales_by_the_width(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS):
    scale = (q_BSHA.shape[2] * q_BSHA.shape[3]) ** -0.5
    return by_hand(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, scale=scale)


def _masked(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, mask_ST):
    group = q_BSHA.shape[2] // k_BTKA.shape[2]
    k_BTHA, v_BTHA = (np.repeat(x, group, axis=2) for x in (k_BTKA, v_BTKA))
    scores_BHST = np.einsum("bsha,btha->bhst", q_BSHA, k_BTHA) * q_BSHA.shape[-1] ** -0.5
    mask_BST = mask_ST & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None])
    weights_BHST = np.exp(scores_BHST) * mask_BST[:, None] + 1e-300
    return np.einsum("bhst,btha->bsha", weights_BHST / weights_BHST.sum(axis=-1, keepdims=True), v_BTHA)


@pytest.mark.parametrize(
    "wrong", [sees_the_next_token, misses_itself, ignores_segments, interleaves_kv_heads, scales_by_the_width]
)
def test_wrong_attention_is_rejected(wrong):
    *arrays, segment_ids_BS = inputs(*CASES["grouped"])
    found = call(api.attention, *arrays, segment_ids_BS)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found, wrong(*arrays, segment_ids_BS), rtol=1e-5, atol=tolerance(33, 6))


def test_the_vectorised_form_of_the_mistakes_is_right_when_its_mask_is():
    *arrays, segment_ids_BS = inputs(*CASES["grouped"])
    right = _masked(*arrays, segment_ids_BS, np.tril(np.ones((33, 33), bool)))
    np.testing.assert_allclose(right, by_hand(*arrays, segment_ids_BS), rtol=1e-9, atol=1e-12)
