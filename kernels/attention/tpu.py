"""Attention on TPU: Pallas kernels for Mosaic, see `tpu_forward` and `tpu_backward`.

Arrays stay in their natural order [B, S, heads * A]; keys and values of a cluster of heads are held whole in VMEM,
which suits sequences of up to some ten thousand tokens and spares reading them again for every block of queries.
"""

import jax
import jax.numpy as jnp

from kernels import chips
from kernels.attention.tpu_backward import backward_kernel
from kernels.attention.tpu_forward import forward_kernel
from kernels.attention.tpu_plan import LANES, Blocks, Plan, clusters_of, round_up, visits
from kernels.attention.vjp import Options, row_deltas, sink_gradients
from kernels.blocks import measured

DTYPES = ("float32", "bfloat16")
# Heads are unrolled within a grid step; with more the program would take minutes to compile.
MOST_HEADS = 32
# With this many heads in a step the matrix units have one head's products to do while another's softmax is computed.
# Bundles of the forward pass per block of 512 x 512 and head on v5e: 1,393 with 1 head of 128, 1,254 with 2, 1,161 with
# 4; of width 64, 1,011 with 2 and 937 with 4.
HEADS = 4
# A step of 512 x 512 took the fewest bundles per pair of query and key of all from 128 to 1024, at widths 64 to 256.
LARGEST_BLOCK = 512


def choose_blocks(program: str, q_shape: tuple, kv_heads: int, t: int, dtype, options: Options) -> Blocks:
    """Return the blocks measured for the nearest shape on this chip, or 512 x 512, with no more padding than 128 needs.

    `program` is "forward" or "backward", q_shape [B, S, H, A].
    """
    b, s, h, a = q_shape
    shape = {"b": b, "s": s, "t": t, "h": h, "k": kv_heads, "a": a, "dtype": jnp.dtype(dtype).name}
    shape |= {"window": options.window or 0, "softcap": options.softcap or 0.0}
    chip = chips.of_device_kind(jax.devices()[0].device_kind)
    found = measured("attention", program, shape, chip.name if chip else None)

    def largest(n, most):
        whole = round_up(n, LANES)
        return max(size for size in range(LANES, most + 1, LANES) if whole % size == 0)

    most = Blocks(**found) if found else Blocks(LARGEST_BLOCK, LARGEST_BLOCK)
    return Blocks(largest(s, most.q), largest(t, most.kv))


def candidates(program: str, shape, chip: chips.Chip) -> list[Blocks]:
    """Return the block sizes worth measuring for a `shapes.Shape`; `program` and `chip` do not change them."""
    del program, chip
    sizes = [(q, kv) for q in (128, 256, 512, 1024) for kv in (128, 256, 512, 1024) if q * kv <= 2**19]
    return [Blocks(q, kv) for q, kv in sizes if shape.s % q == 0 and shape.t % kv == 0]


def vmem_bytes() -> int:
    """Return what the kernels may use: 7/8 of the device's VMEM, or of v5p's, which is least, where no TPU is here."""
    device = jax.devices()[0]
    chip = chips.of_device_kind(device.device_kind) if device.platform == "tpu" else None
    return (chip or chips.CHIPS["v5p"]).vmem_bytes * 7 // 8


def needed_bytes(plan: Plan, itemsize: int) -> int:
    """Return the VMEM that the backward pass needs, which is more than the forward pass does."""
    keys, queries = plan.cluster * plan.width_padded, plan.cluster_heads * plan.width_padded
    bq, bk = plan.blocks.q, plan.blocks.kv
    resident = plan.t_padded * keys * (4 * plan.buffers * itemsize + 2 * 4)  # k, v, dk, dv; the sums of two
    passing = bq * queries * (2 * 3 * itemsize + 4)  # q, dout, dq twice each; the sum of dq
    lanes = 2 * plan.cluster_heads * bq * max(LANES, plan.width_padded) * itemsize
    return resident + passing + lanes + 10 * 4 * bq * bk  # scores of a few heads at a time


def supports(q_BSHA, k_BTKA, options: Options) -> str | None:
    """Return None if the kernels can serve arrays of these shapes and dtypes, else one line that says why not."""
    if q_BSHA.dtype != k_BTKA.dtype or q_BSHA.dtype.name not in DTYPES:
        return f"queries are {q_BSHA.dtype} and keys {k_BTKA.dtype}; both must be one of {', '.join(DTYPES)}"
    device = jax.devices()[0]
    if device.platform == "tpu" and chips.of_device_kind(device.device_kind) is None:
        return f"it is not made for {device.device_kind}"
    plan = _plan("backward", q_BSHA, k_BTKA, options, segments=False, sinks=False)
    if plan.cluster_heads > MOST_HEADS:
        return f"{plan.cluster_heads} query heads share lanes, at most {MOST_HEADS} can"
    needed, limit = needed_bytes(plan, q_BSHA.dtype.itemsize), vmem_bytes()
    if needed > limit:
        return f"{plan.t} keys of {plan.cluster} heads take {needed >> 20} MiB of VMEM, {limit >> 20} MiB are there"
    return None


def forward(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    q_segments_BS,
    kv_segments_BT,
    sinks_H,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks | None = None,
    interpret=False,
):
    """Return (out_BSHA, lse_BHS float32) as the reference does. `interpret` goes to pallas_call."""
    options = Options(causal, window, softcap, scale, blocks)
    plan = _plan("forward", q_BSHA, k_BTKA, options, q_segments_BS is not None, sinks_H is not None)
    arrays = arranged(plan, q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT)
    if plan.sinks:
        arrays["sinks"] = sinks_H.astype(jnp.float32)
    out_BSW, lse_BCGS = forward_kernel(plan, arrays, vmem_bytes(), interpret)
    lse_BHS = lse_BCGS.reshape(lse_BCGS.shape[0], plan.heads, plan.s_padded)[:, :, : plan.s]
    return _unarranged(out_BSW, plan.s, plan.heads, plan.width), lse_BHS


def backward(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    q_segments_BS,
    kv_segments_BT,
    sinks_H,
    out_BSHA,
    lse_BHS,
    dout_BSHA,
    *,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks | None = None,
    interpret=False,
):
    """Return (dq_BSHA, dk_BTKA, dv_BTKA, dsinks_H or None) for the gradient dout_BSHA of forward's first result."""
    options = Options(causal, window, softcap, scale, blocks)
    plan = _plan("backward", q_BSHA, k_BTKA, options, q_segments_BS is not None, sinks_H is not None)
    delta_BHS = row_deltas(out_BSHA, dout_BSHA)
    arrays = arranged(plan, q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT) | {
        "dout": _lanes(dout_BSHA, plan.s_padded, plan.width_padded),
        "lse": _rows(plan, lse_BHS),
        "delta": _rows(plan, delta_BHS),
    }
    dq_BSW, dk_BTW, dv_BTW = backward_kernel(plan, arrays, vmem_bytes(), interpret)
    dk_BTKA, dv_BTKA = (_unarranged(x, plan.t, plan.kv_heads, plan.width) for x in (dk_BTW, dv_BTW))
    dq_BSHA = _unarranged(dq_BSW, plan.s, plan.heads, plan.width)
    return dq_BSHA, dk_BTKA, dv_BTKA, sink_gradients(sinks_H, lse_BHS, delta_BHS)


def _plan(program: str, q_BSHA, k_BTKA, options: Options, segments: bool, sinks: bool) -> Plan:
    """Return the plan with as many heads per step as are of use, if it fits, else the one that needs least VMEM."""
    s, heads, width = q_BSHA.shape[1:]
    t, kv_heads = k_BTKA.shape[1:3]

    def plan(cluster, buffers):
        return Plan(
            s=s,
            t=t,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            causal=options.causal,
            window=options.window,
            softcap=options.softcap,
            scale=options.scale,
            segments=segments,
            sinks=sinks,
            cluster=cluster,
            buffers=buffers,
            blocks=options.blocks or choose_blocks(program, q_BSHA.shape, kv_heads, t, q_BSHA.dtype, options),
        )

    clusters = clusters_of(kv_heads, width)
    enough = next((n for n in clusters if n * heads // kv_heads >= HEADS), clusters[-1])
    for found in (plan(enough, 2), plan(clusters[0], 2)):
        if needed_bytes(found, q_BSHA.dtype.itemsize) <= vmem_bytes() and found.cluster_heads <= MOST_HEADS:
            return found
    return plan(clusters[0], 1)


def arranged(plan: Plan, q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT) -> dict:
    """Return the kernels' arrays by name: q [B, S, H A], k, v [B, T, K A], padded with zeros; int32 `visits`, flat.

    With segments: q_segments [B, 1, S] and kv_segments [B, blocks, keys of a block], padded with the last one.
    """
    arrays = {
        "q": _lanes(q_BSHA, plan.s_padded, plan.width_padded),
        "k": _lanes(k_BTKA, plan.t_padded, plan.width_padded),
        "v": _lanes(v_BTKA, plan.t_padded, plan.width_padded),
    }
    if plan.segments:
        q_segments_BS = _edge(q_segments_BS, plan.s_padded)
        kv_segments_BT = _edge(kv_segments_BT, plan.t_padded)
        arrays["q_segments"] = q_segments_BS[:, None]
        arrays["kv_segments"] = kv_segments_BT.reshape(-1, plan.kv_blocks, plan.blocks.kv)
    return arrays | {"visits": visits(plan, q_segments_BS, kv_segments_BT).reshape(-1)}


def _lanes(x_BSHA, rows, width):
    b, s, h, a = x_BSHA.shape
    return jnp.pad(x_BSHA, ((0, 0), (0, rows - s), (0, 0), (0, width - a))).reshape(b, rows, h * width)


def _unarranged(x_BSW, rows, heads, width):
    b, s, w = x_BSW.shape
    return x_BSW.reshape(b, s, heads, w // heads)[:, :rows, :, :width]


def _rows(plan, x_BHS):
    b, _, s = x_BHS.shape
    x_BCGS = x_BHS.reshape(b, plan.clusters, plan.cluster_heads, s)
    return jnp.pad(x_BCGS, ((0, 0), (0, 0), (0, 0), (0, plan.s_padded - s)))


def _edge(ids_BS, rows):
    return jnp.pad(ids_BS.astype(jnp.int32), ((0, 0), (0, rows - ids_BS.shape[1])), mode="edge")
