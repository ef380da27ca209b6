"""Block sizes come from the nearest measured shape; the tables that are shipped can be read and used."""

import dataclasses
import json
import math

import pytest

from kernels import blocks, chips


def entry(sizes, op="cross_entropy", program="forward", **shape):
    shape = {"n": 1024, "d": 256, "v": 8192, "softcap": 0.0, "dtype": "bfloat16"} | shape
    return blocks.Entry(op, program, shape, sizes, {})


def found(entries, program="forward", **shape):
    shape = {"n": 1024, "d": 256, "v": 8192, "softcap": 0.0, "dtype": "bfloat16"} | shape
    nearest = blocks.nearest(entries, "cross_entropy", program, shape)
    return nearest and nearest.blocks


def test_the_shape_itself_is_nearest():
    entries = [entry({"n": 1}, v=4096), entry({"n": 2}), entry({"n": 3}, v=16384)]
    assert found(entries) == {"n": 2}


def test_sizes_are_compared_by_ratio():
    # 1000 is 900 below 1900 and 1300 below 2300, but also 1.9 and 2.3 times; 100 is 900 below 1000 and 10 times.
    entries = [entry({"n": 1}, n=100), entry({"n": 2}, n=2300)]
    by_difference = min(entries, key=lambda e: abs(e.shape["n"] - 1000))
    assert by_difference.blocks == {"n": 1}
    assert found(entries, n=1000) == {"n": 2}


def test_distance_is_euclidean_over_octaves():
    a = {"n": 1024, "d": 256, "softcap": 30.0, "bias": False}
    assert blocks.distance(a, a) == 0
    assert blocks.distance(a, a | {"n": 8192, "d": 4096}) == pytest.approx(5.0)  # 3 and 4 octaves
    assert blocks.distance(a, a | {"bias": True}) == blocks.OTHER
    assert blocks.distance(a | {"window": None}, a | {"window": 512}) == blocks.OTHER
    assert blocks.distance(a | {"n": 0}, a) == blocks.OTHER


def test_another_dtype_program_or_op_is_no_neighbour():
    entries = [
        entry({"n": 1}, dtype="float32"),
        entry({"n": 2}, program="backward"),
        entry({"n": 3}, op="attention"),
        entry({"n": 4}, n=1 << 20),
    ]
    assert found(entries) == {"n": 4}
    assert found(entries[:3]) is None
    assert found(entries, program="backward") == {"n": 2}


def test_ties_go_to_the_first():
    entries = [entry({"n": 1}, n=512), entry({"n": 2}, n=2048)]
    assert found(entries) == {"n": 1}
    assert found(entries[::-1]) == {"n": 2}


def test_a_shape_may_be_a_dataclass_with_fewer_fields():
    @dataclasses.dataclass(frozen=True)
    class Shape:
        n: int = 1024
        dtype: str = "bfloat16"

    assert blocks.nearest([entry({"n": 5})], "cross_entropy", "forward", Shape()).blocks == {"n": 5}


def test_without_a_table_there_is_no_answer():
    assert blocks.table("v1") == ()
    assert blocks.measured("cross_entropy", "forward", {"n": 8}, "v1") is None
    assert blocks.measured("cross_entropy", "forward", {"n": 8}, None) is None


def test_chips_are_known_by_what_jax_calls_them():
    assert chips.of_device_kind("TPU v5 lite").name == "v5e"
    assert chips.of_device_kind("TPU v5").name == "v5p"
    assert chips.of_device_kind("TPU v6 lite").name == "v6e"
    assert chips.of_device_kind("cpu") is None
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_shipped_tables_hold_whole_sorted_entries(chip):
    entries = blocks.table(chip)
    for row in entries:
        assert row.blocks and row.figures
        for figures in row.figures.values():
            assert all(kernel["bundles"] > 0 and kernel["steps"] > 0 for kernel in figures["kernels"].values())
    keys = [(row.op, row.program, json.dumps(row.shape, sort_keys=True)) for row in entries]
    assert keys == sorted(set(keys))


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_shipped_tables_answer_for_their_own_shapes(chip):
    for row in blocks.table(chip):
        assert blocks.measured(row.op, row.program, row.shape, chip) == row.blocks


def test_logarithms_do_not_round_exact_octaves():
    assert blocks.distance({"n": 3}, {"n": 48}) == math.log2(16)
