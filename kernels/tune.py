"""Choose block sizes for TPU kernels with the compiler alone: `python -m kernels.tune --chip=v5e`.

Every candidate is compiled; those that overflow VMEM are dropped; the best few by bundles and memory traffic are
walked by libtpu's cycle estimator, which counts spills and transfers; the fastest is written to
kernels/tables/<chip>.json. No device is used, and nobody has compared these estimates with one. Finished measurements
are kept, so that a second run, or one after a kill, is short.
"""

import argparse
import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernels import blocks
from kernels.aot import calls, estimate, jobs, store, tables
from kernels.chips import CHIPS, Chip

FINALISTS = 2  # candidates that the estimator walks; that takes several times as long as compiling
NEAR = 1.02  # candidates this near to the best are as good; of them the shortest program is taken, it compiles sooner


@dataclasses.dataclass(frozen=True)
class Op:
    """What the tuner has to know of an operation: see kernels.aot.jobs.Job for `cases`."""

    name: str
    cases: str
    candidates: str  # module with candidates(program, shape, chip) -> list of block sizes
    simulate: int  # grid steps for the estimator
    # Least and most work of a grid step, see calls.Call.work. Mosaic unrolls a step: 2^30 are 16,000 bundles on v5e,
    # which compile for half a minute.
    work: tuple[int, int]
    programs: tuple[str, ...] = ("forward", "backward")


OPS = {
    op.name: op
    for op in (
        # All its steps cost the same, so a few tell. Steps four times as long as the longest here were 5 % faster and
        # compiled for two minutes, half as long as the shortest 7 % slower (SmolLM-135M on v5e, libtpu 0.0.51).
        Op("cross_entropy", "kernels.cross_entropy.shapes", "kernels.cross_entropy.tpu", 8, (2**29, 2**30)),
        # How many blocks are visible depends on the grid's indices, so the whole grid of some heads is walked.
        Op("attention", "kernels.attention.shapes", "kernels.attention.tpu", 64, (2**29, 2**30)),
    )
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Block sizes and what was found out about them."""

    blocks: dict
    text: str  # the traced program
    work: int = 0  # of the longest step of its kernels
    bundles: jobs.Result | None = None
    cycles: jobs.Result | None = None

    @property
    def length(self) -> int:
        """Bundles of all its kernels."""
        return sum(kernel.bundles for kernel in self.bundles.kernels)


class Tuner:
    """Measures programs of one op on one chip; `done` is called after every measurement."""

    def __init__(self, op: Op, chip: Chip, measurements: store.Store, done=lambda: None):
        self.op, self.chip, self.measurements, self.done = op, chip, measurements, done
        self.cases = importlib.import_module(op.cases)

    def candidates(self, program: str, shape: str) -> list[Candidate]:
        """Return the candidates that are different programs."""
        chosen: dict[str, Candidate] = {}
        fields = self.cases.SHAPES[shape]
        for sizes in importlib.import_module(self.op.candidates).candidates(program, fields, self.chip):
            try:
                function, arguments = self.cases.program(program, fields, "tpu", sizes)
                text = store.traced(function, arguments)
            except ValueError:  # sizes that the kernel itself refuses for this shape
                continue
            encoded = {"kind": type(sizes).__name__, **dataclasses.asdict(sizes)}
            steps = max(call.work for call in calls.find(function, arguments))
            chosen.setdefault(text, Candidate(encoded, text, steps))
        found = sorted(chosen.values(), key=lambda candidate: candidate.work)
        least, most = self.op.work
        reasonable = [candidate for candidate in found if least <= candidate.work <= most]
        # A narrow model has no large steps, a wide one no small ones.
        return reasonable or ([c for c in found if c.work < least][-FINALISTS:] or found[:FINALISTS])

    def tune(self, program: str, shape: str) -> tuple[blocks.Entry | None, list[Candidate]]:
        """Return (the entry for the table, all candidates with their figures); no entry when none compiles."""
        found = self._measure(self.candidates(program, shape), program, shape, "bundles")
        compiled = [candidate for candidate in found if candidate.bundles.error is None]
        compiled.sort(key=lambda candidate: estimate.lower_bound(candidate.bundles.kernels, self.chip))
        # Loops within a step run as often as the data say, which its bundles do not.
        loops = any("2" in kernel.depths for candidate in compiled for kernel in candidate.bundles.kernels)
        finalists = self._measure(compiled if loops else compiled[:FINALISTS], program, shape, "cycles")
        if not finalists:
            return None, found
        # An estimate with transfers beside one without would compare two things.
        finalists = [candidate for candidate in finalists if candidate.cycles.error is None] or finalists
        limit = NEAR * min(map(self.seconds, finalists))
        best = min((c for c in finalists if self.seconds(c) <= limit), key=lambda candidate: candidate.length)
        walked = {candidate.text: candidate for candidate in finalists}
        return self.entry(program, shape, best), [walked.get(candidate.text, candidate) for candidate in found]

    def entry(self, program: str, shape: str, candidate: Candidate) -> blocks.Entry:
        """Return the table's row for measured block sizes."""
        memory = self._run([candidate], program, shape, "memory")[0]
        figures = tables.figures(candidate.bundles, candidate.cycles, memory)
        return blocks.Entry(
            op=self.op.name,
            program=program,
            shape=blocks.fields(self.cases.SHAPES[shape]),
            blocks={name: value for name, value in candidate.blocks.items() if name != "kind"},
            figures={tables.version(): figures},
        )

    def remeasure(self, entry: blocks.Entry) -> blocks.Entry | None:
        """Return the entry with this libtpu's figures for its own block sizes; None when they no longer compile."""
        names = [name for name, value in self.cases.SHAPES.items() if blocks.fields(value) == dict(entry.shape)]
        if not names:
            return None
        fields = self.cases.SHAPES[names[0]]
        kind = type(importlib.import_module(self.op.candidates).candidates(entry.program, fields, self.chip)[0])
        text = store.traced(*self.cases.program(entry.program, fields, "tpu", kind(**entry.blocks)))
        candidate = Candidate({"kind": kind.__name__, **entry.blocks}, text)
        for want in ("bundles", "cycles"):
            (candidate,) = self._measure([candidate], entry.program, names[0], want)
        return None if candidate.bundles.error else self.entry(entry.program, names[0], candidate)

    def seconds(self, candidate: Candidate) -> float:
        """Return the estimated seconds of a candidate whose cycles were asked for."""
        if candidate.cycles.error is None:
            return estimate.walked(candidate.cycles.kernels, self.chip)
        return estimate.lower_bound(candidate.bundles.kernels, self.chip)

    def _measure(self, candidates, program, shape, want):
        results = self._run(candidates, program, shape, want)
        return [dataclasses.replace(c, **{want: result}) for c, result in zip(candidates, results, strict=True)]

    def _run(self, candidates, program, shape, want) -> list[jobs.Result]:
        wanted = []
        for candidate in candidates:
            job = jobs.Job(self.op.cases, program, shape, "tpu", self.chip.name, want, candidate.blocks)
            wanted.append((dataclasses.replace(job, simulate=self.op.simulate), candidate.text))
        results = {}
        for job, result in self.measurements.run(wanted):
            results[store.job_key(job)] = result
            self.done()
        return [results[store.job_key(job)] for job, _ in wanted]


def work(op: Op, only: str | None) -> Iterator[tuple[str, str]]:
    """Yield (program, name of shape) of what is to be tuned."""
    for shape in importlib.import_module(op.cases).SHAPES:
        if only in (None, shape):
            yield from ((program, shape) for program in op.programs)


def row(shape: str, entry: blocks.Entry, chip: Chip) -> list[str]:
    """Return an entry as the cells of a line on the screen."""
    found = entry.figures[tables.version()]["kernels"].values()
    cycles = [kernel["cycles_per_step"] and kernel["cycles_per_step"] * kernel["steps"] for kernel in found]
    time = f"{1e3 * sum(cycles) / chip.clock_hz / chip.cores:.3f}" if all(cycles) else "-"
    sizes = " ".join(f"{name}={value}" for name, value in entry.blocks.items())
    sums = [str(sum(kernel[what] for kernel in found)) for what in ("steps", "bundles", "spills")]
    return [f"{entry.op} {entry.program}", shape, sizes, *sums, time]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    # Programs are traced here and compiled in children; no device is touched, also where there is one.
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    if not tables.version():
        sys.exit("kernels.tune needs libtpu: pip install 'tinyjax[aot]'")
    chip = CHIPS[options.chip]
    file = options.table or tables.path(chip.name)
    measurements = store.Store(store.folder() / f"{chip.name}.jsonl")
    summary = Table("program", "shape", "blocks", "steps", "bundles", "spills", "est. ms", title=_title(chip))
    with Progress(console=console, transient=True) as progress:
        for op in OPS.values() if options.op is None else [OPS[options.op]]:
            todo = list(work(op, options.shape))
            if not todo:
                sys.exit(
                    f"--shape={options.shape}: {op.name} has {', '.join(importlib.import_module(op.cases).SHAPES)}"
                )
            task = progress.add_task(op.name, total=len(todo))
            tuner = Tuner(op, chip, measurements, done=progress.refresh)
            for program, shape in todo:
                progress.update(task, description=f"{op.name} {program} {shape}")
                for entry in _entries(tuner, program, shape, tables.read(file), options.keep, progress.console):
                    tables.write(chip.name, tables.merge(tables.read(file), entry), file)
                    summary.add_row(*row(shape, entry, chip))
                progress.advance(task)
    console.print(summary)


def _entries(tuner, program, shape, table, keep, console):
    """Yield the new entry for a program and shape, if there is one, and say why there is none."""
    if keep:
        fields = blocks.fields(tuner.cases.SHAPES[shape])
        old = [e for e in table if (e.op, e.program, dict(e.shape)) == (tuner.op.name, program, fields)]
        found = [tuner.remeasure(entry) for entry in old]
        yield from filter(None, found)
        return
    entry, candidates = tuner.tune(program, shape)
    if entry is not None:
        yield entry
        return
    reasons = {candidate.bundles.reason for candidate in candidates}
    console.print(f"{tuner.op.name} {program} {shape}: none of {len(candidates)} candidates compiles: {reasons}")


def _title(chip):
    return f"{chip.name}, libtpu {tables.version()}, no device: the compiler's estimates"


def _parser():
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", required=True, choices=CHIPS)
    parser.add_argument("--op", choices=OPS, help="only this operation")
    parser.add_argument("--shape", help="only this shape of the operation's shapes.py")
    parser.add_argument("--keep", action="store_true", help="keep the table's block sizes; add this libtpu's figures")
    parser.add_argument("--table", type=pathlib.Path, help="write this file, not kernels/tables/CHIP.json")
    return parser


if __name__ == "__main__":
    main()
