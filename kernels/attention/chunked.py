"""Plain XLA over blocks of queries: no table of scores is kept, and keys after a block's last query are never touched.

A block of queries meets all keys it may see at once, so its softmax is exact without rescaling. The backward pass
computes the scores again from the log-sum-exp (Dao et al. 2022).
"""

import functools

import jax
import jax.numpy as jnp


def attention(q_BSHA, k_BTKA, v_BTKA, *, segment_ids_BS=None, softcap=None, scale=None, blocks=4):
    """Return what the reference does, with S cut into at most `blocks` blocks of queries.

    Work on scores is (blocks + 1) / (2 blocks) of the whole table; the program grows with `blocks`.
    """
    b, s, h, a = q_BSHA.shape
    kv = k_BTKA.shape[2]
    q_BKGSA = q_BSHA.reshape(b, s, kv, h // kv, a).transpose(0, 2, 3, 1, 4)
    k_BKTA, v_BKTA = k_BTKA.transpose(0, 2, 1, 3), v_BTKA.transpose(0, 2, 1, 3)
    q_BKGSA = q_BKGSA * jnp.asarray(a**-0.5 if scale is None else scale, q_BSHA.dtype)
    out_BKGSA = _attend(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, -(-s // blocks))
    return out_BKGSA.transpose(0, 3, 1, 2, 4).reshape(b, s, h, a)


def _dot(x, y, contract):
    """Contract axis contract[0] of x [B, K, ...] with contract[1] of y [B, K, ...], in at least float32."""
    axes = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _slices(s, block):
    return [(start, min(start + block, s)) for start in range(0, s, block)]


def _rows(x_BKGSA, start, stop):
    """One block of queries with the heads of a group as further rows: [B, K, G * block, A]."""
    b, kv, g, _, a = x_BKGSA.shape
    return x_BKGSA[:, :, :, start:stop].reshape(b, kv, g * (stop - start), a)


def _scores(q_BKRA, k_BKTA, segment_ids_BS, softcap, start, stop):
    """Scores of queries start..stop against keys 0..stop: (masked scores, share of their gradient that passes)."""
    raw_BKRT = _dot(q_BKRA, k_BKTA[:, :, :stop], (3, 3))
    passed_BKRT = None
    if softcap is not None:
        tanh_BKRT = jnp.tanh(raw_BKRT / softcap)
        raw_BKRT, passed_BKRT = softcap * tanh_BKRT, 1.0 - jnp.square(tanh_BKRT)
    rows = stop - start
    mask_BST = (start + jnp.arange(rows)[:, None] >= jnp.arange(stop)[None])[None]
    if segment_ids_BS is not None:
        mask_BST = mask_BST & (segment_ids_BS[:, start:stop, None] == segment_ids_BS[:, None, :stop])
    b, kv, r, _ = raw_BKRT.shape
    split_BKGST = raw_BKRT.reshape(b, kv, r // rows, rows, stop)
    lowest = jnp.finfo(raw_BKRT.dtype).min
    return jnp.where(mask_BST[:, None, None], split_BKGST, lowest).reshape(raw_BKRT.shape), passed_BKRT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, block):
    return _forward(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, block)[0]


def _forward(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, block):
    b, kv, g, s, a = q_BKGSA.shape
    outs, lses = [], []
    for start, stop in _slices(s, block):
        scores_BKRT, _ = _scores(_rows(q_BKGSA, start, stop), k_BKTA, segment_ids_BS, softcap, start, stop)
        max_BKR = jnp.max(scores_BKRT, axis=-1)
        exp_BKRT = jnp.exp(scores_BKRT - max_BKR[..., None])
        sum_BKR = jnp.sum(exp_BKRT, axis=-1)
        out_BKRA = _dot(exp_BKRT.astype(v_BKTA.dtype), v_BKTA[:, :, :stop], (3, 2)) / sum_BKR[..., None]
        outs.append(out_BKRA.astype(q_BKGSA.dtype).reshape(b, kv, g, stop - start, a))
        lses.append(max_BKR + jnp.log(sum_BKR))
    return jnp.concatenate(outs, axis=3), lses


def _forward_and_residuals(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, block):
    out_BKGSA, lses = _forward(q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, softcap, block)
    return out_BKGSA, (q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, out_BKGSA, lses)


def _backward(softcap, block, residuals, dout_BKGSA):
    q_BKGSA, k_BKTA, v_BKTA, segment_ids_BS, out_BKGSA, lses = residuals
    b, kv, g, s, a = q_BKGSA.shape
    wide = jnp.promote_types(q_BKGSA.dtype, jnp.float32)
    dq = []
    dk_BKTA, dv_BKTA = jnp.zeros(k_BKTA.shape, wide), jnp.zeros(v_BKTA.shape, wide)
    for (start, stop), lse_BKR in zip(_slices(s, block), lses, strict=True):
        q_BKRA, out_BKRA, dout_BKRA = (_rows(x, start, stop) for x in (q_BKGSA, out_BKGSA, dout_BKGSA))
        scores_BKRT, passed_BKRT = _scores(q_BKRA, k_BKTA, segment_ids_BS, softcap, start, stop)
        probs_BKRT = jnp.exp(scores_BKRT - lse_BKR[..., None])
        dprobs_BKRT = _dot(dout_BKRA, v_BKTA[:, :, :stop], (3, 3))
        # sum over keys of probs * dprobs, without touching a table
        mean_BKR = jnp.sum(dout_BKRA.astype(wide) * out_BKRA.astype(wide), axis=-1)
        dscores_BKRT = probs_BKRT * (dprobs_BKRT - mean_BKR[..., None])
        if passed_BKRT is not None:
            dscores_BKRT = dscores_BKRT * passed_BKRT
        dscores_BKRT = dscores_BKRT.astype(q_BKGSA.dtype)
        dq.append(_dot(dscores_BKRT, k_BKTA[:, :, :stop], (3, 2)).reshape(b, kv, g, stop - start, a))
        dk_BKTA = dk_BKTA.at[:, :, :stop].add(_dot(dscores_BKRT, q_BKRA, (2, 2)))
        dv_BKTA = dv_BKTA.at[:, :, :stop].add(_dot(probs_BKRT.astype(v_BKTA.dtype), dout_BKRA, (2, 2)))
    dq_BKGSA = jnp.concatenate(dq, axis=3).astype(q_BKGSA.dtype)
    return dq_BKGSA, dk_BKTA.astype(k_BKTA.dtype), dv_BKTA.astype(v_BKTA.dtype), None


_attend.defvjp(_forward_and_residuals, _backward)
