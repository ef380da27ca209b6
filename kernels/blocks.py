"""Block sizes for a shape: those of the nearest shape in the table that `python -m kernels.tune` wrote for the chip."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

# A field that is no size (a flag, a cap, a window that is on or off) and differs counts as much as a size twice as
# large: it changes what a block computes, and so its best size, but less than another order of magnitude would.
OTHER = 1.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table: the block sizes chosen for a program of an op at a shape, and the compiler's figures."""

    op: str  # "cross_entropy"
    program: str  # "forward", "backward"
    shape: Mapping[str, Any]  # the fields of the op's Shape
    blocks: Mapping[str, int]  # the fields of the op's block sizes
    figures: Mapping[str, Mapping[str, Any]]  # by version of libtpu; see kernels/BENCHMARKS.md


def fields(value: Any) -> dict[str, Any]:
    """Return a dataclass, or a mapping, as a dict of its fields."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else dict(value)


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return how far two shapes are apart: the root of the squared log2 ratios of their sizes, plus OTHER per flag."""
    total = 0.0
    for name in a.keys() | b.keys():
        x, y = a.get(name), b.get(name)
        if _size(x) and _size(y):
            total += math.log2(x / y) ** 2
        elif x != y:
            total += OTHER
    return math.sqrt(total)


def _size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def nearest(entries: Sequence[Entry], op: str, program: str, shape: Any) -> Entry | None:
    """Return the entry of this op, program and dtype whose shape is nearest; ties go to the first; None without one.

    `shape` is the op's Shape or a dict of its fields; a field "dtype" has to be equal.
    """
    wanted = fields(shape)
    known = [
        entry
        for entry in entries
        if (entry.op, entry.program) == (op, program) and entry.shape.get("dtype") == wanted.get("dtype")
    ]
    return min(known, key=lambda entry: distance(entry.shape, wanted), default=None)


@functools.cache
def table(chip: str) -> tuple[Entry, ...]:
    """Return the table shipped for a chip ("v5e"); empty when there is none."""
    file = resources.files("kernels") / "tables" / f"{chip}.json"
    if not file.is_file():
        return ()
    return tuple(Entry(**row) for row in json.loads(file.read_text())["entries"])


def measured(op: str, program: str, shape: Any, chip: str | None) -> dict[str, int] | None:
    """Return the block sizes measured for the nearest shape on `chip`, as the fields of the op's dataclass.

    None when the chip is unknown or its table holds nothing for this op, program and dtype: the kernel then uses its
    own default. Sizes are those of the *nearest* shape, so a caller clamps them to its own.
    """
    entry = nearest(table(chip), op, program, shape) if chip else None
    return dict(entry.blocks) if entry else None
