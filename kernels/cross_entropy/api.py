"""The one call through which models reach the cross-entropy; implementations slot in behind it."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels.cross_entropy import chunked, reference

Implementation = Literal["reference", "chunked"]

# Tokens per chunk. On 2 CPU cores 256 to 1024 were equally fast at V = 8192 (see experiments/bench); the logits of a
# chunk then take V * 2 KiB, which stays far below the activations of any model with that vocabulary.
CHUNK = 512


def linear_cross_entropy(
    e_ND,
    c_VD,
    targets_N,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_weight: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    implementation: Implementation = "chunked",
):
    """Cross-entropy in nats of softmax(e_ND @ c_VD.T) against integer targets_N, with optional cap * tanh(x / cap).

    reduction="sum": returns (loss, nll, lse_squared), three scalars over the tokens whose target is not `ignore_index`;
    loss = nll + z_weight * lse_squared (z-loss, PaLM section 5) is the only one that carries gradients.
    reduction="none": returns (nll_N, lse_N), nll being 0 for ignored tokens; differentiable (z_weight is not used, and
    refused when set).
    Float32 results (float64 for float64 inputs); a batch in which all targets are ignored gives 0 and zero gradients.
    Raises ValueError for shapes that do not fit together.
    """
    if e_ND.ndim != 2 or c_VD.ndim != 2 or e_ND.shape[1] != c_VD.shape[1] or targets_N.shape != e_ND.shape[:1]:
        raise ValueError(f"shapes do not fit: e {e_ND.shape}, c {c_VD.shape}, targets {targets_N.shape}")
    options = {"ignore_index": ignore_index, "softcap": softcap}
    if reduction == "none":
        if z_weight:
            raise ValueError("z_weight needs reduction='sum'; with 'none' add z * lse_N**2 yourself")
        if implementation == "reference":
            return reference.token_losses(e_ND, c_VD, targets_N, **options)
        return chunked.token_losses(e_ND, c_VD, targets_N, chunk=CHUNK, **options)
    if implementation == "reference":
        nll, squares = reference.loss_sums(e_ND, c_VD, targets_N, **options)
        loss = nll + z_weight * squares
    else:
        loss, squares = chunked.loss_sums(e_ND, c_VD, targets_N, chunk=CHUNK, z_weight=z_weight, **options)
        # The value gains the z-loss here; its gradient is already part of the one that `loss` carries.
        nll = jax.lax.stop_gradient(loss)
        loss = loss + z_weight * jax.lax.stop_gradient(squares)
    return loss, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(jnp.asarray(squares))
