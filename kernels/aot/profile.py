"""The compiler's estimate of a kernel's cycles, transfers included, from a part of its grid.

libtpu can walk a kernel's grid with a model of the units and of the memory system. That takes 0.04 s per step, so the
grid is cut: its inner axes are walked whole, one axis at two lengths, and the difference is what each further round
costs. Scalar operands count as 0 there, which decides whether a kernel that steers by them is described at all.
"""

import dataclasses
import math
import pathlib
import re


@dataclasses.dataclass(frozen=True)
class Plan:
    """Grids to walk: one, which is the whole, or two whose difference is that of `rounds[1] - rounds[0]` rounds."""

    grids: tuple[tuple[int, ...], ...]
    rounds: tuple[int, ...] = ()
    total: int = 0  # rounds in the whole grid


def plan(grid: tuple[int, ...], steps: int) -> Plan:
    """Return the grids to walk for an estimate of `grid`, each of about `steps` steps at most.

    A round is one index of the outermost axis that is cut, with all axes inside it whole.
    """
    if math.prod(grid) <= steps:
        return Plan((grid,))
    axis = next(k for k in range(len(grid)) if math.prod(grid[k + 1 :]) <= steps)
    inside = math.prod(grid[axis + 1 :])
    few = max(1, steps // (2 * inside))
    grids = tuple((1,) * axis + (n,) + grid[axis + 1 :] for n in (few, 2 * few))
    return Plan(grids, (few, 2 * few), math.prod(grid[: axis + 1]))


def total(plan: Plan, cycles: list[int]) -> float:
    """Return the cycles of the whole grid from those of the plan's grids."""
    if not plan.rounds:
        return float(cycles[0])
    slope = (cycles[1] - cycles[0]) / (plan.rounds[1] - plan.rounds[0])
    return cycles[0] + slope * (plan.total - plan.rounds[0])


def read(folder: pathlib.Path, name: str) -> int:
    """Return the estimated cycles of the program compiled as `name`. Raises ValueError when there is no estimate."""
    found = list(folder.glob(f"{name}*_static_llo_profile.textproto"))
    cycles = [int(m) for path in found for m in re.findall(r"estimated_cycles: (\d+)", path.read_text())]
    if len(cycles) != 1:
        raise ValueError(f"libtpu wrote {len(cycles)} estimates for {name}")
    return cycles[0]
