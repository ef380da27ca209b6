"""Our kernels and rivals compiled for a TPU that is not here: memory, bundles, estimated time, its ratio to ours."""

import dataclasses
import importlib

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kernels import blocks
from kernels.aot import jobs, parent
from kernels.chips import CHIPS
from kernels.tune import OPS

RIVALS = {"cross_entropy": "tokamax", "attention": "splash"}
# A step of training is both of our primitives, each with the blocks of the table.
PARTS = {"forward": ("forward",), "value_and_grad": ("forward", "backward")}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one program; None where the compiler gave none, `why` then says the first reason."""

    temp: int | None
    bundles: int | None
    seconds: float | None
    why: str


def main(chip: str, op: str | None, shape: str | None, console: Console) -> None:
    """Print a table per operation. Exits with a line when there is no such shape."""
    jax.config.update("jax_platforms", "cpu")  # children compile; no device is touched, also where there is one
    for name in OPS if op is None else [op]:
        known = importlib.import_module(OPS[name].cases).SHAPES
        shapes = [s for s in known if shape in (None, s)]
        if not shapes:
            raise SystemExit(f"--shape={shape}: {name} has {', '.join(known)}")
        table = Table("shape", "program", "of", "temp MiB", "bundles", "est. ms", "ratio", title=f"{name} on {chip}")
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=2 * len(shapes) * len(PARTS))
            for one in shapes:
                for program in PARTS:
                    measured = {}
                    for who, make in (("tinyjax", ours), (RIVALS[name], theirs)):
                        progress.update(task, description=f"{one} {program} {who}")
                        measured[who] = make(name, one, program, chip)
                        progress.advance(task)
                        table.add_row(one, program, who, *cells(measured[who], measured["tinyjax"].seconds))
        console.print(table)


def ours(op: str, shape: str, program: str, chip: str) -> Figures:
    """Return the figures of our kernels with the block sizes of the chip's table."""
    job = jobs.Job(OPS[op].cases, program, shape, "tpu", chip, "memory", simulate=OPS[op].simulate)
    fields = importlib.import_module(OPS[op].cases).SHAPES[shape]
    parts = []
    for part in PARTS[program]:
        sizes = blocks.measured(op, part, fields, chip)
        sizes = {"kind": "Blocks", **sizes} if sizes else None
        parts.append(dataclasses.replace(job, program=part, blocks=sizes))
    return _figures(job, parts)


def theirs(op: str, shape: str, program: str, chip: str) -> Figures:
    """Return the figures of the op's rival with the block sizes that it chooses."""
    name = RIVALS[op]
    job = jobs.Job("kernels.bench.rivals", program, f"{op}, {shape}", name, chip, "memory", simulate=OPS[op].simulate)
    return _figures(job, [job])


def _figures(whole: jobs.Job, parts: list[jobs.Job]) -> Figures:
    wanted = [whole, *(dataclasses.replace(part, want=want) for want in ("bundles", "cycles") for part in parts)]
    results = list(parent.run(wanted))
    why = next((result.reason for _, result in results if result.error), "")

    def total(want, figure):
        found = [result for job, result in results if job.want == want]
        kernels = [kernel for result in found for kernel in result.kernels]
        return None if any(result.error for result in found) or not kernels else sum(map(figure, kernels))

    memory = results[0][1].memory
    chip = CHIPS[whole.chip]
    cycles = total("cycles", lambda kernel: kernel.cycles)
    return Figures(
        temp=memory and memory.temp,
        bundles=total("bundles", lambda kernel: kernel.bundles),
        seconds=cycles and cycles / chip.clock_hz / chip.cores,
        why=why,
    )


def cells(figures: Figures, ours: float | None) -> list[str]:
    """Return temp MiB, bundles, ms and their ratio to ours as text; in place of a time that is not known, why."""
    return [
        "-" if figures.temp is None else f"{figures.temp / 2**20:.1f}",
        str(figures.bundles or "-"),
        f"{1e3 * figures.seconds:.3f}" if figures.seconds else figures.why[:60],
        f"{figures.seconds / ours:.2f}" if figures.seconds and ours else "-",
    ]
