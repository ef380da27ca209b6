"""Shapes of real models' attention, for tests, tuner and benchmark, and the programs that are compiled for them."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp

from kernels.attention.vjp import Options, attend, perform


@dataclasses.dataclass(frozen=True)
class Shape:
    """b rows of s queries and t keys, h query and k key heads of width a; causal; softcap and window 0 are off."""

    b: int
    s: int
    t: int
    h: int
    k: int
    a: int
    window: int = 0
    softcap: float = 0.0
    segments: bool = False
    sinks: bool = False
    dtype: str = "bfloat16"


SHAPES = {
    "tiny": Shape(8, 1024, 1024, 4, 4, 64),
    "tiny, packed": Shape(8, 1024, 1024, 4, 4, 64, segments=True),
    "tiny, 2048 tokens": Shape(8, 2048, 2048, 8, 2, 64),
    "tiny, window and sinks": Shape(8, 2048, 2048, 8, 2, 64, window=128, sinks=True),
    "heads of 128": Shape(8, 1024, 1024, 4, 4, 128),
    "heads of 80": Shape(8, 1024, 1024, 4, 4, 80),
    "smollm-135m": Shape(8, 2048, 2048, 9, 3, 64),
    "llama-3.2-1b": Shape(2, 4096, 4096, 32, 8, 64),
    "gemma-2-2b": Shape(1, 8192, 8192, 8, 4, 256, window=4096, softcap=50.0),
}


def program(name, shape: Shape, implementation: str, blocks=None):
    """Return (function, its arguments as ShapeDtypeStructs) of "forward", "backward" or "value_and_grad" at a shape.

    The kernels are not interpreted, whatever devices are here. `blocks` are the implementation's own, None its default.
    Raises ValueError for another name.
    """
    if name not in ("forward", "backward", "value_and_grad"):
        raise ValueError(f"there is no program {name!r}; choose from forward, backward, value_and_grad")
    module = importlib.import_module(f"kernels.attention.{implementation}")
    options = Options(
        causal=True,
        window=shape.window or None,
        softcap=shape.softcap or None,
        scale=shape.a**-0.5,
        blocks=blocks,
    )
    arrays = _inputs(shape)
    q = arrays[0]
    if name == "forward":
        return lambda *arrays: perform(module.forward, options, *arrays), arrays
    if name == "backward":
        lse = jax.ShapeDtypeStruct((shape.b, shape.h, shape.s), jnp.float32)
        return lambda *arrays: perform(module.backward, options, *arrays), (*arrays, q, lse, q)

    def loss(q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H, weights_BSHA):
        arrays = (q_BSHA, k_BTKA, v_BTKA, q_segments_BS, kv_segments_BT, sinks_H)
        if implementation == "reference":
            out_BSHA = perform(module.forward, options, *arrays)[0]
        else:
            out_BSHA = attend(module.forward, module.backward, options, *arrays)
        return jnp.sum(out_BSHA * weights_BSHA, dtype=jnp.float32)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 5) if shape.sinks else (0, 1, 2)), (*arrays, q)


def _inputs(shape):
    dtype = jnp.dtype(shape.dtype)
    q = jax.ShapeDtypeStruct((shape.b, shape.s, shape.h, shape.a), dtype)
    k = jax.ShapeDtypeStruct((shape.b, shape.t, shape.k, shape.a), dtype)
    q_segments = jax.ShapeDtypeStruct((shape.b, shape.s), jnp.int32) if shape.segments else None
    kv_segments = jax.ShapeDtypeStruct((shape.b, shape.t), jnp.int32) if shape.segments else None
    sinks = jax.ShapeDtypeStruct((shape.h,), jnp.float32) if shape.sinks else None
    return q, k, k, q_segments, kv_segments, sinks
