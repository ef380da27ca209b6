"""What is to be compiled and what came of it, as data that goes through a pipe."""

import dataclasses
import json
from typing import Any, Literal

Want = Literal["memory", "bundles", "cycles"]


@dataclasses.dataclass(frozen=True)
class Job:
    """Compile one program of an op at one shape for one chip.

    `cases` is a module with `SHAPES: dict[str, dataclass]` and `program(name, shape, implementation, blocks) ->
    (callable, ShapeDtypeStructs)`.
    """

    cases: str  # "kernels.cross_entropy.shapes"
    program: str  # "forward", "backward" or "value_and_grad"
    shape: str  # a key of SHAPES
    implementation: str  # "tpu"
    chip: str  # a key of kernels.chips.CHIPS
    want: Want
    # None for the kernel's own choice, or its fields; the implementation's module beside `cases` has a dataclass of
    # the name under "kind".
    blocks: dict[str, Any] | None = None
    simulate: int = 64  # most grid steps of one kernel that the cycle estimator walks; it needs 0.04 s for each


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM of the whole program, per device."""

    temp: int
    arguments: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas call of the program. What was not asked for is None."""

    name: str
    grid: tuple[int, ...]
    traffic: int  # bytes between HBM and VMEM over the whole grid
    prefetched: int  # scalar operands that steer the grid
    bundles: int | None = None  # VLIW bundles inside the grid loop, all branches; one is about one cycle
    depths: dict[str, int] | None = None  # bundles by loop depth; 0 is outside the grid loop
    spills: int | None = None  # vector registers written to and read from spill slots, inside the grid loop
    slots: dict[str, float] | None = None  # share of a unit's issue slots in use, inside the grid loop
    cycles: float | None = None  # of the whole grid on one core, transfers included

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        steps = 1
        for size in self.grid:
            steps *= size
        return steps


Error = Literal["vmem", "chip", "libtpu", "case", "compile", "died", "timeout"]


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a job: `error` is None, or one word, with one line in `reason`."""

    error: Error | None = None
    reason: str = ""
    memory: Memory | None = None
    kernels: tuple[Kernel, ...] = ()


def encode(value: Job | Result) -> str:
    """Return the value as one line of JSON."""
    return json.dumps(dataclasses.asdict(value), sort_keys=True)


def decode_job(line: str) -> Job:
    """Read what `encode` wrote."""
    return Job(**json.loads(line))


def decode_result(line: str) -> Result:
    """Read what `encode` wrote."""
    data = json.loads(line)
    memory = Memory(**data.pop("memory")) if data["memory"] else data.pop("memory")
    kernels = tuple(Kernel(**kernel | {"grid": tuple(kernel["grid"])}) for kernel in data.pop("kernels"))
    return Result(memory=memory, kernels=kernels, **data)
