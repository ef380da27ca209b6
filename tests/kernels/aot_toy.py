"""A blocked matrix product, good, impossible and deadly: what the tests of kernels.aot compile in child processes."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


@dataclasses.dataclass(frozen=True)
class Shape:
    m: int
    k: int
    n: int
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Blocks:
    m: int = 256
    k: int = 256

    def __post_init__(self):
        if self.m % 8:
            raise ValueError(f"m must be a multiple of 8, got {self.m}")


SHAPES = {"small": Shape(512, 512, 512), "long": Shape(512, 32768, 256)}


def candidates(program, shape, chip):
    """Return block sizes; the last one overflows VMEM at "long", the second is the same program as the first."""
    del program, chip
    return [Blocks(256, 256), Blocks(256, 256), Blocks(512, 512), Blocks(512, shape.k)]


def program(name, shape, implementation, blocks=None):
    """Return (function, arguments). "dies" and "hangs" do so here, in the process that asks."""
    if name == "dies":
        os.abort()
    if name == "hangs":
        signal.pause()
    if name not in ("forward", "steered", "misshapen"):
        raise ValueError(f"there is no program {name}")
    dtype = jnp.dtype(shape.dtype)
    x, y = (jax.ShapeDtypeStruct(sizes, dtype) for sizes in ((shape.m, shape.k), (shape.k, shape.n)))
    if name == "misshapen":
        return _misshapen, (x,)
    make = _steered if name == "steered" else _product
    return make(shape, blocks or Blocks()), (x, y)


def _product(shape, blocks):
    def product(x_MK, y_KN):
        grid = (shape.m // blocks.m, shape.n // 256, shape.k // blocks.k)
        out = pl.pallas_call(
            _body,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.m, blocks.k), lambda i, j, step: (i, step)),
                pl.BlockSpec((blocks.k, 256), lambda i, j, step: (step, j)),
            ],
            out_specs=pl.BlockSpec((blocks.m, 256), lambda i, j, step: (i, j)),
            out_shape=jax.ShapeDtypeStruct((shape.m, shape.n), x_MK.dtype),
            scratch_shapes=[pltpu.VMEM((blocks.m, 256), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name="product",
        )(x_MK, y_KN)
        return jnp.sin(out)

    return product


def _body(x_ref, y_ref, out_ref, sum_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _steered(shape, blocks):
    """Blocks of x in reverse order, block i added to itself i times (k / 256 as often): a table steers both."""

    def gather(x_MK, y_KN, interpret=False):
        rows = shape.m // blocks.m
        table = jnp.stack([jnp.arange(rows)[::-1], jnp.arange(rows) * max(1, blocks.k // 256)]).astype(jnp.int32) + (
            y_KN[0, 0] != 0
        )
        return pl.pallas_call(
            _gather_body,
            out_shape=jax.ShapeDtypeStruct(x_MK.shape, x_MK.dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(rows,),
                in_specs=[pl.BlockSpec((blocks.m, shape.k), lambda i, table: (table[0, i], 0))],
                out_specs=pl.BlockSpec((blocks.m, shape.k), lambda i, table: (i, 0)),
            ),
            interpret=interpret,
            name="gather",
        )(table, x_MK)

    return gather


def _gather_body(table_ref, x_ref, out_ref):
    out_ref[...] = x_ref[...]

    def add(_, carry):
        out_ref[...] += x_ref[...]
        return carry

    jax.lax.fori_loop(0, table_ref[1, pl.program_id(0)], add, 0)


def _misshapen(x_MK):
    spec = pl.BlockSpec((7, 100), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x_MK.shape, x_MK.dtype)

    def copy(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    return pl.pallas_call(copy, out_shape=shape, grid=(2,), in_specs=[spec], out_specs=spec, name="misshapen")(x_MK)
