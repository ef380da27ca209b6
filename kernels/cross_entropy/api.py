"""The calls through which models reach the cross-entropy; implementations slot in behind them."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels import backends
from kernels.cross_entropy import chunked, compact, fused, gpu, reference, tpu, vjp

Implementation = Literal["reference", "chunked", "tpu", "gpu"]
MODULES = {"chunked": chunked, "tpu": tpu, "gpu": gpu}


def linear_cross_entropy(
    e_ND,
    c_VD,
    targets_N,
    *,
    bias_V=None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_lse: bool = False,
    filter_eps: float | Literal["auto"] | None = None,
    accumulate: Literal["float32", "input"] = "float32",
    compacted: bool | None = None,
    implementation: Implementation | None = None,
):
    """Cross-entropy in nats of softmax(cap(e_ND @ c_VD.T + bias_V)) against integer targets_N, without the logits.

    cap(x) = softcap * tanh(x / softcap), or x. Returns the loss: nll_N with 0 for ignored tokens ("none"), their sum,
    or their mean over the tokens that are not ignored (0 if there are none); with `return_lse`, (loss, lse_N), the
    log-sum-exp having gradients too (for a z-loss) and being 0 for ignored tokens. Float32, or float64 for float64
    inputs; gradients in the dtypes of the inputs. A target that is neither `ignore_index` nor below V gives NaN.

    filter_eps: allows kernels to skip tiles of the backward pass in which |softmax - onehot| stays below it. "auto" is
    the resolution of e's dtype over 32 (Wijmans et al. 2024, section 4.3: 2^-12 for bfloat16).
    accumulate: dtype of the gradients' partial sums that kernels keep in memory between blocks.
    compacted: move ignored tokens to the end first, so that they cost nothing, for one copy of e; None does so for
    "chunked". Without it only blocks in which all tokens are ignored are skipped.
    implementation: None takes the backend's kernel where it serves the shapes, else "chunked".
    Raises ValueError for shapes that do not fit together or that a named implementation cannot serve.
    Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009).
    """
    name, options = _resolve(e_ND, c_VD, targets_N, bias_V, softcap, filter_eps, accumulate, implementation)
    targets_N = _targets(targets_N, ignore_index)
    total_only = reduction != "none" and not return_lse
    if compacted is None:
        compacted = name == "chunked"
    order_N = compact.order(targets_N) if compacted and name != "reference" else None
    if order_N is not None:
        e_ND, targets_N = e_ND[order_N], targets_N[order_N]
    if name == "chunked" and total_only:
        nll = fused.loss_sums(e_ND, c_VD, bias_V, targets_N, softcap)[0]
        return nll if reduction == "sum" else nll / _count(targets_N)
    if name == "reference":
        nll_N, lse_N = reference.token_losses(e_ND, c_VD, bias_V, targets_N, softcap=softcap)
    else:
        nll_N, lse_N = vjp.token_losses(e_ND, c_VD, bias_V, targets_N, options)
    if reduction == "none":
        loss = nll_N if order_N is None else compact.restore(nll_N, order_N)
    else:
        loss = jnp.sum(nll_N) / (_count(targets_N) if reduction == "mean" else 1)
    if not return_lse:
        return loss
    return loss, lse_N if order_N is None else compact.restore(lse_N, order_N)


def loss_sums(
    e_ND,
    c_VD,
    targets_N,
    *,
    bias_V=None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_weight: float = 0.0,
    filter_eps: float | Literal["auto"] | None = None,
    implementation: Implementation | None = None,
):
    """Return (loss, nll, lse_squared), sums over the tokens that are not ignored, for training with a z-loss.

    loss = nll + z_weight * lse_squared (PaLM, section 5) is the only one that carries gradients. In plain XLA these are
    formed during the forward pass, which a loss per token does not allow. Everything else as `linear_cross_entropy`.
    """
    name, options = _resolve(e_ND, c_VD, targets_N, bias_V, softcap, filter_eps, "float32", implementation)
    targets_N = _targets(targets_N, ignore_index)
    if name == "chunked":
        sums = fused.loss_sums(e_ND, c_VD, bias_V, targets_N, softcap, z_weight)
    else:
        if name == "reference":
            nll_N, lse_N = reference.token_losses(e_ND, c_VD, bias_V, targets_N, softcap=softcap)
        else:
            nll_N, lse_N = vjp.token_losses(e_ND, c_VD, bias_V, targets_N, options)
        nll, squares = jnp.sum(nll_N), jnp.sum(jnp.square(lse_N))
        sums = nll + z_weight * squares, nll, squares
    loss, nll, squares = sums
    return loss, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(squares)


def vocabulary_parallel_cross_entropy(
    e_ND,
    c_VD,
    targets_N,
    *,
    axis: str,
    bias_V=None,
    ignore_index: int = -100,
    softcap: float | None = None,
    filter_eps: float | Literal["auto"] | None = None,
    accumulate: Literal["float32", "input"] = "float32",
    implementation: Implementation | None = None,
):
    """Return (nll_N, lse_N) inside a `shard_map` in which each device of `axis` has its V rows of the classifier.

    e_ND and targets_N are the same on all devices of the axis; targets count over the whole vocabulary, of which every
    device has the same number of rows (pad with a bias of -inf). One maximum and two sums of N numbers cross the axis
    forward, the gradient of e backward. The shard_map needs check_vma=False. "reference" has no such form.
    """
    name, options = _resolve(e_ND, c_VD, targets_N, bias_V, softcap, filter_eps, accumulate, implementation)
    if name == "reference":
        raise ValueError("the reference holds all logits; a cut vocabulary needs 'chunked', 'tpu' or 'gpu'")
    return vjp.parallel_token_losses(e_ND, c_VD, bias_V, _targets(targets_N, ignore_index), options, axis)


def auto_filter_eps(dtype) -> float:
    """Return the resolution of `dtype` over 32: 2^-12 for bfloat16, 2^-15 for float16, 2^-28 for float32."""
    return float(jnp.finfo(dtype).eps) / 32


def _targets(targets_N, ignore_index):
    """Return targets with -1 for ignored tokens; other negative ones become impossible, so that they give NaN."""
    targets_N = targets_N.astype(jnp.int32)
    impossible_N = jnp.where(targets_N < 0, jnp.iinfo(jnp.int32).max, targets_N)
    return jnp.where(targets_N == ignore_index, -1, impossible_N)


def _count(targets_N):
    return jnp.maximum(jnp.sum(targets_N >= 0), 1)


def _resolve(e_ND, c_VD, targets_N, bias_V, softcap, filter_eps, accumulate, implementation):
    """Check the arguments; return (name of the implementation, its options)."""
    fits = e_ND.ndim == 2 and c_VD.ndim == 2 and e_ND.shape[1] == c_VD.shape[1] and targets_N.shape == e_ND.shape[:1]
    if not fits or (bias_V is not None and bias_V.shape != c_VD.shape[:1]):
        bias = "" if bias_V is None else f", bias {bias_V.shape}"
        raise ValueError(f"shapes do not fit: e {e_ND.shape}, c {c_VD.shape}, targets {targets_N.shape}{bias}")
    if e_ND.shape[0] == 0:
        raise ValueError("there are no tokens: e has shape " + str(e_ND.shape))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if accumulate not in ("float32", "input"):
        raise ValueError(f"accumulate must be 'float32' or 'input', got {accumulate!r}")
    if filter_eps == "auto":
        filter_eps = auto_filter_eps(e_ND.dtype)

    def why_not(name):
        return MODULES[name].supports(e_ND, c_VD)

    name = backends.choose(implementation, why_not, "the cross-entropy")
    options = vjp.Options(name, MODULES.get(name), softcap, float(filter_eps or 0.0), accumulate)
    return name, options
