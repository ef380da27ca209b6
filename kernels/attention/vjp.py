"""The one derivative rule of attention: it stands on an implementation's `forward` and `backward`."""

import dataclasses
import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp

from kernels import backends


@dataclasses.dataclass(frozen=True)
class Options:
    """What the primitives take beside arrays; `blocks` are the implementation's own, None its default."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    blocks: Hashable = None
    implementation: str = "chunked"


def perform(primitive: Callable, options: Options, *arrays):
    """Return what the primitive, a `forward` or a `backward`, makes of the arrays under these options."""
    names = ("causal", "window", "softcap", "scale", "blocks")
    return backends.perform(primitive, options.implementation, arrays, {x: getattr(options, x) for x in names})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    forward: Callable,
    backward: Callable,
    options: Options,
    q_BSHA,
    k_BTKA,
    v_BTKA,
    q_segments_BS,
    kv_segments_BT,
    sinks_H,
):
    """Return out_BSHA of `forward`, with `backward` as its reverse-mode derivative (there is no forward mode).

    Kept for the backward pass: the inputs, out and lse_BHS; no table of scores.
    """
    return perform(forward, options, q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H)[0]


def _attend_forward(forward, backward, options, *arrays):
    out_BSHA, lse_BHS = perform(forward, options, *arrays)
    return out_BSHA, (arrays, out_BSHA, lse_BHS)


def _attend_backward(forward, backward, options, residuals, dout_BSHA):
    arrays, out_BSHA, lse_BHS = residuals
    dq_BSHA, dk_BTKA, dv_BTKA, dsinks_H = perform(backward, options, *arrays, out_BSHA, lse_BHS, dout_BSHA)
    return dq_BSHA, dk_BTKA, dv_BTKA, None, None, dsinks_H


attend.defvjp(_attend_forward, _attend_backward)


def row_deltas(out_BSHA, dout_BSHA):
    """Return delta_BHS, in float32 at least: a row's sum over keys of probability times its gradient.

    It equals <out, d out> (Dao et al. 2022), so that no table is needed.
    """
    wide = jnp.promote_types(out_BSHA.dtype, jnp.float32)
    return jnp.sum(out_BSHA.astype(wide) * dout_BSHA.astype(wide), axis=-1).transpose(0, 2, 1)


def sink_gradients(sinks_H, lse_BHS, delta_BHS):
    """Return d sinks_H, None where there are none: a sink takes part in the denominator, with the value 0."""
    if sinks_H is None:
        return None
    shares_BHS = jnp.exp(sinks_H.astype(lse_BHS.dtype)[None, :, None] - lse_BHS)
    return -jnp.sum(shares_BHS * delta_BHS, axis=(0, 2)).astype(sinks_H.dtype)
