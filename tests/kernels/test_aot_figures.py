"""What is read out of the compiler's dumps, extrapolated from parts of a grid, and called worse than before."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import blocks
from kernels.aot import estimate, jobs, llo, profile, tables
from kernels.chips import CHIPS

BUNDLES = """\
= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: bf16[8,512]] }
   0x1   :  { %2 = sst [smem:[#allocation1_spill]] %s1_s0 }
   0x2 LB: > { %s3 = sphi %s4 }
   0x3   : > { %v5 = vmatpush %v6 }
   0x4 LB: > > { %v7 = vld [vmem:[%s3]] }
   0x5 PF: > { %8 = vst [vmem:[%s3]] %v7 }
   0x6 CT: > { %9 = sbr.rel (!%p1) target = $region3 }
   0x7   :  { %10 = vsyncpa [#allocation8], 1 } /* exit bundle */
"""
NEW = """\
== CAPACTIY:
MATMUL, MATPUSH, VLOAD:FILL, VSTORE:SPILL, SALU
    4     4     3     1     2
== UTILIZATION:
0 0 0 0 1
0 0 0 0 1
0 0 1 0 2
4 1 0 0 0
2 0 2 1 0
0 0 0 1 0
0 0 0 0 2
0 0 0 0 0
"""


def test_bundles_are_counted_by_loop():
    assert llo.depths_of(BUNDLES) == [0, 0, 1, 1, 2, 1, 1, 0]


def test_figures_are_those_inside_the_grid_loop():
    report = llo.report(BUNDLES, NEW)
    assert report.bundles == 5
    assert report.depths == {"0": 3, "1": 4, "2": 1}
    assert report.spills == 5
    assert report.slots["MATMUL"] == pytest.approx(6 / 20)
    assert report.slots["SALU"] == pytest.approx(4 / 10)  # 6 of 16 with what stands outside the loop


def test_a_grid_of_one_step_has_no_loop():
    flat = BUNDLES.replace("> > {", "{").replace("> {", "{")
    assert llo.report(flat, NEW).bundles == 8


def test_dumps_of_different_programs_are_refused():
    with pytest.raises(ValueError, match="8 bundles but 7 rows"):
        llo.report(BUNDLES, NEW[: NEW.rindex("0 0 0 0 0")])
    with pytest.raises(ValueError, match="another format"):
        llo.report("nothing here", NEW)


def test_one_column_for_the_matrix_units_is_read_too():  # libtpu 0.0.42
    old = "== CAPACTIY:\nMXU, VLOAD:FILL, VSTORE:SPILL, SALU\n 4 3 1 2\n== UTILIZATION:\n" + "4 0 0 0\n" * 8
    assert llo.report(BUNDLES, old).slots["MXU"] == 1.0


def test_a_dump_is_found_by_the_kernels_name(tmp_path):
    for stem in ("17-mine.1", "17-TLP"):
        (tmp_path / f"{stem}-02-final_bundles.txt").write_text(BUNDLES)
        (tmp_path / f"{stem}-01-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
        (tmp_path / f"{stem}-00-final_hlo-static-per-bundle-utilization.txt").write_text(NEW)
    assert llo.read(tmp_path, "mine").bundles == 5
    with pytest.raises(ValueError, match="0 programs"):
        llo.read(tmp_path, "yours")


GRIDS = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)


@given(grid=GRIDS, steps=st.integers(1, 300))
def test_the_walked_grids_are_small_and_inside(grid, steps):
    plan = profile.plan(grid, steps)
    for walked in plan.grids:
        assert len(walked) == len(grid)
        assert all(1 <= a <= b for a, b in zip(walked, grid, strict=True))
        assert math.prod(walked) <= max(2 * steps, 2)
    if math.prod(grid) <= steps:
        assert plan.grids == (grid,)


@given(grid=GRIDS, steps=st.integers(1, 300), start=st.integers(0, 5000), step=st.integers(1, 9000))
def test_equal_steps_are_extrapolated_exactly(grid, steps, start, step):
    plan = profile.plan(grid, steps)
    cycles = [start + step * math.prod(walked) for walked in plan.grids]
    assert profile.total(plan, cycles) == pytest.approx(start + step * math.prod(grid))


def test_the_start_of_a_kernel_is_counted_once():
    plan = profile.plan((64, 8), 16)
    cycles = [1000 + 10 * math.prod(walked) for walked in plan.grids]
    in_proportion = cycles[1] * math.prod((64, 8)) / math.prod(plan.grids[1])
    assert profile.total(plan, cycles) == 1000 + 10 * 512
    assert in_proportion > 2 * profile.total(plan, cycles)


def test_inner_axes_are_walked_whole():
    # Causal attention: a row of blocks costs what its index says, so rows must not be cut, only heads.
    plan = profile.plan((2, 12, 8, 8), 64)
    assert plan.grids == ((1, 1, 8, 8), (1, 2, 8, 8))
    assert profile.total(plan, [100, 190]) == 100 + 90 * 23


def test_an_estimate_is_found_by_the_kernels_name(tmp_path):
    (tmp_path / "mine.1_TPU v5 lite_static_llo_profile.textproto").write_text("hlo_op_estimate { estimated_cycles: 7 }")
    (tmp_path / "copy.1_TPU v5 lite_static_llo_profile.textproto").write_text("hlo_op_estimate { estimated_cycles: 9 }")
    assert profile.read(tmp_path, "mine") == 7
    with pytest.raises(ValueError, match="0 estimates"):
        profile.read(tmp_path, "yours")


KERNEL = jobs.Kernel("k", (4, 8), 1 << 20, 0, bundles=100, depths={"1": 100}, spills=3, slots={}, cycles=4000.0)
RESULT = jobs.Result(kernels=(KERNEL,))


def test_jobs_and_results_go_through_a_pipe_unchanged():
    job = jobs.Job("kernels.x.shapes", "forward", "tiny", "tpu", "v5e", "cycles", {"kind": "Blocks", "n": 8})
    assert jobs.decode_job(jobs.encode(job)) == job
    result = dataclasses.replace(RESULT, memory=jobs.Memory(1, 2, 3))
    assert jobs.decode_result(jobs.encode(result)) == result
    failure = jobs.Result("vmem", "Used 18.52M of 16.00M vmem")
    assert jobs.decode_result(jobs.encode(failure)) == failure
    assert "\n" not in jobs.encode(jobs.Result("compile", "two\nlines"))


def test_a_kernel_is_bound_by_its_bundles_or_its_traffic():
    chip = CHIPS["v5e"]
    assert estimate.lower_bound([KERNEL], chip) == pytest.approx(3200 / 1.5e9)
    wide = dataclasses.replace(KERNEL, traffic=1 << 30)
    assert estimate.lower_bound([wide, KERNEL], chip) == pytest.approx((1 << 30) / 738e9 + 3200 / 1.5e9)
    assert estimate.walked([KERNEL], CHIPS["v5p"]) == pytest.approx(2000 / 1.75e9)  # two cores


def figures(**changes):
    kernel = dataclasses.replace(KERNEL, **changes)
    return tables.figures(jobs.Result(kernels=(kernel,)), jobs.Result(kernels=(kernel,)), jobs.Result())


def test_figures_are_per_step():
    kernel = figures()["kernels"]["k"]
    assert kernel == {"steps": 32, "bundles": 100, "spills": 3, "cycles_per_step": 125.0}
    unknown = tables.figures(RESULT, jobs.Result("died", "SIGABRT"), jobs.Result())
    assert unknown["kernels"]["k"]["cycles_per_step"] is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bundles": 110}, "bundles 100 -> 110"),
        ({"spills": 4}, "spills 3 -> 4"),
        ({"cycles": 4200.0}, "cycles_per_step 125.0 -> 131.2"),
        ({"grid": (8, 8), "cycles": 8000.0}, "bundles 100 -> 100"),  # as many per step, but twice the steps
        ({"name": "other"}, "kernels k -> other"),
    ],
)
def test_what_is_worse_is_named(changes, says):
    assert any(says in line for line in tables.worse(figures(), figures(**changes)))


@pytest.mark.parametrize("changes", [{}, {"bundles": 101}, {"bundles": 50, "cycles": 3000.0}, {"spills": 0}])
def test_as_good_or_better_passes(changes):
    assert not list(tables.worse(figures(), figures(**changes)))


def test_an_estimate_that_is_lost_is_worse():
    lost = tables.figures(RESULT, jobs.Result("died", ""), jobs.Result())
    assert any("not known any more" in line for line in tables.worse(figures(), lost))
    assert not list(tables.worse(lost, figures()))


def row(n, sizes, version="0.0.51"):
    return blocks.Entry("cross_entropy", "forward", {"n": n, "dtype": "bfloat16"}, sizes, {version: {"jax": "0"}})


def test_a_table_is_written_whole_and_sorted(tmp_path):
    file = tmp_path / "v5e.json"
    tables.write("v5e", [row(16, {"n": 1}), row(128, {"n": 2})], file)
    first = file.read_bytes()
    assert tables.read(file) == (row(128, {"n": 2}), row(16, {"n": 1}))
    tables.write("v5e", reversed(tables.read(file)), file)
    assert file.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["v5e.json"]
    assert tables.read(tmp_path / "none.json") == ()


def test_figures_of_other_versions_stay_with_the_same_blocks_only():
    old = row(16, {"n": 1}, "0.0.42.1")
    kept = tables.merge([old, row(32, {"n": 9})], row(16, {"n": 1}))
    assert {e.shape["n"]: set(e.figures) for e in kept} == {16: {"0.0.42.1", "0.0.51"}, 32: {"0.0.51"}}
    changed = tables.merge([old], row(16, {"n": 2}))
    assert [set(e.figures) for e in changed] == [{"0.0.51"}]
