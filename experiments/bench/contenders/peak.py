"""The matmul peak of the machine, the ceiling that every contender's rate is compared with."""

import time

import jax
import jax.numpy as jnp

from experiments.bench.contenders.serve import serve
from experiments.bench.contenders.workload import Workload

SIZES = (1024, 1536, 2048)  # larger ones leave the cache and are slower


def prepare(work: Workload, options: dict):
    """Return a function that multiplies float32 squares and returns the best rate in FLOP/s."""
    del work, options
    multiply = jax.jit(jnp.matmul)
    squares = [jax.random.normal(jax.random.key(n), (n, n)) for n in SIZES]

    def one():
        best = 0.0
        for x in squares:
            start = time.perf_counter()
            multiply(x, x).block_until_ready()
            best = max(best, 2 * x.shape[0] ** 3 / (time.perf_counter() - start))
        return best

    return one


if __name__ == "__main__":
    serve(prepare)
