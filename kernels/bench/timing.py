"""Compiling, timing and arguments for what is timed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program with its arguments, and the bytes of temporary memory the compiler gave it (None: unknown)."""

    call: Callable
    arguments: tuple
    temp: int | None


def compile(function: Callable, arguments: tuple, seed: int = 0) -> Compiled:
    """Compile function for this backend and make its arguments: normal floats, integers from 0 to 255."""
    random = np.random.RandomState(seed)

    def make(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            # Sorted, so that as segment ids they are documents, and as targets they are tokens of the vocabulary.
            return jnp.asarray(np.sort(random.randint(0, 256, x.shape), axis=-1), x.dtype)
        return jnp.asarray(random.standard_normal(x.shape) * 0.1, x.dtype)

    made = jax.tree.map(make, arguments)
    compiled = jax.jit(function).lower(*made).compile()
    memory = compiled.memory_analysis()
    return Compiled(compiled, made, memory.temp_size_in_bytes if memory else None)


def in_turn(programs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each program over `repeats` rounds in which every one runs once, after a warm-up.

    What slows the machine for a while so slows all of them. A program's result has `block_until_ready`, or is a tree of
    such, or the program waits itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round in range(WARM_UP + repeats):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
