"""Attention and its gradients in float64 NumPy, written out from the definition, with mistakes on demand."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one comparison. `foreign`: every fifth query has a segment id that no key has."""

    b: int
    s: int
    t: int
    h: int
    k: int
    a: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    segments: bool = False
    sinks: bool = False
    foreign: bool = False

    def options(self):
        """Return the options that the public call takes."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Float64 arrays; segments int32 or None, sinks float64 or None; dout_BSHA is the upstream gradient."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_segments: np.ndarray | None
    kv_segments: np.ndarray | None
    sinks: np.ndarray | None
    dout: np.ndarray

    def segment_ids(self):
        """Return what the public call takes."""
        return None if self.q_segments is None else (self.q_segments, self.kv_segments)


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Return normal arrays, documents of random lengths, the last of them padding with id 0."""
    random = np.random.RandomState(seed)
    q, dout = (random.randn(case.b, case.s, case.h, case.a) for _ in range(2))
    k, v = (random.randn(case.b, case.t, case.k, case.a) for _ in range(2))
    sinks = random.randn(case.h) if case.sinks else None
    q_segments = kv_segments = None
    if case.segments or case.foreign:
        kv_segments = (1 + np.cumsum(random.rand(case.b, case.t) < 0.1, axis=1)).astype(np.int32)
        kv_segments[:, case.t - case.t // 5 :] = 0
        rows = np.clip(np.arange(case.s) + case.t - case.s, 0, None)
        q_segments = kv_segments[:, rows].copy()
        if case.foreign:
            q_segments[:, ::5] = 10_000
    return Inputs(q, k, v, q_segments, kv_segments, sinks, dout)


MISTAKES = {
    "sees the next token": Case(1, 33, 33, 2, 1, 16),
    "misses itself": Case(1, 33, 33, 2, 1, 16, sinks=True),
    "positions from the start": Case(1, 7, 33, 2, 1, 16),
    "window one too long": Case(1, 33, 33, 2, 1, 16, window=5),
    "window one too short": Case(1, 33, 33, 2, 1, 16, window=5),
    "ignores segments": Case(1, 33, 33, 2, 1, 16, segments=True),
    "interleaves kv heads": Case(1, 33, 33, 6, 2, 16),
    "scales by the model's width": Case(1, 33, 33, 2, 1, 16),
    "padded keys are seen": Case(1, 33, 33, 2, 1, 16, causal=False),
    "an empty row averages": Case(1, 33, 33, 2, 1, 16, foreign=True),
    "a sink has a value": Case(1, 33, 33, 2, 1, 16, sinks=True),
    "no gradient of sinks": Case(1, 33, 33, 2, 1, 16, sinks=True),
    "no derivative of the cap": Case(1, 33, 33, 2, 1, 16, softcap=2.0),
    "cap before the scale": Case(1, 33, 33, 2, 1, 16, softcap=2.0),
    "no delta": Case(1, 33, 33, 2, 1, 16),
    "one query head's gradient per key head": Case(1, 33, 33, 2, 1, 16),
}


def attention(case: Case, x: Inputs, mistake: str | None = None) -> dict[str, np.ndarray]:
    """Return out_BSHA, lse_BHS and the gradients dq, dk, dv (and dsinks), or what a mistake makes of them."""
    group = case.h // case.k
    heads = np.arange(case.h) % case.k if mistake == "interleaves kv heads" else np.arange(case.h) // group
    k, v, t = x.k, x.v, case.t
    if mistake == "padded keys are seen":
        t = -(-t // 8) * 8
        k, v = (np.pad(y, ((0, 0), (0, t - case.t), (0, 0), (0, 0))) for y in (k, v))
    k, v = k[:, :, heads], v[:, :, heads]
    scale = case.a**-0.5 if case.scale is None else case.scale
    if mistake == "scales by the model's width":
        scale = (case.h * case.a) ** -0.5
    raw = np.einsum("bsha,btha->bhst", x.q, k) * scale
    passed = 1.0
    scores = raw
    if case.softcap is not None:
        tanh = np.tanh(raw / case.softcap)
        if mistake == "cap before the scale":
            tanh = np.tanh(raw / scale / case.softcap)
        scores = case.softcap * tanh * (scale if mistake == "cap before the scale" else 1.0)
        passed = 1.0 if mistake == "no derivative of the cap" else 1 - tanh**2
    mask = _mask(case, x, t, mistake)[:, None]
    top = np.where(mask, scores, -np.inf).max(axis=-1, keepdims=True)
    sinks = np.full((case.h,), -np.inf) if x.sinks is None else x.sinks
    sinks = sinks[None, :, None, None]
    top = np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top) * mask
    if mistake == "an empty row averages":
        weights = np.where(mask.any(axis=-1, keepdims=True), weights, 1.0)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks - top)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    safe = np.where(total > 0, total, 1.0)
    probs = weights / safe
    out = np.einsum("bhst,btha->bsha", probs, v)
    if mistake == "a sink has a value":
        out = out + (np.exp(sinks - top) / safe)[..., 0].transpose(0, 2, 1)[..., None]
    dprobs = np.einsum("bsha,btha->bhst", x.dout, v)
    delta = (probs * dprobs).sum(axis=-1, keepdims=True)
    dscores = probs * (dprobs - (0.0 if mistake == "no delta" else delta)) * passed * scale
    found = {"out": out, "lse": lse, "dq": np.einsum("bhst,btha->bsha", dscores, k)}
    for name, table, rows in (("dk", dscores, x.q), ("dv", probs, x.dout)):
        per_head = np.einsum("bhst,bsha->btha", table, rows)[:, : case.t]
        summed = np.zeros_like(x.k)
        for head, kv in enumerate(heads):
            if mistake == "one query head's gradient per key head":
                summed[:, :, kv] = per_head[:, :, head]
            else:
                summed[:, :, kv] += per_head[:, :, head]
        found[name] = summed
    if x.sinks is not None:
        shares = np.exp(sinks - top) / safe
        found["dsinks"] = -(shares * delta).sum(axis=(0, 2, 3)) * (mistake != "no gradient of sinks")
    return found


def _mask(case, x, t, mistake):
    offset = 0 if mistake == "positions from the start" else case.t - case.s
    distance = np.arange(case.s)[:, None] + offset - np.arange(t)[None]
    mask = np.ones((1, case.s, t), bool)
    if case.causal:
        mask = mask & (distance >= {"sees the next token": -1, "misses itself": 1}.get(mistake, 0))
    if case.window is not None:
        mask = mask & (distance < case.window + {"window one too long": 1, "window one too short": -1}.get(mistake, 0))
    if x.q_segments is not None and mistake != "ignores segments":
        mask = mask & (x.q_segments[:, :, None] == x.kv_segments[:, None])
    return np.broadcast_to(mask, (case.b, case.s, t))


def assert_close(found: dict, expected: dict, case: Case, eps: float):
    """Compare dicts of arrays of the same names within the rounding of a dtype with this eps.

    A score is a sum of A products, an output one over T keys, a gradient one over keys or over queries and heads of a
    group: sums of n terms err by about sqrt(n) eps; the factor 8 is for the worst of many elements.
    """
    group = case.h // case.k
    for name, value in expected.items():
        terms = case.s * group if name in ("dk", "dv", "dsinks") else case.t
        error = 8 * eps * (math.sqrt(case.a) + math.sqrt(terms))
        finite = value[np.isfinite(value)]
        largest = max(1.0, np.abs(finite).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(found[name], np.float64), value, rtol=8 * eps, atol=error * largest, err_msg=name
        )
