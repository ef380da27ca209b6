"""What the TPU kernels do with one tile of transposed logits [bV, bN]; `tpu` cuts the arrays into tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Rows whose softmax is taken at once in the forward pass: the scheduler then overlaps one slice's product with the
# exponentials of another. 5076 bundles for a tile of 512 x 2048 at D = 256 on v5e, 5993 in one piece, 5243 with 128.
SLICE = 256


@dataclasses.dataclass(frozen=True)
class Tile:
    """The sizes of the problem and of one tile, and the arithmetic that all kernels share."""

    n: int
    v: int
    d: int
    block_n: int
    block_v: int
    softcap: float | None
    bias: bool
    filter_eps: float = 0.0

    @property
    def bn(self):
        return min(self.block_n, self.n)

    @property
    def bv(self):
        return min(self.block_v, self.v)

    @property
    def ni(self):
        return -(-self.n // self.bn)

    @property
    def nj(self):
        return -(-self.v // self.bv)

    def skip(self, targets_N):
        """Return int32 [ni]: 1 for blocks in which all targets are ignored."""
        padded_N = jnp.pad(targets_N, (0, self.ni * self.bn - self.n), constant_values=-1)
        return jnp.all(padded_N.reshape(self.ni, self.bn) < 0, axis=1).astype(jnp.int32)

    def logits(self, e_nd, c_vd, bias_1v):
        """Return the capped logits of c's rows, transposed: [V, bN] float32."""
        logits_vn = _product(c_vd, e_nd, (1, 1))
        if bias_1v is not None:
            # A row becomes a column by a product of depth 8, of which one is used.
            shape = (8, c_vd.shape[0])
            first_8v = jnp.where(_iota(shape, 0) == 0, jnp.broadcast_to(bias_1v, shape), 0.0)
            logits_vn += _product(first_8v, jnp.ones((8, self.bn), jnp.float32), (0, 0))
        return logits_vn if self.softcap is None else self.softcap * jnp.tanh(logits_vn * (1 / self.softcap))

    def rows_left(self, j):
        """Return how many rows of block j are of the vocabulary."""
        return self.v - j * self.bv

    def tokens_left(self, i):
        return self.n - i * self.bn


def forward(skip_ref, e_ref, c_ref, *refs, tile):
    """Merge a tile into max, sum of exponentials and logit of the target; write them with the last tile of a row."""
    bias_ref, (target_ref, lse_ref, picked_ref, max_ref, sum_ref, sum_picked_ref) = _split(refs, tile.bias)
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        sum_picked_ref[...] = jnp.zeros_like(sum_picked_ref)

    def step(edge):
        max_1n, sum_1n, picked_1n = max_ref[...], sum_ref[...], sum_picked_ref[...]
        for start in range(0, tile.bv, SLICE):
            rows = slice(start, min(start + SLICE, tile.bv))
            logits_vn = tile.logits(e_ref[...], c_ref[rows], None if bias_ref is None else bias_ref[:, rows])
            row_vn = _iota(logits_vn.shape, 0) + start
            if edge:
                logits_vn = jnp.where(row_vn < tile.rows_left(j), logits_vn, -jnp.inf)
            hit_vn = row_vn == target_ref[...] - j * tile.bv
            picked_1n += jnp.sum(jnp.where(hit_vn, logits_vn, 0.0), axis=0, keepdims=True)
            before_1n = max_1n
            max_1n = jnp.maximum(before_1n, jnp.max(logits_vn, axis=0, keepdims=True))
            sum_1n *= jnp.exp(before_1n - max_1n)
            sum_1n += jnp.sum(jnp.exp(logits_vn - max_1n), axis=0, keepdims=True)
        max_ref[...], sum_ref[...], sum_picked_ref[...] = max_1n, sum_1n, picked_1n

    _steps(step, skip_ref[i] == 0, [(tile.v % tile.bv, j == tile.nj - 1)])

    @pl.when(j == tile.nj - 1)
    def _():
        used = skip_ref[i] == 0
        lse_ref[...] = jnp.where(used, max_ref[...] + jnp.log(sum_ref[...]), 0.0)
        picked_ref[...] = sum_picked_ref[...]


def backward(skip_ref, e_ref, c_ref, *refs, tile, of):
    """Add a tile\'s products to the gradients `of` "e", "c" (and the bias) or "both"; write those that are complete."""
    bias_ref, (target_ref, lse_ref, soft_ref, hot_ref, *refs) = _split(refs, tile.bias)
    outs, scratch = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    outer, inner = pl.program_id(0), pl.program_id(1)
    i, j = (outer, inner) if of == "e" else (inner, outer)
    de_ref = scratch[0] if of in ("e", "both") else None
    dc_ref = scratch[-1 - tile.bias] if of in ("c", "both") else None
    dbias_ref = scratch[-1] if dc_ref is not None and tile.bias else None
    slot = 0 if of == "e" else i

    if de_ref is not None:

        @pl.when(j == 0)
        def _():
            de_ref[slot] = jnp.zeros(de_ref.shape[1:], jnp.float32)

    if dc_ref is not None:

        @pl.when(i == 0)
        def _():
            dc_ref[...] = jnp.zeros_like(dc_ref)
            if dbias_ref is not None:
                dbias_ref[...] = jnp.zeros_like(dbias_ref)

    def step(edge):
        e_nd, c_vd = e_ref[...], c_ref[...]
        row_vn = _iota((tile.bv, tile.bn), 0)
        if edge:
            # What lies outside the arrays is undefined and may be NaN, which a product with 0 would keep.
            e_nd = jnp.where(_iota(e_nd.shape, 0) < tile.tokens_left(i), e_nd, jnp.zeros_like(e_nd))
            c_vd = jnp.where(_iota(c_vd.shape, 0) < tile.rows_left(j), c_vd, jnp.zeros_like(c_vd))
        logits_vn = tile.logits(e_nd, c_vd, None if bias_ref is None else bias_ref[...])
        prob_vn = jnp.exp(logits_vn - lse_ref[...])
        hit_vn = row_vn == target_ref[...] - j * tile.bv
        if edge:
            inside_vn = row_vn < tile.rows_left(j)
            inside_vn = inside_vn & (_iota((tile.bv, tile.bn), 1) < tile.tokens_left(i))
            prob_vn, hit_vn = jnp.where(inside_vn, prob_vn, 0.0), inside_vn & hit_vn

        def products():
            d_vn = prob_vn * soft_ref[...]
            d_vn = jnp.where(hit_vn, d_vn - hot_ref[...], d_vn)
            if tile.softcap is not None:
                d_vn *= 1.0 - jnp.square(logits_vn * (1 / tile.softcap))
            if edge:
                d_vn = jnp.where(inside_vn, d_vn, 0.0)
            if dbias_ref is not None:
                dbias_ref[...] += _product(jnp.ones((8, tile.bn), jnp.float32), d_vn, (1, 1))
            d_vn = d_vn.astype(e_nd.dtype)
            if de_ref is not None:
                de_ref[slot] += _product(d_vn, c_vd, (0, 0))
            if dc_ref is not None:
                dc_ref[...] += _product(d_vn, e_nd, (1, 0))

        if tile.filter_eps:
            # Before the upstream gradient is applied: after a mean over N tokens everything would be below it.
            largest = jnp.max(jnp.where(hit_vn, 1.0 - prob_vn, prob_vn))
            pl.when(largest >= tile.filter_eps)(products)
        else:
            products()

    edges = [(tile.v % tile.bv, j == tile.nj - 1), (tile.n % tile.bn, i == tile.ni - 1)]
    _steps(step, skip_ref[i] == 0, edges)

    if de_ref is not None:

        @pl.when(j == tile.nj - 1)
        def _():
            outs[0][...] = de_ref[slot].astype(outs[0].dtype)

    if dc_ref is not None:

        @pl.when(i == tile.ni - 1)
        def _():
            outs[-1 - tile.bias][...] = dc_ref[...].astype(outs[-1 - tile.bias].dtype)
            if dbias_ref is not None:
                outs[-1][...] = dbias_ref[...]


def _steps(step, used, edges):
    """Run step(edge) if `used`: with masks on the last blocks of axes that the tiles do not divide, else without."""
    at_edge = functools.reduce(jnp.logical_or, [last for ragged, last in edges if ragged], jnp.bool_(False))
    if any(ragged for ragged, _ in edges):
        pl.when(used & at_edge)(lambda: step(True))
    pl.when(used & jnp.logical_not(at_edge))(lambda: step(False))


def _split(refs, bias):
    return (refs[0], refs[1:]) if bias else (None, refs)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _product(x, y, contract):
    """Contract axis contract[0] of x with contract[1] of y into float32; float32 operands keep their bits."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
