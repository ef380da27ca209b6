"""Child processes: what a job can do to one, and what libtpu says where it is installed."""

import dataclasses
import importlib.util

import pytest

from kernels.aot import jobs, parent, tables

JOB = jobs.Job("aot_toy", "forward", "small", "tpu", "v5e", "memory")
without_libtpu = importlib.util.find_spec("libtpu") is None
needs_libtpu = pytest.mark.skipif(without_libtpu, reason="libtpu is not installed: pip install 'tinyjax[aot]'")


def job(**changes):
    return dataclasses.replace(JOB, **changes)


def run(*wanted, timeout=240.0):
    return [result for _, result in parent.run(wanted, timeout)]


def test_what_a_caller_can_get_wrong_is_a_line():
    wanted = [
        job(chip="v9"),
        job(shape="huge"),
        job(program="sideways"),
        job(cases="kernels.nothing.shapes"),
        job(blocks={"kind": "Tiles", "m": 8}),
        job(blocks={"kind": "Blocks", "m": 7}),
        job(blocks={"kind": "Blocks", "depth": 8}),
    ]
    results = run(*wanted)
    assert [result.error for result in results] == ["chip", *["case"] * 6]
    said = ["no chip 'v9'", "no shape 'huge'; known: small, long", "no program sideways", "kernels.nothing"]
    said += ["no dataclass Tiles", "multiple of 8, got 7", "depth"]
    for result, words in zip(results, said, strict=True):
        assert words in result.reason and "\n" not in result.reason


@pytest.mark.skipif(not without_libtpu, reason="libtpu is installed")
def test_without_libtpu_the_extra_is_named():
    assert run(job()) == [jobs.Result("libtpu", "libtpu is not installed; it is in the extra `aot`")]


def test_jobs_after_a_death_go_on():
    results = run(job(program="dies"), job(chip="v9"), job(program="dies"), job(shape="huge"))
    assert [result.error for result in results] == ["died", "chip", "died", "case"]
    assert results[0].reason.startswith("SIGABRT")


def test_a_job_that_hangs_is_ended():
    assert run(job(program="hangs"), timeout=3.0)[0].error == "timeout"


@needs_libtpu
@pytest.mark.slow
def test_a_program_is_measured():
    memory, bundles, cycles = run(*(job(want=want) for want in ("memory", "bundles", "cycles")))
    # bfloat16 [512, 512] twice in, once out.
    assert memory.memory == jobs.Memory(temp=0, arguments=2 * 512 * 512 * 2, outputs=512 * 512 * 2)
    (kernel,) = bundles.kernels
    assert (kernel.name, kernel.grid, kernel.spills, kernel.cycles) == ("product", (2, 2, 2), 0, None)
    # One MXU pass of a v5e takes 128 x 128 of y and 8 rows of x: 256^3 are 512 passes over four units.
    assert 128 < kernel.bundles < 2048
    (kernel,) = cycles.kernels
    assert 8 * 128 < kernel.cycles < 8 * 4096 and kernel.bundles is None


@needs_libtpu
@pytest.mark.slow
def test_part_of_a_grid_stands_for_the_whole():
    few, many = run(*(job(shape="long", want="cycles", simulate=steps) for steps in (16, 256)))
    assert few.kernels[0].grid == many.kernels[0].grid == (2, 1, 128)
    assert few.kernels[0].cycles == pytest.approx(many.kernels[0].cycles, rel=0.05)


@needs_libtpu
@pytest.mark.slow
def test_loops_are_walked_as_often_as_the_scalars_say():
    few, many = run(
        *(job(program="steered", want="cycles", blocks={"kind": "Blocks", "m": 32, "k": k}) for k in (256, 2560))
    )
    if tables.version().startswith("0.0.4"):
        assert few.error == many.error == "compile" and "takes all scalars for 0" in few.reason
        return
    # 120 additions and 1200; a libtpu that reads zeros would find no difference.
    assert many.kernels[0].cycles > 1.5 * few.kernels[0].cycles


@needs_libtpu
@pytest.mark.slow
def test_too_much_vmem_is_told_from_a_bad_kernel():
    whole = {"kind": "Blocks", "m": 512, "k": 32768}
    overflow, bad = run(job(shape="long", want="bundles", blocks=whole), job(program="misshapen", want="bundles"))
    assert overflow.error == "vmem" and "memory space vmem" in overflow.reason
    assert bad.error == "compile" and "block shape" in bad.reason


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_other_chips(chip):
    (result,) = run(job(chip=chip, want="bundles"))
    assert result.error is None and result.kernels[0].bundles > 64
