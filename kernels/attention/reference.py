"""Attention with the whole [S, T] table of scores: the shortest correct form, differentiated by JAX."""

import jax
import jax.numpy as jnp


def visible(s, t, q_segments_BS=None, kv_segments_BT=None, *, causal=True, window=None):
    """Return bool [B or 1, S, T]: which keys a query may see.

    The queries are the last S of T positions, so query i stands at i + T - S. Causal: keys up to that position; window
    W: the last W of these. Segments, if given, must be equal.
    """
    distance_ST = jnp.arange(s)[:, None] + (t - s) - jnp.arange(t)[None]
    mask_BST = jnp.ones((1, s, t), bool)
    if causal:
        mask_BST = mask_BST & (distance_ST >= 0)[None]
    if window is not None:
        mask_BST = mask_BST & (distance_ST < window)[None]
    if q_segments_BS is not None:
        mask_BST = mask_BST & (q_segments_BS[:, :, None] == kv_segments_BT[:, None])
    return mask_BST


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
    blocks: None = None,
):
    """Return (out_BSHA in q's dtype, lse_BHS): see `kernels.attention.api.attention` for the meaning of the options.

    lse, in float32 (float64 for float64 inputs), is the logarithm of the softmax's denominator; a row that sees nothing
    has out 0 and lse -inf.
    """
    b, s, h, a = q_BSHA.shape
    t, kv = k_BTKA.shape[1:3]
    wide = jnp.promote_types(q_BSHA.dtype, jnp.float32)
    q_BSKGA = q_BSHA.reshape(b, s, kv, h // kv, a)
    scores_BKGST = scale * jnp.einsum("bskga,btka->bkgst", q_BSKGA, k_BTKA, preferred_element_type=wide)
    if softcap is not None:
        scores_BKGST = softcap * jnp.tanh(scores_BKGST / softcap)
    mask_BST = visible(s, t, q_segments_BS, kv_segments_BT, causal=causal, window=window)
    scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, -jnp.inf)
    top_BKGS = jnp.max(scores_BKGST, axis=-1, initial=-jnp.inf)
    if sinks_H is not None:
        sinks_BKGS = jnp.broadcast_to(sinks_H.astype(wide).reshape(1, kv, h // kv, 1), top_BKGS.shape)
        top_BKGS = jnp.maximum(top_BKGS, sinks_BKGS)
    top_BKGS = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BKGS), top_BKGS, 0.0))
    weights_BKGST = jnp.exp(scores_BKGST - top_BKGS[..., None])
    total_BKGS = jnp.sum(weights_BKGST, axis=-1)
    if sinks_H is not None:
        total_BKGS = total_BKGS + jnp.exp(sinks_BKGS - top_BKGS)
    seen_BKGS = total_BKGS > 0
    total_BKGS = jnp.where(seen_BKGS, total_BKGS, 1.0)
    probs_BKGST = (weights_BKGST / total_BKGS[..., None]).astype(v_BTKA.dtype)
    out_BSKGA = jnp.einsum("bkgst,btka->bskga", probs_BKGST, v_BTKA, preferred_element_type=wide)
    lse_BKGS = jnp.where(seen_BKGS, top_BKGS + jnp.log(total_BKGS), -jnp.inf)
    return out_BSKGA.reshape(b, s, h, a).astype(q_BSHA.dtype), lse_BKGS.reshape(b, h, s)
