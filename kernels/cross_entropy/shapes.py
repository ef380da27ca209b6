"""Shapes of real losses, shared by tests, tuner and benchmark, and the programs that are compiled for them."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels.cross_entropy import api


@dataclasses.dataclass(frozen=True)
class Shape:
    """n tokens, width d, v rows of the classifier; softcap 0 is off."""

    n: int
    d: int
    v: int
    softcap: float = 0.0
    bias: bool = False
    dtype: str = "bfloat16"


SHAPES = {
    # Our quickstart and the loss of a 10M model with GPT-2's vocabulary.
    "quickstart": Shape(n=2048, d=192, v=4096),
    "tiny": Shape(n=16384, d=256, v=50257),
    "smollm-135m": Shape(n=16384, d=576, v=49152),
    "gpt2": Shape(n=16384, d=768, v=50257),
    "llama-3.2-1b": Shape(n=8192, d=2048, v=128256),
    # The loss of table 1 in Wijmans et al. 2024; Gemma 2 caps its logits at 30, that table does not.
    "gemma-2-2b": Shape(n=8192, d=2304, v=256000),
}


def program(name, shape, implementation, blocks=None):
    """Return (function, its arguments as ShapeDtypeStructs) of "forward", "backward" or "value_and_grad" at a shape.

    blocks: of the primitive, for the first two; None is what the implementation would choose.
    """
    dtype = jnp.dtype(shape.dtype)
    e = jax.ShapeDtypeStruct((shape.n, shape.d), dtype)
    c = jax.ShapeDtypeStruct((shape.v, shape.d), dtype)
    bias = jax.ShapeDtypeStruct((shape.v,), dtype) if shape.bias else None
    targets = jax.ShapeDtypeStruct((shape.n,), jnp.int32)
    row = jax.ShapeDtypeStruct((shape.n,), jnp.float32)
    softcap = shape.softcap or None
    if name == "value_and_grad":
        return _value_and_grad(softcap, implementation, shape.bias), (e, c, bias, targets)
    module = api.MODULES[implementation]
    if name == "forward":

        def forward(e_ND, c_VD, bias_V, targets_N):
            return module.forward(e_ND, c_VD, bias_V, targets_N, softcap=softcap, blocks=blocks)

        return forward, (e, c, bias, targets)
    if name == "backward":

        def backward(*arrays):
            return module.backward(*arrays, softcap=softcap, blocks=blocks)

        return backward, (e, c, bias, targets, row, row, row)
    raise ValueError(f"there is no program {name!r}; choose from forward, backward, value_and_grad")


def _value_and_grad(softcap, implementation, bias):
    """Return the sum of losses with its gradients, as a training step computes it."""

    def loss(e_ND, c_VD, bias_V, targets_N):
        return api.loss_sums(e_ND, c_VD, targets_N, bias_V=bias_V, softcap=softcap, implementation=implementation)[0]

    return jax.value_and_grad(loss, argnums=(0, 1, 2) if bias else (0, 1))
