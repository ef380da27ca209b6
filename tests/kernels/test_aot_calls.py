"""Pallas calls are found in programs, described, and cut out with the meaning they had."""

import functools

import aot_toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.aot import calls, steering

SHAPE = aot_toy.Shape(64, 128, 256, "float32")
BLOCKS = aot_toy.Blocks(16, 128)


def steered():
    function, arguments = aot_toy.program("steered", SHAPE, "tpu", BLOCKS)
    (call,) = calls.find(functools.partial(function, interpret=True), arguments)
    x_MK = jnp.asarray(np.random.RandomState(0).randn(64, 128), jnp.float32)
    return call, x_MK


def test_a_call_is_described():
    (call,) = calls.find(*aot_toy.program("forward", aot_toy.SHAPES["small"], "tpu"))
    assert (call.name, call.grid, call.prefetched) == ("product", (2, 2, 2), 0)
    assert call.work == 256**3
    block = 256 * 256 * 2
    # x and y are fetched at every step, the product is written when i or j moves.
    assert call.traffic == 8 * block + 8 * block + 4 * block


def test_calls_inside_other_programs_are_found():
    function, arguments = aot_toy.program("forward", aot_toy.SHAPES["small"], "tpu")

    @jax.jit
    def looped(x_MK, y_KN):
        def body(carry, _):
            return jax.checkpoint(function)(carry, y_KN), None

        return jax.lax.scan(body, x_MK, length=3)[0]

    assert [call.name for call in calls.find(looped, arguments)] == ["product"]
    assert [call.name for call in calls.find(lambda x, y: function(function(x, y), y), arguments)] == ["product"] * 2
    assert calls.find(jnp.sin, arguments[:1]) == []


def test_scalars_are_those_of_inputs_that_are_zero():
    call, _ = steered()
    (table,) = steering.values(call.program, call.equation.invars[:1])
    assert table.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]


def test_constants_steer_as_the_scalars_did():
    call, x_MK = steered()
    function, arguments = call.part(call.grid)
    assert [a.shape for a in arguments] == [(64, 128)]
    expected = np.asarray(x_MK).reshape(4, 16, 128)[::-1] * np.arange(1, 5)[:, None, None]
    (found,) = jax.jit(function)(x_MK)
    np.testing.assert_allclose(found, expected.reshape(64, 128), rtol=1e-6)
    # With zeros in their place, as the estimator would have them, nothing is reversed and nothing loops.
    (zeros,) = jax.jit(steering.unsteered(call.equation, [np.zeros((2, 4), np.int32)], call.grid)[0])(x_MK)
    np.testing.assert_allclose(zeros, np.tile(np.asarray(x_MK)[:16], (4, 1)))


def test_a_part_is_the_first_steps_of_the_whole():
    call, x_MK = steered()
    (found,) = jax.jit(call.part((2,))[0])(x_MK)
    np.testing.assert_allclose(found[:16], x_MK[48:])
    np.testing.assert_allclose(found[16:32], 2 * x_MK[32:48], rtol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 2, 2)])
def test_a_part_keeps_the_arrays(grid):
    (call,) = calls.find(*aot_toy.program("forward", aot_toy.SHAPES["small"], "tpu"))
    function, arguments = call.part(grid)
    (part,) = calls.find(function, arguments)
    assert part.grid == grid
    assert [a.shape for a in arguments] == [(512, 512), (512, 512)]


@pytest.mark.parametrize(("libtpu", "seen"), [("0.0.42.1", False), ("0.0.51", True), ("0.1.0", True), ("", True)])
def test_an_estimator_that_reads_zeros_gets_only_zeros(libtpu, seen):
    steering.check([np.zeros((2, 4), np.int32)], libtpu)
    scalars = [np.zeros(3, np.int32), np.arange(2, dtype=np.int32)]
    if seen:
        steering.check(scalars, libtpu)
    else:
        with pytest.raises(ValueError, match="takes all scalars for 0"):
            steering.check(scalars, libtpu)
