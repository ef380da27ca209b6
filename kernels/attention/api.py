"""The one call through which models reach attention; implementations stand behind it."""

import dataclasses
import importlib
import math
from typing import Literal

from kernels import backends
from kernels.attention import chunked, reference
from kernels.attention.decode import decode_attention
from kernels.attention.vjp import Options, attend, perform

__all__ = ["Implementation", "attention", "choose", "decode_attention"]

Implementation = Literal["reference", "chunked", "tpu", "gpu"]


def attention(
    q_BSHA,
    k_BTKA,
    v_BTKA,
    *,
    causal: bool = True,
    segment_ids=None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks_H=None,
    implementation: Implementation | None = None,
):
    """Return out_BSHA, in q's dtype, of grouped-query attention; query head h reads key head h // (H / K).

    The queries are the last S of T positions: query i stands at i + T - S and, if `causal`, sees keys up to there, of
    these only the last `window` if one is given. `segment_ids`: an integer array [B, S] where S = T, or a pair of
    [B, S] and [B, T]; a query sees keys with its own id. Scores are multiplied by `scale` (default A ** -0.5), then
    become softcap * tanh(score / softcap) if a cap is given. sinks_H adds a logit per head to the softmax's denominator
    without a value. A query that sees nothing gives 0, with zero gradients. Scores and softmax are float32 at least.

    implementation: "reference" holds the [S, T] table and has all derivatives; the others never hold it whole and have
    a reverse-mode derivative only: "chunked" is plain XLA, "tpu" and "gpu" are Pallas kernels (elsewhere than on their
    devices interpreted, slowly). None: see `choose`. Raises ValueError for shapes and options that do not fit together,
    or that a named implementation cannot serve.
    """
    q_segments_BS, kv_segments_BT = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    scale = q_BSHA.shape[-1] ** -0.5 if scale is None else float(scale)
    options = Options(causal, window, softcap, scale)
    _check(q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H, options)
    name = choose(q_BSHA, k_BTKA, options, implementation)
    arrays = (q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H)
    if name == "reference":
        return perform(reference.forward, options, *arrays)[0]
    module, options = _module(name), dataclasses.replace(options, implementation=name)
    return attend(module.forward, module.backward, options, *arrays)


def choose(q_BSHA, k_BTKA, options: Options, implementation: Implementation | None = None) -> Implementation:
    """Return the implementation for these shapes and options; see `kernels.backends.choose`."""

    def why_not(name):
        return _module(name).supports(q_BSHA, k_BTKA, options)

    return backends.choose(implementation, why_not, "attention")


def _module(name):
    return chunked if name == "chunked" else importlib.import_module(f"kernels.attention.{name}")


def _check(q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H, options):
    b, s, h, a = q_BSHA.shape
    t, kv = k_BTKA.shape[1:3]
    if k_BTKA.shape != v_BTKA.shape or k_BTKA.shape[::3] != (b, a):
        raise ValueError(f"shapes do not fit: q {q_BSHA.shape}, k {k_BTKA.shape}, v {v_BTKA.shape}")
    if h % kv:
        raise ValueError(f"{h} query heads are not a multiple of {kv} key heads")
    if (q_segments_BS is None) != (kv_segments_BT is None):
        raise ValueError("segment_ids: give both of the pair, or none")
    if q_segments_BS is not None and (q_segments_BS.shape, kv_segments_BT.shape) != ((b, s), (b, t)):
        raise ValueError(
            f"segment_ids {q_segments_BS.shape} and {kv_segments_BT.shape} are not {(b, s)} and {(b, t)}; "
            "where S and T differ, give a pair"
        )
    if sinks_H is not None and sinks_H.shape != (h,):
        raise ValueError(f"sinks {sinks_H.shape} are not one for each of {h} query heads")
    if options.window is not None and (options.window < 1 or not options.causal):
        raise ValueError(f"window {options.window} needs causal=True and at least 1")
    if options.softcap is not None and not (options.softcap > 0 and math.isfinite(options.softcap)):
        raise ValueError(f"softcap must be positive, or None for off, got {options.softcap}")
