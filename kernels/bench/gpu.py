"""Rivals on NVIDIA GPUs. Each raises ImportError or NotImplementedError with one line where it cannot be had."""

import functools

import jax
import jax.numpy as jnp


def cudnn(shape, program):
    """cuDNN's attention through JAX, at an `attention.shapes.Shape`."""
    if shape.softcap or shape.segments or shape.sinks:
        raise NotImplementedError("cuDNN has no softcap, segments or sinks here")
    window = (shape.window - 1, 0) if shape.window else None

    def attend(q_BSHA, k_BTKA, v_BTKA):
        return jax.nn.dot_product_attention(
            q_BSHA, k_BTKA, v_BTKA, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    dtype = jnp.dtype(shape.dtype)
    q = jax.ShapeDtypeStruct((shape.b, shape.s, shape.h, shape.a), dtype)
    k = jax.ShapeDtypeStruct((shape.b, shape.t, shape.k, shape.a), dtype)
    if program == "forward":
        return attend, (q, k, k)

    def loss(q_BSHA, k_BTKA, v_BTKA, weights_BSHA):
        return jnp.sum(attend(q_BSHA, k_BTKA, v_BTKA) * weights_BSHA, dtype=jnp.float32)

    return jax.value_and_grad(loss, (0, 1, 2)), (q, k, k, q)


class Torch:
    """A program of PyTorch: called, it runs on the GPU and waits."""

    def __init__(self, run, torch):
        self.run, self.torch = run, torch

    def __call__(self):
        self.run()
        self.torch.cuda.synchronize()


def cut_cross_entropy(shape, program):
    """Apple's cut-cross-entropy for PyTorch, at a `cross_entropy.shapes.Shape`."""
    import torch
    from cut_cross_entropy import linear_cross_entropy

    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU")
    make = functools.partial(torch.randn, dtype=getattr(torch, shape.dtype), device="cuda")
    e, c = make(shape.n, shape.d) * 0.1, make(shape.v, shape.d) * 0.1
    targets = torch.randint(0, shape.v, (shape.n,), device="cuda")
    gradients = program == "value_and_grad"
    e.requires_grad_(gradients)
    c.requires_grad_(gradients)

    def run():
        e.grad = c.grad = None
        loss = linear_cross_entropy(e, c, targets, softcap=shape.softcap or None, reduction="sum")
        if gradients:
            loss.backward()

    return Torch(run, torch)
