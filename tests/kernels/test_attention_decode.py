"""Attention against a cache: equal to attention over the filled part alone, whatever the rest of the cache holds."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case

from kernels.attention import api

EPS = float(jnp.finfo(jnp.float32).eps)
CASES = {
    "one new token": Case(3, 1, 17, 4, 2, 24, sinks=True),
    "several, capped": Case(3, 5, 33, 3, 1, 16, softcap=2.0, scale=0.3),
    "window": Case(3, 2, 33, 2, 2, 16, window=4, sinks=True),
}


@functools.cache
def compiled(window, softcap, scale):
    return jax.jit(functools.partial(api.decode_attention, window=window, softcap=softcap, scale=scale))


def call(case, x, lengths_B):
    run = compiled(case.window, case.softcap, case.scale)
    sinks = None if x.sinks is None else jnp.asarray(x.sinks, jnp.float32)
    arrays = (jnp.asarray(y, jnp.float32) for y in (x.q, x.k, x.v))
    return np.asarray(run(*arrays, lengths_B=jnp.asarray(lengths_B), sinks_H=sinks))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rest", [0.0, 1e4, np.nan, np.inf])
def test_only_the_filled_part_counts(name, rest):
    case = CASES[name]
    x = oracle.inputs(case)
    lengths_B = np.array([case.t, case.s, case.s + 3], np.int32)
    for row, length in enumerate(lengths_B):
        x.k[row, length:] = x.v[row, length:] = rest
    found = call(case, x, lengths_B)
    for row, length in enumerate(lengths_B):
        alone = Case(1, case.s, int(length), case.h, case.k, case.a, True, case.window, case.softcap, case.scale)
        cut = oracle.Inputs(
            x.q[row : row + 1],
            x.k[row : row + 1, :length],
            x.v[row : row + 1, :length],
            None,
            None,
            x.sinks,
            x.dout[row : row + 1],
        )
        expected = {"out": oracle.attention(alone, cut)["out"]}
        oracle.assert_close({"out": found[row : row + 1]}, expected, alone, EPS)
        if length < case.t and rest == 0.0:
            # A length that is one too large lets in a key of zeros; the comparison has to see it.
            wrong = call(case, x, lengths_B + (np.arange(3) == row))[row : row + 1]
            with pytest.raises(AssertionError):
                oracle.assert_close({"out": wrong}, expected, alone, EPS)


def test_tokens_before_the_start_give_zero():
    case = Case(1, 4, 9, 2, 1, 16)
    found = call(case, oracle.inputs(case), np.array([2], np.int32))
    assert (found[0, :2] == 0).all()
    assert (found[0, 2:] != 0).all()


def test_one_token_at_a_time_is_the_whole_row():
    case = Case(1, 9, 9, 2, 1, 16, window=4)
    x = oracle.inputs(case)
    whole = jax.jit(functools.partial(api.attention, window=4))(*(jnp.asarray(y, jnp.float32) for y in (x.q, x.k, x.v)))
    for i in range(9):
        step = oracle.Inputs(x.q[:, i : i + 1], x.k, x.v, None, None, None, x.dout)
        found = call(Case(1, 1, 9, 2, 1, 16, window=4), step, np.array([i + 1], np.int32))
        np.testing.assert_allclose(found[0, 0], np.asarray(whole)[0, i], rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    q, k = jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 5, 2, 4))
    with pytest.raises(ValueError, match="shapes do not fit"):
        api.decode_attention(q, k, k, lengths_B=jnp.ones(2, int))
    with pytest.raises(ValueError, match="lengths"):
        api.decode_attention(q[:, :, :2], k, k, lengths_B=jnp.ones(3, int))
