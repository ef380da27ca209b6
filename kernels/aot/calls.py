"""The Pallas calls inside a program, taken out so that each can be compiled alone and on a smaller grid."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from kernels.aot import steering

KERNELS = ("pallas_call", "mpmd_map")  # the second is pl.kernel's since JAX 0.11


@dataclasses.dataclass(frozen=True)
class Call:
    """One Pallas call: its equation, and the traced program (or function within it) that it stands in."""

    equation: Any
    program: Any

    @property
    def name(self) -> str:
        return self.equation.params["name"] or "kernel"

    @property
    def mapping(self) -> Any:
        """Pallas' grid mapping; None for a kernel that makes its own pipeline."""
        return self.equation.params.get("grid_mapping")

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.mapping.grid) if self.mapping else ()

    @property
    def prefetched(self) -> int:
        """Scalar operands that are read ahead of the grid and may steer it."""
        return self.mapping.num_index_operands if self.mapping else 0

    @property
    def traffic(self) -> int:
        """Bytes that the grid moves between HBM and VMEM, if a block moves when an index that it depends on does."""
        return sum(_moved(block, self.grid) for block in (self.mapping.block_mappings if self.mapping else ()))

    @property
    def work(self) -> int:
        """Multiplications of one step, all branches; the length of its program on a v5e goes with them.

        2^16 in a matrix product are a bundle. An element of an exponential counts as 256: it stands for the ten or so
        operations of a softmax, four bundles for 1024 elements.
        """
        return sum(map(_multiplications, _equations(self.equation.params["jaxpr"])))

    @property
    def scalars(self) -> list[Any]:
        """What the prefetched operands hold when all inputs of the program are zero."""
        return steering.values(self.program, self.equation.invars[: self.prefetched])

    def alone(self) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
        """Return (function, arguments) of this call only."""
        arguments = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.equation.invars)
        return lambda *arrays: self.equation.primitive.bind(*arrays, **self.equation.params), arguments

    def part(self, grid: tuple[int, ...]) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
        """Return (function, arguments) of this call on a smaller grid, for the cycle estimator.

        The arrays keep their shapes, so blocks, transfers and the code of a step stay those of the whole. Prefetched
        scalars become constants, see `steering`.
        """
        if self.prefetched:
            return steering.unsteered(self.equation, self.scalars, grid)
        if not grid:
            return self.alone()
        params = {**self.equation.params, "grid_mapping": dataclasses.replace(self.mapping, grid=grid)}
        return lambda *arrays: self.equation.primitive.bind(*arrays, **params), self.alone()[1]


def find(function: Callable, arguments: tuple) -> list[Call]:
    """Return the Pallas calls of function(*arguments) in the order of the program, those inside loops once."""
    return list(_calls(jax.make_jaxpr(function)(*arguments)))


def _calls(program) -> Iterator[Call]:
    for equation in program.jaxpr.eqns:
        if equation.primitive.name in KERNELS:
            yield Call(equation, program)
        else:
            for inner in _inner(equation):
                yield from _calls(inner)


def _moved(block, grid):
    """Return the bytes of a block times how often the grid changes the innermost index that its place depends on."""
    jaxpr = block.index_map_jaxpr.jaxpr
    used = {v for v in (*jaxpr.outvars, *(v for e in jaxpr.eqns for v in e.invars)) if not isinstance(v, core.Literal)}
    axes = [axis for axis, v in enumerate(jaxpr.invars[: len(grid)]) if v in used]
    size = math.prod(block.transformed_block_aval.shape) * block.array_aval.dtype.itemsize
    return size * math.prod(grid[: max(axes, default=-1) + 1])


def _multiplications(equation):
    elements = sum(math.prod(getattr(v.aval, "shape", ())) for v in equation.outvars)
    if equation.primitive.name == "dot_general":
        ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
        return elements * math.prod(left[axis] for axis in contracted)
    return 256 * elements if equation.primitive.name in ("exp", "exp2") else 0


def _equations(jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner.jaxpr)


def _inner(equation) -> Iterator[Any]:
    """Yield the programs inside an equation, closed."""
    for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(inner, core.ClosedJaxpr):
                yield inner
            elif isinstance(inner, core.Jaxpr):
                yield core.ClosedJaxpr(inner, ())
