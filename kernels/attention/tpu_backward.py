"""The backward pass on TPU in one kernel: keys, values and their gradients stay in VMEM while queries pass by."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_parts import LOG2E, MASKED, dot, for_visited_blocks, in_key_lanes, scores, visible
from kernels.attention.tpu_plan import Plan, span


def backward_kernel(plan: Plan, arrays: dict, vmem_limit: int, interpret):
    """Return (dq [B, S, H A], dk, dv [B, T, K A]) for padded `arrays`, see `tpu.arranged`."""
    b = arrays["q"].shape[0]
    bq, heads, a = plan.blocks.q, plan.cluster_heads, plan.width_padded
    q_spec = pl.BlockSpec((1, bq, heads * a), lambda b, c, i, *_: (b, i, c))
    kv_spec = pl.BlockSpec(
        (1, plan.t_padded, plan.cluster * a), lambda b, c, i, *_: (b, 0, c), pipeline_mode=pl.Buffered(plan.buffers)
    )
    row_spec = pl.BlockSpec((1, 1, heads, bq), lambda b, c, i, *_: (b, c, 0, i))
    specs = {
        "q": q_spec,
        "k": kv_spec,
        "v": kv_spec,
        "q_segments": pl.BlockSpec((1, 1, bq), lambda b, c, i, *_: (b, 0, i)),
        "kv_segments": pl.BlockSpec((1, plan.kv_blocks, plan.blocks.kv), lambda b, c, i, *_: (b, 0, 0)),
        "dout": q_spec,
        "lse": row_spec,
        "delta": row_spec,
    }
    blocks = [name for name in specs if name in arrays]
    names = ("visits", *blocks, "dq", "dk", "dv", "q_lanes", "dout_lanes", "dq_sum", "dk_sum", "dv_sum")
    lanes = pltpu.VMEM((heads, bq, max(128, a)), arrays["q"].dtype)
    sums = pltpu.VMEM((plan.t_padded, plan.cluster * a), jnp.float32)

    def kernel(*refs):
        _kernel(plan, dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, plan.clusters, plan.q_blocks),
            in_specs=[specs[name] for name in blocks],
            out_specs=[q_spec, kv_spec, kv_spec],
            scratch_shapes=[lanes, lanes, pltpu.VMEM((heads * a, bq), jnp.float32), sums, sums],
        ),
        out_shape=[jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype) for name in ("q", "k", "v")],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        name="attention_backward",
        interpret=interpret,
    )(arrays["visits"], *(arrays[name] for name in blocks))


def _kernel(plan, refs):
    heads, a, bk = plan.cluster_heads, plan.width_padded, plan.blocks.kv
    i = pl.program_id(2)
    q_ref, dout_ref, dq_ref, dk_ref, dv_ref = (
        refs[name] for name in ("q_lanes", "dout_lanes", "dq_sum", "dk_sum", "dv_sum")
    )

    @pl.when(i == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    for x in range(heads):
        theirs = span(x // plan.group, plan.cluster, a)
        wide = theirs.stop - theirs.start
        q_ref[x, :, :wide] = in_key_lanes(plan, refs["q"], x)
        dout_ref[x, :, :wide] = in_key_lanes(plan, refs["dout"], x)
    dq_ref[...] = jnp.zeros_like(dq_ref)
    lse = refs["lse"][0, 0] * LOG2E
    # A row that sees nothing has only masked scores, whose exponential is to be 0.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    delta = refs["delta"][0, 0]

    def step(j, masked):
        rows = pl.ds(pl.multiple_of(j * bk, bk), bk)
        mask = visible(plan, i, j, refs.get("q_segments"), refs.get("kv_segments")) if masked else None
        for x in range(heads):
            theirs = span(x // plan.group, plan.cluster, a)
            tile, wide = slice(theirs.start, theirs.stop), theirs.stop - theirs.start
            k, v = refs["k"][0, rows, tile], refs["v"][0, rows, tile]
            q, dout = q_ref[x, :, :wide], dout_ref[x, :, :wide]
            score, passed = scores(plan, k, q)
            if masked:
                score = jnp.where(mask, score, MASKED)
            weights = jnp.exp2(score - lse[x : x + 1])
            dscore = weights * (dot(v, dout, (1, 1)) - delta[x : x + 1])
            if passed is not None:
                dscore = dscore * passed
            dscore = dscore.astype(q.dtype)
            dv_ref[rows, tile] += dot(weights.astype(dout.dtype), dout, (1, 0))
            dk_ref[rows, tile] += dot(dscore, q, (1, 0))
            k_T = k.T[theirs.offset : theirs.offset + a]
            dq_ref[pl.ds(x * a, a), :] += dot(k_T, dscore, (1, 0))

    for_visited_blocks(plan, refs["visits"], step)
    refs["dq"][0] = (dq_ref[...] * plan.scale).T.astype(refs["dq"].dtype)

    @pl.when(i == plan.q_blocks - 1)
    def _():
        refs["dk"][0] = (dk_ref[...] * plan.scale).astype(refs["dk"].dtype)
        refs["dv"][0] = dv_ref[...].astype(refs["dv"].dtype)
