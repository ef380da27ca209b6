"""Attention with the whole [S, T] table of scores: the shortest correct form."""

import jax
import jax.numpy as jnp


def attention(q_BSHA, k_BTKA, v_BTKA, *, segment_ids_BS=None, softcap=None, scale=None):
    """Causal grouped-query attention; a query sees keys at or before its own index, in its own segment if given.

    q_BSHA with H a multiple of K heads of k_BTKA and v_BTKA (S = T); segment_ids_BS int. Scores and softmax are in
    float32 at least; the result has q's dtype. `scale` defaults to A ** -0.5, `softcap` applies cap * tanh(x / cap).
    """
    b, s, h, a = q_BSHA.shape
    kv = k_BTKA.shape[2]
    q_BSKGA = q_BSHA.reshape(b, s, kv, h // kv, a) * jnp.asarray(a**-0.5 if scale is None else scale, q_BSHA.dtype)
    wide = jnp.promote_types(q_BSHA.dtype, jnp.float32)
    scores_BKGST = jnp.einsum("bskga,btka->bkgst", q_BSKGA, k_BTKA, preferred_element_type=wide)
    if softcap is not None:
        scores_BKGST = softcap * jnp.tanh(scores_BKGST / softcap)
    mask_BST = jnp.tril(jnp.ones((s, s), bool))[None]
    if segment_ids_BS is not None:
        mask_BST = mask_BST & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, jnp.finfo(wide).min)
    probs_BKGST = jax.nn.softmax(scores_BKGST, axis=-1).astype(v_BTKA.dtype)
    return jnp.einsum("bkgst,btka->bskga", probs_BKGST, v_BTKA).reshape(b, s, h, a)
