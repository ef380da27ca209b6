"""The benchmark: what it compares exists, comparisons are of like with like, and a rival that is missing is a line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.aot import jobs, parent
from kernels.bench import __main__ as command
from kernels.bench import compiled, here, timing
from kernels.cross_entropy import shapes

SMALL = shapes.Shape(n=7, d=5, v=300, dtype="float32")


def test_implementations_of_a_group_agree(monkeypatch):
    monkeypatch.setattr(here, "CPU_LOSSES", {"small": SMALL})
    monkeypatch.setattr(here, "CPU_ATTENTION", {"small": here.attention.Shape(1, 32, 32, 4, 2, 8, dtype="float32")})
    for group in here.groups(None, "cpu"):
        outcomes = []
        for make in group.programs.values():
            program = timing.compile(*make())
            outcomes.append(jax.tree.leaves(program.call(*program.arguments))[0])
        for outcome in outcomes[1:]:
            np.testing.assert_allclose(outcome, outcomes[0], rtol=1e-4, atol=1e-5, err_msg=group.title)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_a_devices_kernel_is_in_every_comparison(backend):
    titles = [group for group in here.groups(None, backend) if backend in group.programs]
    assert len(titles) == 2 * (len(here.shapes.SHAPES) + len(here.attention.SHAPES))


def test_a_program_that_cannot_be_made_is_a_line():
    def missing():
        raise ImportError("No module named 'cut_cross_entropy'")

    good = lambda: (jnp.sin, (jax.ShapeDtypeStruct((4,), jnp.float32),))  # noqa: E731
    table = command._table(here.Group("group", {"sin": good, "rival": missing}), repeats=2)
    names, times = (list(column.cells) for column in table.columns[:2])
    assert dict(zip(names, times, strict=True))["rival"] == "-"
    assert any("cut_cross_entropy" in cell for cell in table.columns[3].cells)


def test_arguments_are_valid():
    integers = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    (segments,) = timing.compile(lambda x: x + 1, (integers,)).arguments
    assert segments.dtype == jnp.int32
    assert (np.diff(np.asarray(segments), axis=1) >= 0).all() and int(segments.min()) >= 0 and int(segments.max()) < 256


def compiler(cycles):
    def run(wanted, timeout=0.0):
        for job in sorted(wanted, key=lambda job: job.want, reverse=True):
            if job.want == "memory":
                yield job, jobs.Result(memory=jobs.Memory(3 << 20, 0, 0))
            elif job.want == "cycles" and cycles is None:
                yield job, jobs.Result("died", "SIGABRT: Unsupported DMA direction")
            else:
                kernel = jobs.Kernel("k", (2,), 0, 0, bundles=10, depths={}, spills=0, slots={}, cycles=cycles)
                yield job, jobs.Result(kernels=(kernel,))

    return run


def test_a_step_of_training_is_both_kernels(monkeypatch):
    monkeypatch.setattr(parent, "run", compiler(1.5e6))
    forward = compiled.ours("cross_entropy", "tiny", "forward", "v5e")
    both = compiled.ours("cross_entropy", "tiny", "value_and_grad", "v5e")
    assert (forward.bundles, forward.seconds, forward.temp) == (10, pytest.approx(1e-3), 3 << 20)
    assert (both.bundles, both.seconds, both.temp) == (20, pytest.approx(2e-3), 3 << 20)
    rival = compiled.theirs("cross_entropy", "tiny", "value_and_grad", "v5e")
    assert compiled.cells(rival, both.seconds) == ["3.0", "10", "1.000", "0.50"]


def test_a_kernel_without_an_estimate_says_why(monkeypatch):
    monkeypatch.setattr(parent, "run", compiler(None))
    figures = compiled.theirs("attention", "tiny", "forward", "v5e")
    assert compiled.cells(figures, 1.0) == ["3.0", "10", "SIGABRT: Unsupported DMA direction", "-"]


def test_blocks_are_those_of_the_table(monkeypatch):
    seen = []

    def run(wanted, timeout=0.0):
        seen.extend(wanted)
        return compiler(1.0)(wanted)

    monkeypatch.setattr(parent, "run", lambda wanted, timeout=0.0: run(list(wanted)))
    monkeypatch.setattr(compiled.blocks, "measured", lambda op, program, shape, chip: {"n": len(program)})
    compiled.ours("cross_entropy", "tiny", "value_and_grad", "v5e")
    sizes = {(job.program, job.want): job.blocks for job in seen}
    assert sizes["value_and_grad", "memory"] is None
    assert sizes["forward", "cycles"] == {"kind": "Blocks", "n": 7}
    assert sizes["backward", "bundles"] == {"kind": "Blocks", "n": 8}


def test_an_unknown_shape_is_a_line():
    with pytest.raises(SystemExit, match="cross_entropy has quickstart"):
        compiled.main("v5e", "cross_entropy", "huge", command.Console())


def test_rivals_refuse_what_they_do_not_do():
    from kernels.bench import gpu

    with pytest.raises(NotImplementedError, match="softcap"):
        gpu.cudnn(dataclasses.replace(here.attention.SHAPES["tiny"], softcap=30.0), "forward")
