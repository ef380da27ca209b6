"""Attention of a few new tokens against a cache of keys and values that is only partly filled."""

import jax.numpy as jnp


def decode_attention(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    *,
    lengths_B,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks_H=None,
):
    """Return out_BSHA of S new tokens (usually 1) that are the last of the lengths_B filled positions of a cache.

    k_BTKA, v_BTKA: the cache, of capacity T, with the new tokens' keys and values already in it; what it holds past
    lengths_B int [B] may be anything, NaN too. The options are those of `kernels.attention.api.attention`, causal. The
    heads of a group share their key head without copies of it. Raises ValueError for shapes that do not fit.
    """
    b, s, h, a = q_BSHA.shape
    t, kv = k_BTKA.shape[1:3]
    if k_BTKA.shape != v_BTKA.shape or k_BTKA.shape[::3] != (b, a) or h % kv or lengths_B.shape != (b,):
        raise ValueError(
            f"shapes do not fit: q {q_BSHA.shape}, k {k_BTKA.shape}, v {v_BTKA.shape}, lengths {lengths_B.shape}"
        )
    wide = jnp.promote_types(q_BSHA.dtype, jnp.float32)
    scale = a**-0.5 if scale is None else scale
    q_BSKGA = q_BSHA.reshape(b, s, kv, h // kv, a)
    scores_BKGST = scale * jnp.einsum("bskga,btka->bkgst", q_BSKGA, k_BTKA, preferred_element_type=wide)
    if softcap is not None:
        scores_BKGST = softcap * jnp.tanh(scores_BKGST / softcap)
    position_BS = (lengths_B - s)[:, None] + jnp.arange(s)[None]
    distance_BST = position_BS[:, :, None] - jnp.arange(t)[None, None]
    mask_BST = distance_BST >= 0
    if window is not None:
        mask_BST = mask_BST & (distance_BST < window)
    scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, jnp.finfo(wide).min)
    # Far above the score of a masked key, so that the exponential of one is 0 also in a row that sees nothing.
    top_BKGS = jnp.max(scores_BKGST, axis=-1, initial=jnp.finfo(wide).min / 2)
    if sinks_H is not None:
        sinks_BKGS = jnp.broadcast_to(sinks_H.astype(wide).reshape(1, kv, h // kv, 1), top_BKGS.shape)
        top_BKGS = jnp.maximum(top_BKGS, sinks_BKGS)
    weights_BKGST = jnp.exp(scores_BKGST - top_BKGS[..., None])
    total_BKGS = jnp.sum(weights_BKGST, axis=-1)
    if sinks_H is not None:
        total_BKGS = total_BKGS + jnp.exp(sinks_BKGS - top_BKGS)
    # A weight of 0 would not silence a NaN.
    filled_BT = jnp.arange(t)[None] < lengths_B[:, None]
    v_BTKA = jnp.where(filled_BT[:, :, None, None], v_BTKA, jnp.zeros((), v_BTKA.dtype))
    out_BSKGA = jnp.einsum("bkgst,btka->bskga", weights_BKGST.astype(v_BTKA.dtype), v_BTKA, preferred_element_type=wide)
    total_BSKG = jnp.where(total_BKGS > 0, total_BKGS, 1.0).transpose(0, 3, 1, 2)
    return (out_BSKGA / total_BSKG[..., None]).reshape(b, s, h, a).astype(q_BSHA.dtype)
