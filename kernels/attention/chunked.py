"""Plain XLA over blocks of queries: no table of scores is kept, and keys that no query of a block may see are skipped.

A block of queries meets all keys it may see at once, so its softmax is exact without rescaling. The backward pass
computes the scores again from the log-sum-exp (Dao et al. 2022).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels.attention.vjp import row_deltas, sink_gradients


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many blocks the queries are cut into; the program grows with it."""

    count: int


def default_blocks(s: int, window: int | None) -> Blocks:
    """Return the blocks for S queries.

    Of 1, 2, 4 and 8, forward and backward were fastest with 4 on CPU, for 4 rows of 256 tokens and 4 heads of 64. The
    work on scores is (count + 1) / (2 count) of the causal table, so more than 4 gain little, except that a window is
    met closely by blocks of its size, and that blocks above 512 queries make large tables.
    """
    narrow = 0 if window is None else min(16, s // window)
    return Blocks(max(4, -(-s // 512), narrow))


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
):
    """Return (out_BSHA, lse_BHS) as the reference does."""
    b, s, h, a = q_BSHA.shape
    t, kv = k_BTKA.shape[1:3]
    q_BKGSA, factor = _scaled(_grouped(q_BSHA, kv), scale)
    k_BKTA, v_BKTA = k_BTKA.transpose(0, 2, 1, 3), v_BTKA.transpose(0, 2, 1, 3)
    wide = jnp.promote_types(q_BSHA.dtype, jnp.float32)
    outs, lses = [], []
    for rows, keys in _pieces(s, t, causal, window, blocks):
        mask_BST = _mask(rows, keys, s, t, q_segments_BS, kv_segments_BT, causal, window)
        scores_BKRT, _ = _scores(_rows(q_BKGSA, rows), k_BKTA[:, :, slice(*keys)], mask_BST, softcap, factor)
        # Far above the score of a masked key, so that the exponential of one is 0 also in a row that sees nothing.
        top_BKR = jnp.max(scores_BKRT, axis=-1, initial=jnp.finfo(wide).min / 2)
        if sinks_H is not None:
            n = rows[1] - rows[0]
            sinks_BKR = jnp.repeat(sinks_H.astype(wide).reshape(1, kv, h // kv), n, axis=2)
            sinks_BKR = jnp.broadcast_to(sinks_BKR, top_BKR.shape)
            top_BKR = jnp.maximum(top_BKR, sinks_BKR)
        exp_BKRT = jnp.exp(scores_BKRT - top_BKR[..., None])
        sum_BKR = jnp.sum(exp_BKRT, axis=-1)
        if sinks_H is not None:
            sum_BKR = sum_BKR + jnp.exp(sinks_BKR - top_BKR)
        seen_BKR = sum_BKR > 0
        sum_BKR = jnp.where(seen_BKR, sum_BKR, 1.0)
        out_BKRA = _dot(exp_BKRT.astype(v_BKTA.dtype), v_BKTA[:, :, slice(*keys)], (3, 2)) / sum_BKR[..., None]
        outs.append(out_BKRA.astype(q_BSHA.dtype).reshape(b, kv, h // kv, -1, a))
        lses.append(jnp.where(seen_BKR, top_BKR + jnp.log(sum_BKR), -jnp.inf).reshape(b, h, -1))
    return _flat(jnp.concatenate(outs, axis=3)), jnp.concatenate(lses, axis=2)


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
):
    """Return (dq_BSHA, dk_BTKA, dv_BTKA, dsinks_H or None) for the gradient dout_BSHA of forward's first result."""
    b, s, h, a = q_BSHA.shape
    t, kv = k_BTKA.shape[1:3]
    (q_BKGSA, factor), dout_BKGSA = _scaled(_grouped(q_BSHA, kv), scale), _grouped(dout_BSHA, kv)
    k_BKTA, v_BKTA = k_BTKA.transpose(0, 2, 1, 3), v_BTKA.transpose(0, 2, 1, 3)
    delta_BHS = row_deltas(out_BSHA, dout_BSHA)
    # A row that sees nothing has lse -inf and only masked scores, whose exponential is to be 0.
    lse_BKGS = jnp.where(jnp.isfinite(lse_BHS), lse_BHS, 0.0).reshape(b, kv, h // kv, s, 1)
    delta_BKGS = delta_BHS.reshape(b, kv, h // kv, s, 1)
    wide = jnp.promote_types(q_BSHA.dtype, jnp.float32)
    dq = []
    dk_BKTA, dv_BKTA = jnp.zeros(k_BKTA.shape, wide), jnp.zeros(v_BKTA.shape, wide)
    for rows, keys in _pieces(s, t, causal, window, blocks):
        seen = slice(*keys)
        mask_BST = _mask(rows, keys, s, t, q_segments_BS, kv_segments_BT, causal, window)
        q_BKRA, dout_BKRA = _rows(q_BKGSA, rows), _rows(dout_BKGSA, rows)
        scores_BKRT, passed_BKRT = _scores(q_BKRA, k_BKTA[:, :, seen], mask_BST, softcap, factor)
        probs_BKRT = jnp.exp(scores_BKRT - _rows(lse_BKGS, rows))
        dprobs_BKRT = _dot(dout_BKRA, v_BKTA[:, :, seen], (3, 3))
        dscores_BKRT = probs_BKRT * (dprobs_BKRT - _rows(delta_BKGS, rows))
        if passed_BKRT is not None:
            dscores_BKRT = dscores_BKRT * passed_BKRT
        if factor != 1.0:
            dscores_BKRT = dscores_BKRT * factor
        dscores_BKRT = dscores_BKRT.astype(q_BSHA.dtype)
        dq.append(_dot(dscores_BKRT, k_BKTA[:, :, seen], (3, 2)).reshape(b, kv, h // kv, -1, a))
        dk_BKTA = dk_BKTA.at[:, :, seen].add(_dot(dscores_BKRT, q_BKRA, (2, 2)))
        dv_BKTA = dv_BKTA.at[:, :, seen].add(_dot(probs_BKRT.astype(v_BKTA.dtype), dout_BKRA, (2, 2)))
    dq_BKGSA = jnp.concatenate(dq, axis=3) * (scale / factor)
    dq_BSHA = _flat(dq_BKGSA.astype(q_BSHA.dtype))
    dk_BTKA, dv_BTKA = (x.transpose(0, 2, 1, 3) for x in (dk_BKTA.astype(k_BTKA.dtype), dv_BKTA.astype(v_BTKA.dtype)))
    return dq_BSHA, dk_BTKA, dv_BTKA, sink_gradients(sinks_H, lse_BHS, delta_BHS)


def _grouped(x_BSHA, kv):
    b, s, h, a = x_BSHA.shape
    return x_BSHA.reshape(b, s, kv, h // kv, a).transpose(0, 2, 3, 1, 4)


def _flat(x_BKGSA):
    b, kv, g, s, a = x_BKGSA.shape
    return x_BKGSA.transpose(0, 3, 1, 2, 4).reshape(b, s, kv * g, a)


def _scaled(q_BKGSA, scale):
    """Return (q times the scale, 1.0), or (q, scale) where the product would round: the scores are scaled then."""
    if q_BKGSA.dtype.itemsize < 4 and math.frexp(scale)[0] != 0.5:
        return q_BKGSA, scale
    return q_BKGSA * jnp.asarray(scale, q_BKGSA.dtype), 1.0


def _dot(x, y, contract):
    """Contract axis contract[0] of x [B, K, ...] with contract[1] of y [B, K, ...], in at least float32."""
    axes = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _pieces(s, t, causal, window, blocks):
    """Return [((first row, end), (first key, end))]: each block of queries with the keys that one of them may see."""
    size = -(-s // (blocks or default_blocks(s, window)).count)
    found = []
    for start in range(0, s, size):
        stop = min(start + size, s)
        last = max(0, stop + t - s) if causal else t
        first = 0 if window is None else min(last, max(0, start + t - s - window + 1))
        found.append(((start, stop), (first, last)))
    return found


def _rows(x_BKGSA, rows):
    """One block of queries with the heads of a group as further rows: [B, K, G * block, A]."""
    b, kv, g, _, a = x_BKGSA.shape
    return x_BKGSA[:, :, :, slice(*rows)].reshape(b, kv, g * (rows[1] - rows[0]), a)


def _mask(rows, keys, s, t, q_segments_BS, kv_segments_BT, causal, window):
    """Return bool [B or 1, rows, keys], or None where everything is visible."""
    distance_ST = jnp.arange(*rows)[:, None] + (t - s) - jnp.arange(*keys)[None]
    parts = []
    if causal:
        parts.append((distance_ST >= 0)[None])
    if window is not None and rows[1] + t - s - keys[0] > window:
        parts.append((distance_ST < window)[None])
    if q_segments_BS is not None:
        parts.append(q_segments_BS[:, slice(*rows), None] == kv_segments_BT[:, None, slice(*keys)])
    mask_BST = None
    for part in parts:
        mask_BST = part if mask_BST is None else mask_BST & part
    return mask_BST


def _scores(q_BKRA, k_BKTA, mask_BST, softcap, factor):
    """Return (masked scores_BKRT, the share of their gradient that the cap lets pass or None)."""
    scores_BKRT = _dot(q_BKRA, k_BKTA, (3, 3))
    if factor != 1.0:
        scores_BKRT = scores_BKRT * factor
    passed_BKRT = None
    if softcap is not None:
        tanh_BKRT = jnp.tanh(scores_BKRT / softcap)
        scores_BKRT, passed_BKRT = softcap * tanh_BKRT, 1.0 - jnp.square(tanh_BKRT)
    if mask_BST is None:
        return scores_BKRT, passed_BKRT
    b, kv, r, t = scores_BKRT.shape
    n = mask_BST.shape[1]
    split_BKGST = scores_BKRT.reshape(b, kv, r // n, n, t)
    lowest = jnp.finfo(scores_BKRT.dtype).min
    return jnp.where(mask_BST[:, None, None], split_BKGST, lowest).reshape(b, kv, r, t), passed_BKRT
