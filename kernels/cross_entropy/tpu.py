"""Pallas for TPU: tiles of logits live in VMEM only, in the transposed form [bV, bN].

Transposed, the softmax runs over sublanes (plain vector operations, no cross-lane unit), and everything that belongs to
a token (target, log-sum-exp, weights) is a row [1, bN]: a column [N, 1] would fill one lane of 128 in HBM.

The grid runs in order on a core, so sums over tiles are kept in VMEM between steps: no atomics, the same bits each run.
The backward pass is one kernel, which computes each tile once and holds the whole gradient of e in VMEM, where that
fits; else two kernels, one per gradient, which both compute all tiles.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import chips
from kernels.blocks import measured
from kernels.cross_entropy import tpu_kernels

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes in tokens (n) and rows of the classifier (v): multiples of 128, cut to N and V where these are less.

    resident: (backward) hold the gradient of e in VMEM, N D 4 bytes, for a backward pass of one kernel.
    vmem: bytes of VMEM that a kernel may take.
    """

    n: int = 512
    v: int = 512
    resident: bool = False
    vmem: int = 56 << 20

    def __post_init__(self):
        for name in ("n", "v"):
            if getattr(self, name) < LANES or getattr(self, name) % LANES:
                raise ValueError(f"{name} must be a positive multiple of {LANES}, got {getattr(self, name)}")

    def bytes_needed(self, n: int, d: int, v: int, itemsize: int, program: str) -> int:
        """Return an estimate of the VMEM that `program` ("forward", "backward") takes: windows, sums, one tile."""
        d = -(-d // LANES) * LANES
        windows = 2 * (min(self.n, n) + min(self.v, v)) * d * itemsize
        tile = 4 * min(self.n, n) * min(self.v, v) * 4
        if program == "forward":
            return windows + tile
        tokens = -(-n // self.n) * self.n if self.resident else min(self.n, n)
        return 2 * windows + tile + (tokens + min(self.v, v)) * d * 4


def supports(e_ND, c_VD) -> str | None:
    """Return None if the kernels serve these arrays, else why not."""
    for name, x in (("e", e_ND), ("c", c_VD)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} must be bfloat16 or float32, got {x.dtype}"
    if e_ND.dtype != c_VD.dtype:
        return f"e and c must have one dtype, got {e_ND.dtype} and {c_VD.dtype}"
    if e_ND.shape[1] > 16384:
        return f"D is at most 16384, got {e_ND.shape[1]}"
    return None


def choose_blocks(program: str, n: int, d: int, v: int, dtype) -> Blocks:
    """Return the blocks measured for the nearest shape on this chip, or a default, made to fit its VMEM.

    On a chip with two cores only a backward pass of two kernels can use both.
    """
    dtype = jnp.dtype(dtype)
    chip = chips.of_device_kind(jax.devices()[0].device_kind)
    shape = {"n": n, "d": d, "v": v, "dtype": dtype.name}
    found = measured("cross_entropy", program, shape, chip.name if chip else None)
    if found is not None:
        blocks = Blocks(**found)
    else:
        one_core = chip is not None and chip.cores == 1
        blocks = Blocks(n=1024 if program == "forward" else 512, resident=one_core and program == "backward")
    while blocks.bytes_needed(n, d, v, dtype.itemsize, program) > blocks.vmem:
        if blocks.resident:
            blocks = dataclasses.replace(blocks, resident=False)
        elif blocks.n > LANES or blocks.v > LANES:
            smaller = {"n": blocks.n // 2} if blocks.n >= blocks.v else {"v": blocks.v // 2}
            blocks = dataclasses.replace(blocks, **{k: max(LANES, x // LANES * LANES) for k, x in smaller.items()})
        else:
            break
    return blocks


def candidates(program: str, shape, chip) -> list[Blocks]:
    """Return the blocks that the tuner tries for `program` at shape.{n, d, v, dtype} on a `chips.Chip`."""
    itemsize = jnp.dtype(shape.dtype).itemsize
    # The rest is for what XLA itself keeps in VMEM: with 15/16 taken, some programs around a kernel did not fit.
    limit = chip.vmem_bytes * 3 // 4
    resident = (False, True) if program == "backward" and chip.cores == 1 else (False,)
    tried = [
        Blocks(n=n, v=v, resident=whole, vmem=limit)
        for whole in resident
        for n in (256, 512, 1024, 2048)
        for v in (256, 512, 1024, 2048)
        if n < 2 * shape.n and v < 2 * shape.v
    ]
    return [blocks for blocks in tried if blocks.bytes_needed(shape.n, shape.d, shape.v, itemsize, program) <= limit]


def forward(e_ND, c_VD, bias_V, targets_N, *, softcap=None, blocks=None, interpret=False):
    """Return (lse_N, logit of the target_N) in float32; 0 for blocks of tokens whose targets are all -1."""
    (n, d), v = e_ND.shape, c_VD.shape[0]
    blocks = blocks or choose_blocks("forward", n, d, v, e_ND.dtype)
    tile = tpu_kernels.Tile(n, v, d, blocks.n, blocks.v, softcap, bias_V is not None)
    row = pl.BlockSpec((1, tile.bn), lambda i, j, skip: (0, i))
    lse_1N, picked_1N = pl.pallas_call(
        functools.partial(tpu_kernels.forward, tile=tile),
        out_shape=[jax.ShapeDtypeStruct((1, n), jnp.float32)] * 2,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.ni, tile.nj),
            in_specs=[
                pl.BlockSpec((tile.bn, d), lambda i, j, skip: (i, 0)),
                pl.BlockSpec((tile.bv, d), lambda i, j, skip: (j * (1 - skip[i]), 0)),
                *_bias_spec(tile, lambda i, j, skip: (0, j * (1 - skip[i]))),
                row,
            ],
            out_specs=[row, row],
            scratch_shapes=[pltpu.VMEM((1, tile.bn), jnp.float32)] * 3,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem
        ),
        cost_estimate=_cost(e_ND, c_VD, products=1, reads=tile.ni),
        interpret=interpret,
        name="cross_entropy_forward",
    )(tile.skip(targets_N), e_ND, c_VD, *_bias_row(bias_V), targets_N[None])
    return lse_1N[0], picked_1N[0]


def backward(
    e_ND,
    c_VD,
    bias_V,
    targets_N,
    lse_N,
    soft_N,
    hot_N,
    *,
    softcap=None,
    filter_eps=0.0,
    accumulate=None,
    blocks=None,
    interpret=False,
):
    """Return (de_ND, dc_VD, dbias_V or None) for d(logit) = soft * softmax - hot * onehot.

    All sums are kept in float32 in VMEM until they are complete, so `accumulate` has nothing to choose.
    """
    del accumulate
    (n, d), v = e_ND.shape, c_VD.shape[0]
    blocks = blocks or choose_blocks("backward", n, d, v, e_ND.dtype)
    tile = tpu_kernels.Tile(n, v, d, blocks.n, blocks.v, softcap, bias_V is not None, filter_eps)
    rows = [targets_N[None], *(x_N[None].astype(jnp.float32) for x_N in (lse_N, soft_N, hot_N))]
    operands = (tile.skip(targets_N), e_ND, c_VD, *_bias_row(bias_V), *rows)
    call = functools.partial(_backward_call, tile=tile, operands=operands, blocks=blocks, interpret=interpret)
    if blocks.resident:
        return _with_bias(call("both"), bias_V)
    (de_ND,) = call("e")
    return _with_bias((de_ND, *call("c")), bias_V)


def _with_bias(gradients, bias_V):
    if bias_V is None:
        return *gradients, None
    de_ND, dc_VD, dbias_8V = gradients
    return de_ND, dc_VD, dbias_8V[0].astype(bias_V.dtype)


def _backward_call(of, *, tile, operands, blocks, interpret):
    """Run the kernel for the gradients `of` "e", "c" (and the bias) or "both"; the inner grid axis is summed over."""
    e_ND, c_VD = operands[1], operands[2]
    n, d, v, bn, bv = tile.n, tile.d, tile.v, tile.bn, tile.bv
    tokens_outside = of == "e"
    at = (
        (lambda f: lambda i, j, skip: f(i, j, skip)) if tokens_outside else (lambda f: lambda j, i, skip: f(i, j, skip))
    )
    row = pl.BlockSpec((1, bn), at(lambda i, j, skip: (0, i)))
    e_spec = pl.BlockSpec((bn, d), at(lambda i, j, skip: (i, 0)))
    c_index = (lambda i, j, skip: j * (1 - skip[i])) if tokens_outside else (lambda i, j, skip: j)
    out_shapes, out_specs, scratch = [], [], []
    if of in ("e", "both"):
        out_shapes.append(jax.ShapeDtypeStruct((n, d), e_ND.dtype))
        # With the vocabulary outside, a block of de is complete in the last round only: until then the window stays at
        # the first block, so that nothing unfinished is written out.
        window = (lambda i, j, skip: (i, 0)) if tokens_outside else (lambda i, j, skip: (i * (j == tile.nj - 1), 0))
        out_specs.append(pl.BlockSpec((bn, d), at(window)))
        scratch.append(pltpu.VMEM((1 if tokens_outside else tile.ni, bn, d), jnp.float32))
    if of in ("c", "both"):
        out_shapes.append(jax.ShapeDtypeStruct((v, d), c_VD.dtype))
        out_specs.append(pl.BlockSpec((bv, d), at(lambda i, j, skip: (j, 0))))
        scratch.append(pltpu.VMEM((bv, d), jnp.float32))
        if tile.bias:
            out_shapes.append(jax.ShapeDtypeStruct((8, v), jnp.float32))
            out_specs.append(pl.BlockSpec((8, bv), at(lambda i, j, skip: (0, j))))
            scratch.append(pltpu.VMEM((8, bv), jnp.float32))
    outer = "arbitrary" if of == "both" else "parallel"
    return pl.pallas_call(
        functools.partial(tpu_kernels.backward, tile=tile, of=of),
        out_shape=out_shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.ni, tile.nj) if tokens_outside else (tile.nj, tile.ni),
            in_specs=[
                e_spec,
                pl.BlockSpec((bv, d), at(lambda i, j, skip: (c_index(i, j, skip), 0))),
                *_bias_spec(tile, at(lambda i, j, skip: (0, c_index(i, j, skip)))),
                *[row] * 4,
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=(outer, "arbitrary"), vmem_limit_bytes=blocks.vmem),
        cost_estimate=_cost(e_ND, c_VD, products=3 if of == "both" else 2, reads=tile.ni if tokens_outside else 1),
        interpret=interpret,
        name=f"cross_entropy_backward_{of}",
    )(*operands)


def _bias_row(bias_V):
    # A product in float32 is made of parts x - bfloat16(x), which are NaN for -inf; -1e30 is as impossible a token.
    return () if bias_V is None else (jnp.maximum(bias_V[None].astype(jnp.float32), -1e30),)


def _bias_spec(tile, index):
    return [pl.BlockSpec((1, tile.bv), index)] if tile.bias else []


def _cost(e_ND, c_VD, products, reads):
    (n, d), v = e_ND.shape, c_VD.shape[0]
    item = e_ND.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * products * n * v * d, transcendentals=n * v, bytes_accessed=(n * d + reads * v * d) * item
    )
