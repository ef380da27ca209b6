"""Kernels that read scalars ahead of their grid, rewritten so that the cycle estimator can walk them.

The estimator knows no transfer to scalar memory and ends the process when it meets one. So the scalar operands become
constants: their values for inputs that are all zero, which the kernel stores into scratch at its first step.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core


def values(jaxpr: Any, variables: Sequence[Any]) -> list[np.ndarray]:
    """Return what `variables` of a traced program hold when all its inputs are zero."""
    needed, equations = {v for v in variables if not isinstance(v, core.Literal)}, []
    for equation in reversed(jaxpr.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            equations.append(equation)
            needed.update(v for v in equation.invars if not isinstance(v, core.Literal))
    held = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    for variable in jaxpr.jaxpr.invars:
        if variable in needed:
            held[variable] = jnp.zeros(variable.aval.shape, variable.aval.dtype)
    _evaluate(reversed(equations), held)
    return [np.asarray(_value(held, variable)) for variable in variables]


def check(scalars: Sequence[np.ndarray], libtpu: str) -> None:
    """Raise ValueError when libtpu's estimator would not see these constants.

    0.0.42 takes whatever is read from scalar memory for 0: a loop of 100 rounds cost as much as one of none. With
    0.0.51 cycles grew in proportion to the rounds.
    """
    numbers = [int(part) for part in libtpu.split(".") if part.isdigit()]
    if numbers and numbers < [0, 0, 50] and any(scalar.any() for scalar in scalars):
        raise ValueError(f"the cycle estimator of libtpu {libtpu} takes all scalars for 0, this kernel's are not")


def unsteered(equation: Any, scalars: Sequence[np.ndarray], grid: tuple[int, ...]) -> tuple[Callable, tuple]:
    """Return (function, arguments) of a Pallas call in which its prefetched operands are the constants `scalars`."""
    params, n = equation.params, len(scalars)
    mapping, kernel = params["grid_mapping"], params["jaxpr"]
    specs = [_spec(block, scalars) for block in mapping.block_mappings]
    outputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.outvars]

    def body(*refs):
        rest, memory = refs[:-n], refs[-n:]
        first = [pl.program_id(axis) == 0 for axis in range(len(grid))]

        @pl.when(math.prod(first))
        def _():
            for ref, scalar in zip(memory, scalars, strict=True):
                for index in np.ndindex(scalar.shape):
                    ref[index] = jnp.asarray(scalar[index].item(), scalar.dtype)

        _evaluate(kernel.eqns, dict(zip(kernel.invars, (*memory, *rest), strict=True)))

    function = pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs[: mapping.num_inputs],
        out_specs=specs[mapping.num_inputs :],
        out_shape=outputs,
        scratch_shapes=[
            *(ref.memory_space(ref.shape, ref.dtype) for ref in mapping.scratch_avals),
            *(pltpu.SMEM(scalar.shape, scalar.dtype) for scalar in scalars),
        ],
        compiler_params=_semantics(params["compiler_params"], mapping.vmapped_dims),
        interpret=params["interpret"],
        name=params["name"],
    )
    return function, tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars[n:])


def _semantics(compiler_params, vmapped):
    """Return the parameters with the meaning of the axes that vmap added to the grid."""
    semantics = getattr(compiler_params, "dimension_semantics", None)
    if not semantics or not vmapped:
        return compiler_params
    semantics = list(semantics)
    for axis in vmapped:
        semantics.insert(axis, "parallel")
    return dataclasses.replace(compiler_params, dimension_semantics=tuple(semantics))


def _spec(block, scalars):
    def index_map(*indices):
        jaxpr = block.index_map_jaxpr
        refs = jaxpr.jaxpr.invars[len(indices) :]
        held = dict(zip(jaxpr.jaxpr.invars, indices, strict=False))
        _evaluate(jaxpr.jaxpr.eqns, held, dict(zip(refs, scalars, strict=True)))
        return tuple(_value(held, v) for v in jaxpr.jaxpr.outvars)

    space = block.transformed_block_aval.memory_space
    return pl.BlockSpec(block.block_shape, index_map, memory_space=space, pipeline_mode=block.pipeline_mode)


def _value(held, variable):
    return variable.val if isinstance(variable, core.Literal) else held[variable]


def _evaluate(equations, held, scalars=()):
    """Run equations on the values in `held`; reads of a reference in `scalars` give the constants it stands for."""
    for equation in equations:
        if equation.primitive.name == "get" and equation.invars[0] in scalars:
            leaves = [_value(held, v) for v in equation.invars[1:]]
            (indexer,) = jax.tree.unflatten(equation.params["tree"], leaves)
            results = [_look_up(scalars[equation.invars[0]], indexer.indices)]
        else:
            params = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*(_value(held, v) for v in equation.invars), **params)
            results = results if equation.primitive.multiple_results else [results]
        held.update(zip(equation.outvars, results, strict=True))


def _look_up(table, indices):
    """Return table[indices] without memory, by comparing: an index map has none."""
    if (table == table.flat[0]).all():
        return jnp.asarray(table.flat[0].item(), table.dtype)
    found = jnp.asarray(0, table.dtype)
    for index in itertools.product(*map(range, table.shape)):
        hit = math.prod(jnp.asarray(i == k, jnp.int32) for i, k in zip(indices, index, strict=True))
        found += hit * table[index].item()
    return found
