"""The tuner's choices on figures made up for the test, what it keeps on disk, and a bench whose timing is fair."""

import dataclasses
import json

import aot_toy
import pytest

from kernels import blocks, tune
from kernels.aot import jobs, parent, store, tables
from kernels.bench import timing
from kernels.chips import CHIPS

TOY = tune.Op("toy", "aot_toy", "aot_toy", simulate=16, work=(0, 2**40), programs=("forward",))


class Compiler:
    """Stands in for the child processes: figures by the blocks' (m, k), and a list of what was asked."""

    def __init__(self, figures):
        self.figures, self.asked = figures, []

    def __call__(self, wanted, timeout=0.0):
        for job in wanted:
            self.asked.append((job.want, job.blocks["m"], job.blocks["k"]))
            yield job, self.result(job)

    def result(self, job):
        if job.want == "memory":
            return jobs.Result(memory=jobs.Memory(7, 0, 0))
        bundles, cycles, loops = self.figures[job.blocks["m"], job.blocks["k"]]
        if bundles is None:
            return jobs.Result("vmem", "Used 18.52M of 16.00M vmem")
        if job.want == "cycles" and cycles is None:
            return jobs.Result("died", "SIGABRT")
        depths = {"1": bundles, **({"2": 9} if loops else {})}
        kernel = jobs.Kernel("product", (10,), 0, 0, bundles=bundles, depths=depths, spills=0, slots={})
        return jobs.Result(kernels=(dataclasses.replace(kernel, cycles=cycles),))


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "version", lambda: "0.0.1")

    def make(figures, file="v5e.jsonl"):
        compiler = Compiler(figures)
        monkeypatch.setattr(parent, "run", compiler)
        return tune.Tuner(TOY, CHIPS["v5e"], store.Store(tmp_path / file)), compiler

    return make


FAST = {(256, 256): (500, 9000.0, False), (512, 512): (900, 5000.0, False), (512, 32768): (None, None, False)}


def test_blocks_that_are_one_program_are_one_candidate(tuner):
    found = tuner({})[0].candidates("forward", "long")
    assert [(c.blocks["m"], c.blocks["k"]) for c in found] == [(256, 256), (512, 512), (512, 32768)]
    assert found[0].blocks["kind"] == "Blocks"


@pytest.mark.parametrize(
    ("work", "left"),
    [
        ((0, 512 * 512 * 256), [256, 512]),
        ((256**3 + 1, 2**40), [512, 32768]),
        ((0, 1), [256, 512]),  # all are too long: the shortest are tried all the same
        ((2**50, 2**60), [512, 32768]),  # all are too short: the longest
    ],
)
def test_steps_too_long_to_compile_or_too_short_are_left_out(tuner, work, left):
    few = tuner({})[0]
    few.op = dataclasses.replace(TOY, work=work)
    assert [c.blocks["k"] for c in few.candidates("forward", "long")] == left


def test_the_fastest_that_fits_is_chosen(tuner):
    entry, found = tuner(FAST)[0].tune("forward", "long")
    assert entry.blocks == {"m": 512, "k": 512}  # more bundles per step, fewer cycles in all
    assert entry.shape == dataclasses.asdict(aot_toy.SHAPES["long"])
    figures = entry.figures["0.0.1"]
    assert figures["temp_bytes"] == 7
    assert figures["kernels"]["product"] == {"steps": 10, "bundles": 900, "spills": 0, "cycles_per_step": 500.0}
    assert [c.bundles.error for c in found] == [None, None, "vmem"]


def test_of_two_as_good_the_shorter_program_is_chosen(tuner):
    near = FAST | {(256, 256): (500, 5050.0, False)}
    assert tuner(near)[0].tune("forward", "long")[0].blocks == {"m": 256, "k": 256}
    far = FAST | {(256, 256): (500, 5150.0, False)}
    assert tuner(far, "another")[0].tune("forward", "long")[0].blocks == {"m": 512, "k": 512}


def test_an_estimate_with_transfers_is_not_beaten_by_one_without(tuner):
    # Bundles alone know of no waiting, so the kernel that cannot be walked looks faster than it may be.
    unwalked = FAST | {(256, 256): (100, None, False)}
    assert tuner(unwalked)[0].tune("forward", "long")[0].blocks == {"m": 512, "k": 512}
    none = {sizes: (bundles, None, False) for sizes, (bundles, _, _) in FAST.items()}
    entry, _ = tuner(none)[0].tune("forward", "small")
    assert entry.figures["0.0.1"]["kernels"]["product"]["cycles_per_step"] is None


def test_only_the_best_few_are_walked_unless_steps_hold_loops(tuner, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 1)
    _, compiler = tuned = tuner(FAST)
    assert tuned[0].tune("forward", "long")[0].blocks == {"m": 256, "k": 256}
    assert [asked for asked in compiler.asked if asked[0] == "cycles"] == [("cycles", 256, 256)]


def test_with_loops_in_steps_all_are_walked(tuner, monkeypatch):
    monkeypatch.setattr(tune, "FINALISTS", 1)
    loops = {sizes: (bundles, cycles, True) for sizes, (bundles, cycles, _) in FAST.items()}
    assert tuner(loops)[0].tune("forward", "long")[0].blocks == {"m": 512, "k": 512}


def test_when_nothing_compiles_there_is_no_entry(tuner):
    entry, found = tuner(dict.fromkeys(FAST, (None, None, False)))[0].tune("forward", "long")
    assert entry is None and len(found) == 3


def test_what_was_measured_is_not_measured_again(tuner, tmp_path):
    first, compiler = tuner(FAST)
    entry, _ = first.tune("forward", "long")
    asked = len(compiler.asked)
    assert asked == len(set(compiler.asked))
    file = tmp_path / "v5e.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == asked
    # A kill in the middle of a line, and a line of something else.
    file.write_text("\n".join([lines[0][:40], '{"key": 3}', *lines[1:]]) + "\n")
    second, compiler = tuner(FAST)
    assert second.tune("forward", "long")[0] == entry
    assert compiler.asked == [("bundles", 256, 256)]


def test_another_program_text_or_version_is_measured_again(tuner, monkeypatch):
    first, compiler = tuner(FAST)
    job = jobs.Job("aot_toy", "forward", "long", "tpu", "v5e", "memory", {"m": 1, "k": 1})
    for text, version in (("a", "0.0.1"), ("a", "0.0.1"), ("b", "0.0.1"), ("a", "0.0.2")):
        monkeypatch.setattr(tables, "version", lambda version=version: version)
        list(first.measurements.run([(job, text)]))
    assert len(compiler.asked) == 3


def test_timeouts_are_not_remembered(tuner, monkeypatch):
    first, compiler = tuner(FAST)
    monkeypatch.setattr(compiler, "result", lambda job: jobs.Result("timeout", "no result after 600 s"))
    job = jobs.Job("aot_toy", "forward", "long", "tpu", "v5e", "memory", {"m": 1, "k": 1})
    assert [result.error for _ in range(2) for _, result in first.measurements.run([(job, "a")])] == ["timeout"] * 2
    assert len(compiler.asked) == 2


def test_kept_blocks_get_this_librarys_figures(tuner):
    old = blocks.Entry("toy", "forward", dataclasses.asdict(aot_toy.SHAPES["long"]), {"m": 256, "k": 256}, {})
    entry = tuner(FAST)[0].remeasure(old)
    assert entry.blocks == old.blocks and entry.figures["0.0.1"]["kernels"]["product"]["cycles_per_step"] == 900.0
    gone = dataclasses.replace(old, shape={"m": 3})
    assert tuner(FAST)[0].remeasure(gone) is None


def test_the_same_program_has_the_same_text_in_every_process():
    function, arguments = aot_toy.program("forward", aot_toy.SHAPES["small"], "tpu")
    again, _ = aot_toy.program("forward", aot_toy.SHAPES["small"], "tpu")
    text = store.traced(function, arguments)
    assert text == store.traced(again, arguments) and "0x" not in text


def test_the_command_line_writes_a_table(tuner, monkeypatch, tmp_path, capsys):
    tuner(FAST)
    monkeypatch.setattr(tune, "OPS", {"toy": TOY})
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "cache")
    file = tmp_path / "table.json"
    tune.main(["--chip=v5e", "--op=toy", "--shape=long", f"--table={file}"])
    assert json.loads(file.read_text())["entries"][0]["blocks"] == {"m": 512, "k": 512}
    assert "no device" in capsys.readouterr().out
    tune.main(["--chip=v5e", "--keep", f"--table={file}"])
    assert len(tables.read(file)) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chip=v9"], "invalid choice: 'v9'"),
        (["--chip=v5e", "--op=sorting"], "invalid choice: 'sorting'"),
        (["--chip=v5e", "--op=toy", "--shape=huge"], "toy has small, long"),
    ],
)
def test_a_bad_command_line_is_one_line(tuner, monkeypatch, capsys, arguments, says):
    tuner(FAST)
    monkeypatch.setattr(tune, "OPS", {"toy": TOY})
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert says in f"{stop.value}{capsys.readouterr().err}"


def test_without_libtpu_the_tuner_names_the_extra(monkeypatch):
    monkeypatch.setattr(tables, "version", lambda: "")
    with pytest.raises(SystemExit, match=r"tinyjax\[aot\]"):
        tune.main(["--chip=v5e"])


def test_programs_are_timed_in_turn(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def program(name, seconds):
        def run():
            order.append(name)
            # The machine is ten times slower in the second half, and once, for one program, a hundred times.
            slow = 10 if len(order) > 2 * timing.WARM_UP + 20 else 1
            now[0] += seconds * slow * (100 if len(order) == 2 * timing.WARM_UP + 1 else 1)

        return run

    found = timing.in_turn({"a": program("a", 1.0), "b": program("b", 2.0)}, repeats=21)
    assert order == ["a", "b"] * (21 + timing.WARM_UP)
    assert found["b"] / found["a"] == pytest.approx(2.0)
