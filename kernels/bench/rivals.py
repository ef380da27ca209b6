"""Other people's TPU kernels at our shapes, as cases that `kernels.aot` can compile. Needs the extra `rivals`."""

import jax
import jax.numpy as jnp

from kernels.attention import shapes as attention
from kernels.cross_entropy import shapes as losses

SHAPES = {
    **{f"cross_entropy, {name}": shape for name, shape in losses.SHAPES.items()},
    **{f"attention, {name}": shape for name, shape in attention.SHAPES.items()},
}


def program(name, shape, implementation, blocks=None):
    """Return (function, arguments): "tokamax" or "splash", with the blocks these choose or, for splash, 512.

    Raises NotImplementedError for what a rival does not do, ImportError where it is not installed.
    """
    del blocks
    if implementation == "tokamax":
        return _tokamax(name, shape)
    return _splash(name, shape)


def _tokamax(name, shape):
    import tokamax
    from tokamax import config

    if shape.softcap or shape.bias:
        raise NotImplementedError("tokamax has no softcap and no bias")
    dtype = jnp.dtype(shape.dtype)

    def loss(e_ND, targets_N, c_DV):
        return tokamax.linear_softmax_cross_entropy_loss(
            e_ND, targets_N, c_DV, reduction="sum", implementation="mosaic_tpu"
        )

    wanted = loss if name == "forward" else jax.value_and_grad(loss, (0, 2))

    def compiled_elsewhere(*arrays):
        with config.cross_compile(True):  # no TPU is here to be asked what it is
            return wanted(*arrays)

    arguments = (
        jax.ShapeDtypeStruct((shape.n, shape.d), dtype),
        jax.ShapeDtypeStruct((shape.n,), jnp.int32),
        jax.ShapeDtypeStruct((shape.d, shape.v), dtype),
    )
    return compiled_elsewhere, arguments


def _splash(name, shape):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = (shape.s, shape.t)
    mask = masks.LocalMask(sizes, (shape.window - 1, 0), 0) if shape.window else masks.CausalMask(sizes)
    block = min(512, shape.s)
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * shape.h),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=shape.softcap or None,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            use_fused_bwd_kernel=True,
        ),
    )
    if shape.sinks or shape.segments:
        raise NotImplementedError("sinks and segments are not compared")

    def forward(q_BSHA, k_BTKA, v_BTKA):
        q, k, v = (x.swapaxes(1, 2) for x in (q_BSHA, k_BTKA, v_BTKA))
        return jax.vmap(attend)(q * jnp.asarray(shape.a**-0.5, q.dtype), k, v).swapaxes(1, 2)

    def loss(q_BSHA, k_BTKA, v_BTKA, weights_BSHA):
        return jnp.sum(forward(q_BSHA, k_BTKA, v_BTKA) * weights_BSHA, dtype=jnp.float32)

    dtype = jnp.dtype(shape.dtype)
    q = jax.ShapeDtypeStruct((shape.b, shape.s, shape.h, shape.a), dtype)
    k = jax.ShapeDtypeStruct((shape.b, shape.t, shape.k, shape.a), dtype)
    if name == "forward":
        return forward, (q, k, k)
    return jax.value_and_grad(loss, (0, 1, 2)), (q, k, k, q)
