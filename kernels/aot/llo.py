"""Reading the compiler's final program of a kernel: VLIW bundles by loop depth, spills, and how full the units are.

A bundle is what the core issues in one cycle, so bundles inside the grid loop bound a grid step's cycles from below if
all its branches run; waits for transfers are not in it. The dumps are text without a specification: this reads those
of libtpu 0.0.42 and 0.0.51 and refuses what looks different.
"""

import collections
import dataclasses
import pathlib
import re

# "  0x14 LB: > { ...": address, kind of block, one ">" per loop around it, operations.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:((?:\s*>)*)\s*\{")


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one kernel; `bundles`, `spills` and `slots` are of what lies inside its outermost loop, the grid."""

    bundles: int
    depths: dict[str, int]
    spills: int
    slots: dict[str, float]


def depths_of(bundles: str) -> list[int]:
    """Return the loop depth of every bundle in a `final_bundles` dump."""
    return [m[1].count(">") for m in map(_BUNDLE.match, bundles.splitlines()) if m]


def slots_of(utilization: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Return (issue slots per unit, slots used per bundle and unit) of a `static-per-bundle-utilization` dump."""
    _, names, capacities, _, *rows = utilization.splitlines()
    names = [name.strip() for name in names.split(",")]
    capacity = dict(zip(names, map(int, capacities.split()), strict=True))
    return capacity, [dict(zip(names, map(int, row.split()), strict=True)) for row in rows if row.strip()]


def report(bundles: str, utilization: str) -> Report:
    """Join the two dumps of one kernel. Raises ValueError when they are not of the same program."""
    depths = depths_of(bundles)
    capacity, used = slots_of(utilization)
    if not depths or len(depths) != len(used):
        raise ValueError(f"{len(depths)} bundles but {len(used)} rows of slots: libtpu writes another format")
    outermost = min(1, max(depths))  # a grid of one step has no loop: then everything is the step
    inside = [row for depth, row in zip(depths, used, strict=True) if depth >= outermost]
    totals = {name: sum(row[name] for row in inside) for name in capacity}
    return Report(
        bundles=len(inside),
        depths={str(depth): count for depth, count in sorted(collections.Counter(depths).items())},
        spills=totals["VSTORE:SPILL"] + totals["VLOAD:FILL"],
        slots={name: round(totals[name] / (capacity[name] * len(inside)), 4) for name in capacity},
    )


def read(folder: pathlib.Path, name: str) -> Report:
    """Report on the kernel dumped into `folder` under `name`. Raises ValueError when there is not exactly one."""
    programs = [path for path in folder.glob(f"*-{name}*final_bundles.txt") if "schedule-analysis" not in path.name]
    slots = list(folder.glob(f"*-{name}*final_hlo-static-per-bundle-utilization.txt"))
    if len(programs) != 1 or len(slots) != 1:
        raise ValueError(f"libtpu wrote {len(programs)} programs and {len(slots)} tables of slots for {name}")
    return report(programs[0].read_text(), slots[0].read_text())
