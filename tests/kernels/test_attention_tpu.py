"""What is special to the TPU kernels: which blocks they visit, how heads lie in lanes, races, blocks, lowering."""

import functools
import itertools

import attention_oracle as oracle
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import reference, shapes, tpu, tpu_plan
from kernels.attention.tpu_plan import Blocks, Plan
from kernels.attention.vjp import Options

EPS = float(jnp.finfo(jnp.float32).eps)


def plan_of(case, blocks, segments=False):
    return Plan(
        case.s,
        case.t,
        case.h,
        case.k,
        case.a,
        case.causal,
        case.window,
        case.softcap,
        case.a**-0.5,
        segments,
        case.sinks,
        tpu_plan.clusters_of(case.k, case.a)[0],
        2,
        blocks,
    )


def edge(ids_BS, n):
    return np.pad(ids_BS, ((0, 0), (0, n - ids_BS.shape[1])), mode="edge")


@pytest.mark.parametrize(("s", "t"), [(1, 1), (7, 33), (33, 7), (64, 64)], ids=str)
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 1), (True, 5), (True, 16), (True, 1000)]
)
def test_visited_blocks_are_those_with_visible_pairs(s, t, causal, window):
    case = Case(2, s, t, 1, 1, 16, causal=causal, window=window)
    random = np.random.RandomState(0)
    for blocks, packed in itertools.product((Blocks(8, 8), Blocks(16, 8), Blocks(8, 32)), (False, True)):
        plan = plan_of(case, blocks, packed)
        q_ids, kv_ids = (
            (np.cumsum(random.rand(2, n) < 0.1, axis=1).astype(np.int32) for n in (s, t)) if packed else (None, None)
        )
        mask = np.asarray(reference.visible(s, t, q_ids, kv_ids, causal=causal, window=window))
        mask = np.broadcast_to(mask, (2, s, t)) if packed else mask
        padded = ()
        if packed:
            padded = (jnp.asarray(edge(q_ids, plan.s_padded)), jnp.asarray(edge(kv_ids, plan.t_padded)))
        table = np.asarray(tpu_plan.visits(plan, *padded))
        assert table.shape == (len(mask), plan.q_blocks, 4)
        for row, i in np.ndindex(table.shape[:2]):
            first, full, full_end, end = table[row, i]
            assert 0 <= first <= full <= full_end <= end <= plan.kv_blocks or first >= end
            for j in range(plan.kv_blocks):
                pairs = mask[row, i * blocks.q : (i + 1) * blocks.q, j * blocks.kv : (j + 1) * blocks.kv]
                inside = t >= (j + 1) * blocks.kv
                assert not pairs.any() or first <= j < end, "a visible pair is not visited"
                assert not full <= j < full_end or (pairs.all() and inside), "a masked pair in a full block"
                if not packed:
                    assert pairs.any() or not first <= j < end, "a block is visited for nothing"
                    assert full <= j < full_end or not (pairs.all() and inside), "a full block is masked"


def test_long_documents_have_full_blocks_between_their_borders():
    case = Case(1, 64, 64, 1, 1, 16)
    ids = jnp.asarray((np.arange(64) >= 40)[None].astype(np.int32))
    table = np.asarray(tpu_plan.visits(plan_of(case, Blocks(8, 8), segments=True), ids, ids))
    np.testing.assert_array_equal(table[0, 4], [0, 0, 4, 5])
    np.testing.assert_array_equal(table[0, 7], [5, 5, 7, 8])


@pytest.mark.parametrize("width", [1, 16, 24, 32, 64, 80, 128, 200, 256])
def test_heads_lie_apart_in_lanes(width):
    a = tpu_plan.padded_width(width)
    assert a >= width
    assert 128 % a == 0 or a % 128 == 0
    for heads in (1, 2, 3, 5, 8):
        for cluster in tpu_plan.clusters_of(heads, width):
            assert heads % cluster == 0
            # What a block of lanes may be: whole tiles, or all there is.
            assert cluster * a % 128 == 0 or cluster == heads
            for head in range(cluster):
                span = tpu_plan.span(head, cluster, a)
                assert span.start % 128 == 0
                assert span.start + span.offset == head * a
                assert span.start + span.offset + a <= span.stop <= cluster * a
                assert span.stop - span.start <= max(128, a)


def both(case, x, blocks, interpret, dtype=jnp.float32):
    options = case.options() | {"scale": case.a**-0.5, "blocks": blocks, "interpret": interpret}
    sinks = None if x.sinks is None else jnp.asarray(x.sinks, jnp.float32)
    arrays = (*(jnp.asarray(y, dtype) for y in (x.q, x.k, x.v)), x.q_segments, x.kv_segments, sinks)
    out, lse = jax.jit(functools.partial(tpu.forward, **options))(*arrays)
    grads = jax.jit(functools.partial(tpu.backward, **options))(*arrays, out, lse, jnp.asarray(x.dout, dtype))
    found = dict(zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (out, lse, *grads), strict=True))
    return {name: y for name, y in found.items() if y is not None}


@pytest.mark.parametrize("blocks", [Blocks(128, 256), Blocks(256, 128)], ids=str)
def test_blocks_change_nothing(blocks):
    case = Case(1, 270, 270, 1, 1, 32, window=100, segments=True)
    x = oracle.inputs(case)
    oracle.assert_close(both(case, x, blocks, interpret=True), oracle.attention(case, x), case, EPS)


def test_groups_whose_heads_move_to_other_lanes():
    case = Case(1, 33, 33, 6, 3, 32, sinks=True)
    x = oracle.inputs(case)
    oracle.assert_close(both(case, x, None, interpret=True), oracle.attention(case, x), case, EPS)


@pytest.mark.parametrize(
    "case",
    [Case(2, 140, 140, 4, 4, 64, segments=True), Case(1, 256, 140, 2, 1, 128, sinks=True, softcap=3.0)],
    ids=["two heads share lanes", "more queries than keys"],
)
def test_nothing_is_read_out_of_bounds_or_by_two_cores_at_once(case):
    x = oracle.inputs(case)
    try:
        interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
        found = both(case, x, Blocks(128, 128), interpret)
        oracle.assert_close(found, oracle.attention(case, x), case, EPS)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("name", shapes.SHAPES)
@pytest.mark.parametrize("program", ["forward", "backward"])
def test_it_lowers_for_tpus(name, program):
    function, arguments = shapes.program(program, shapes.SHAPES[name], "tpu")
    exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)
    assert exported.mlir_module().count("tpu_custom_call") == 1


def test_the_call_is_compiled_for_tpus_where_it_is_compiled_for_tpus():
    """The default backend is a CPU here; a program exported for TPUs holds the kernels all the same."""
    from kernels.attention.api import attention

    def loss(q, k):
        return jnp.sum(attention(q, k, k, implementation="tpu"))

    arguments = [jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)] * 2
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(*arguments).mlir_module()
    assert text.count("tpu_custom_call") == 2


def test_what_cannot_be_served_is_said():
    def ask(s, h, k, a, dtype=jnp.bfloat16):
        q, kv = (jax.ShapeDtypeStruct((1, s, heads, a), dtype) for heads in (h, k))
        return tpu.supports(q, kv, Options(True, None, None, 1.0))

    assert ask(1024, 4, 4, 64) is None
    assert ask(8192, 8, 4, 256) is None, "the longest of Gemma 2"
    assert ask(8192, 4, 4, 64) is None
    assert "MiB of VMEM" in ask(2**17, 4, 4, 64)
    assert "at most 32" in ask(128, 71, 1, 64)
    assert "float16" in ask(128, 4, 4, 64, jnp.float16)


def test_programs_have_known_names():
    with pytest.raises(ValueError, match="there is no program 'both'"):
        shapes.program("both", shapes.SHAPES["tiny"], "tpu")
    assert all(tpu.candidates("forward", shape, None) for shape in shapes.SHAPES.values())
