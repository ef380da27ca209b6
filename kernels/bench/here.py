"""What is timed on this machine's backend: every implementation that serves it, block sizes, and rivals on GPUs."""

import dataclasses
from collections.abc import Callable, Iterator

import jax

from kernels.attention import chunked as attention_chunked
from kernels.attention import shapes as attention
from kernels.bench import gpu
from kernels.cross_entropy import api, chunked, shapes

# What two CPU cores can time in seconds; on other backends the shapes of real models.
CPU_LOSSES = {
    "quickstart": dataclasses.replace(shapes.SHAPES["quickstart"], dtype="float32"),
    "32k words": shapes.Shape(n=2048, d=256, v=32768, dtype="float32"),
}
CPU_ATTENTION = {
    "256 tokens": attention.Shape(4, 256, 256, 4, 4, 64, dtype="float32"),
    "1024 tokens, grouped": attention.Shape(1, 1024, 1024, 8, 2, 64, dtype="float32"),
}
PROGRAMS = ("forward", "value_and_grad")


@dataclasses.dataclass(frozen=True)
class Group:
    """Programs to be timed in turn and compared with the first: name -> () -> (function, ShapeDtypeStructs)."""

    title: str
    programs: dict[str, Callable[[], tuple]]


def groups(op: str | None, backend: str) -> Iterator[Group]:
    """Yield what is compared on a backend ("cpu", "gpu", "tpu")."""
    if op in (None, "cross_entropy"):
        for name, shape in (CPU_LOSSES if backend == "cpu" else shapes.SHAPES).items():
            yield from _losses(name, shape, backend)
    if op in (None, "attention"):
        for name, shape in (CPU_ATTENTION if backend == "cpu" else attention.SHAPES).items():
            yield from _attentions(name, shape, backend)


def _losses(name, shape, backend):
    title = f"cross_entropy, {name}: {shape.n} tokens, width {shape.d}, vocabulary {shape.v}, {shape.dtype}"
    for program in PROGRAMS:
        made = {
            "reference": lambda p=program: _loss(shape, "reference", p),
            "chunked": lambda p=program: _tokens(shape, p),
        }
        if program == "value_and_grad":
            made["fused"] = lambda: shapes.program("value_and_grad", shape, "chunked")
        if backend in ("gpu", "tpu"):
            made[backend] = lambda p=program: shapes.program(p, shape, backend)
        if backend == "gpu":
            made["cut-cross-entropy"] = lambda p=program: gpu.cut_cross_entropy(shape, p)
        yield Group(f"{title}, {program}", made)
    if backend == "cpu":
        sizes = [n for n in (64, 128, 256, 512, 1024, 2048) if n <= shape.n]
        made = {
            f"{n} tokens a chunk": lambda n=n: shapes.program("backward", shape, "chunked", chunked.Blocks(n))
            for n in sizes
        }
        yield Group(f"{title}, chunked backward", made)


def _loss(shape, implementation, program):
    function, arguments = shapes.program("value_and_grad", shape, implementation)
    if program == "value_and_grad":
        return function, arguments
    return lambda *arrays: function(*arrays)[0], arguments  # XLA drops the gradients that nothing uses


def _tokens(shape, program):
    """The loss from single tokens' losses, chunked: the backward pass computes the logits again."""

    def loss(e_ND, c_VD, bias_V, targets_N):
        # With the log-sum-exps as a result the gradients cannot be formed ahead, which is what "fused" does.
        return api.linear_cross_entropy(
            e_ND,
            c_VD,
            targets_N,
            bias_V=bias_V,
            softcap=shape.softcap or None,
            reduction="sum",
            return_lse=True,
            compacted=False,
            implementation="chunked",
        )[0]

    _, arguments = shapes.program("value_and_grad", shape, "chunked")
    return (jax.value_and_grad(loss, (0, 1)) if program == "value_and_grad" else loss), arguments


def _attentions(name, shape, backend):
    title = f"attention, {name}: {shape.b} x {shape.s} tokens, {shape.h} heads, {shape.k} of keys, width {shape.a}"
    for program in PROGRAMS:
        names = ["reference", "chunked", *([backend] if backend in ("gpu", "tpu") else [])]
        made = {i: lambda i=i, p=program: attention.program(p, shape, i) for i in names}
        if backend == "gpu":
            made["cudnn"] = lambda p=program: gpu.cudnn(shape, p)
        yield Group(f"{title}, {shape.dtype}, {program}", made)
    if backend == "cpu":
        made = {
            f"{n} blocks": lambda n=n: attention.program(
                "value_and_grad", shape, "chunked", attention_chunked.Blocks(n)
            )
            for n in (1, 2, 4, 8, 16)
        }
        yield Group(f"{title}, {shape.dtype}, chunked value_and_grad", made)
