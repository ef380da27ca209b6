"""The tables of block sizes as files, and what counts as worse than the figures in them."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

from kernels import blocks
from kernels.aot import jobs

# Rise over the table that the gate lets pass: one scalar operation more in a step of 500 bundles is not a loss.
TOLERANCE = 0.02


def path(chip: str) -> pathlib.Path:
    """Return where the table of a chip is in this checkout."""
    return pathlib.Path(__file__).parents[1] / "tables" / f"{chip}.json"


def write(chip: str, entries: Iterable[blocks.Entry], file: pathlib.Path | None = None) -> None:
    """Write the table of a chip, sorted, in one step."""
    file = file or path(chip)
    rows = [dataclasses.asdict(entry) for entry in entries]
    rows.sort(key=lambda row: (row["op"], row["program"], json.dumps(row["shape"], sort_keys=True)))
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    text = f'{{"chip": "{chip}", "entries": [\n{lines}\n]}}\n'
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)


def read(file: pathlib.Path) -> tuple[blocks.Entry, ...]:
    """Return the entries of a table file; none when it is not there yet."""
    if not file.is_file():
        return ()
    return tuple(blocks.Entry(**row) for row in json.loads(file.read_text())["entries"])


def merge(entries: Iterable[blocks.Entry], new: blocks.Entry) -> tuple[blocks.Entry, ...]:
    """Return the entries with `new` in place of the one for its shape.

    Figures of other versions of libtpu are kept while the block sizes stay what they are.
    """
    kept = []
    for old in entries:
        if (old.op, old.program, dict(old.shape)) != (new.op, new.program, dict(new.shape)):
            kept.append(old)
        elif dict(old.blocks) == dict(new.blocks):
            new = dataclasses.replace(new, figures={**old.figures, **new.figures})
    return (*kept, new)


def version() -> str:
    """Return the version of libtpu here; "" without it."""
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return ""


def figures(bundles: jobs.Result, cycles: jobs.Result, memory: jobs.Result) -> dict[str, Any]:
    """Return what a table keeps of the three results for one program.

    cycles_per_step is None where the estimator cannot walk the kernel.
    """
    walked = {kernel.name: kernel for kernel in cycles.kernels}
    return {
        "jax": metadata.version("jax"),
        "temp_bytes": memory.memory.temp if memory.memory else None,
        "kernels": {
            kernel.name: {
                "steps": kernel.steps,
                "bundles": kernel.bundles,
                "spills": kernel.spills,
                "cycles_per_step": round(walked[kernel.name].cycles / kernel.steps, 1)
                if kernel.name in walked
                else None,
            }
            for kernel in bundles.kernels
        },
    }


def worse(table: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every figure of `now` that is worse than the table's. Both are what `figures` returns."""
    if (table["temp_bytes"] or 0) * (1 + TOLERANCE) < (now["temp_bytes"] or 0):
        yield f"temp_bytes {table['temp_bytes']} -> {now['temp_bytes']}"
    if table["kernels"].keys() != now["kernels"].keys():
        yield f"kernels {', '.join(table['kernels'])} -> {', '.join(now['kernels'])}"
    for name in table["kernels"].keys() & now["kernels"].keys():
        old, new = table["kernels"][name], now["kernels"][name]
        for what in ("bundles", "spills", "cycles_per_step"):
            # The same steps do not hide a finer grid: more steps of fewer cycles are compared by their product.
            factor = 1 if what == "spills" else new["steps"] / old["steps"]
            if old[what] is None or new[what] is None:
                if old[what] is not None:
                    yield f"{name}: {what} {old[what]} -> not known any more"
            elif new[what] * factor > old[what] * (1 + TOLERANCE):
                yield f"{name}: {what} {old[what]} -> {new[what]} ({old['steps']} -> {new['steps']} steps)"
