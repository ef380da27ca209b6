"""The forward pass on TPU: an online softmax over blocks of keys, all heads of a cluster in one grid step."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.tpu_parts import LOG2E, LOWEST, MASKED, dot, for_visited_blocks, in_key_lanes, scores, visible
from kernels.attention.tpu_plan import Plan, span


def forward_kernel(plan: Plan, arrays: dict, vmem_limit: int, interpret):
    """Return (out [B, S, H A], lse [B, clusters, heads of a cluster, S]) for padded `arrays`, see `tpu.arranged`."""
    b = arrays["q"].shape[0]
    bq, heads, a = plan.blocks.q, plan.cluster_heads, plan.width_padded
    q_spec = pl.BlockSpec((1, bq, heads * a), lambda b, c, i, *_: (b, i, c))
    kv_spec = pl.BlockSpec(
        (1, plan.t_padded, plan.cluster * a), lambda b, c, i, *_: (b, 0, c), pipeline_mode=pl.Buffered(plan.buffers)
    )
    specs = {
        "q": q_spec,
        "k": kv_spec,
        "v": kv_spec,
        "q_segments": pl.BlockSpec((1, 1, bq), lambda b, c, i, *_: (b, 0, i)),
        "kv_segments": pl.BlockSpec((1, plan.kv_blocks, plan.blocks.kv), lambda b, c, i, *_: (b, 0, 0)),
    }
    scalars = [name for name in ("visits", "sinks") if name in arrays]
    blocks = [name for name in specs if name in arrays]
    names = (*scalars, *blocks, "out", "lse", "lanes", "top", "total", "sum")
    scratch = [
        pltpu.VMEM((heads, bq, max(128, a)), arrays["q"].dtype),
        pltpu.VMEM((heads, bq), jnp.float32),
        pltpu.VMEM((heads, bq), jnp.float32),
        pltpu.VMEM((heads * a, bq), jnp.float32),
    ]

    def kernel(*refs):
        _kernel(plan, dict(zip(names, refs, strict=True)))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, plan.clusters, plan.q_blocks),
            in_specs=[specs[name] for name in blocks],
            out_specs=[q_spec, pl.BlockSpec((1, 1, heads, bq), lambda b, c, i, *_: (b, c, 0, i))],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(arrays["q"].shape, arrays["q"].dtype),
            jax.ShapeDtypeStruct((b, plan.clusters, heads, plan.s_padded), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=vmem_limit
        ),
        name="attention_forward",
        interpret=interpret,
    )(*(arrays[name] for name in (*scalars, *blocks)))


def _kernel(plan, refs):
    heads, a, bk = plan.cluster_heads, plan.width_padded, plan.blocks.kv
    i = pl.program_id(2)
    lanes_ref, top_ref, total_ref, sum_ref = (refs[name] for name in ("lanes", "top", "total", "sum"))
    for x in range(heads):
        theirs = span(x // plan.group, plan.cluster, a)
        lanes_ref[x, :, : theirs.stop - theirs.start] = in_key_lanes(plan, refs["q"], x)
        top = LOWEST
        if plan.sinks:
            top = refs["sinks"][pl.program_id(1) * heads + x] * LOG2E
        top_ref[pl.ds(x, 1), :] = jnp.full((1, plan.blocks.q), top, jnp.float32)
    total_ref[...] = jnp.full(total_ref.shape, 1.0 if plan.sinks else 0.0, jnp.float32)
    sum_ref[...] = jnp.zeros_like(sum_ref)

    def step(j, masked):
        rows = pl.ds(pl.multiple_of(j * bk, bk), bk)
        mask = visible(plan, i, j, refs.get("q_segments"), refs.get("kv_segments")) if masked else None

        def masked_scores(x):
            theirs = span(x // plan.group, plan.cluster, a)
            k = refs["k"][0, rows, theirs.start : theirs.stop]
            score, _ = scores(plan, k, lanes_ref[x, :, : theirs.stop - theirs.start])
            return jnp.where(mask, score, MASKED) if masked else score

        old_top, old_total = top_ref[...], total_ref[...]
        tops, totals = [], []
        following = masked_scores(0)
        for x in range(heads):
            # The next head's product is begun before this head's softmax, so that the matrix units need not wait.
            score, following = following, masked_scores(x + 1) if x + 1 < heads else None
            old = old_top[x : x + 1]
            new = jnp.maximum(old, jnp.max(score, axis=0, keepdims=True))
            weights = jnp.exp2(score - new)
            decay = jnp.exp2(old - new)
            tops.append(new)
            totals.append(old_total[x : x + 1] * decay + jnp.sum(weights, axis=0, keepdims=True))
            theirs = span(x // plan.group, plan.cluster, a)
            v_T = refs["v"][0, rows, theirs.start : theirs.stop].T[theirs.offset : theirs.offset + a]
            mine = pl.ds(x * a, a)
            sum_ref[mine, :] = sum_ref[mine, :] * decay + dot(v_T, weights.astype(v_T.dtype), (1, 0))
        top_ref[...] = jnp.concatenate(tops, axis=0)
        total_ref[...] = jnp.concatenate(totals, axis=0)

    for_visited_blocks(plan, refs["visits"], step)

    total = total_ref[...]
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    refs["lse"][0, 0] = jnp.where(seen, top_ref[...] / LOG2E + jnp.log(total), -jnp.inf)
    share = 1.0 / total
    parts = [sum_ref[pl.ds(x * a, a), :] * share[x : x + 1] for x in range(heads)]
    refs["out"][0] = jnp.concatenate(parts, axis=0).T.astype(refs["out"].dtype)
