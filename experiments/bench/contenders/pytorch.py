"""The same train step in PyTorch as its users write it: plain modules, SDPA, fused AdamW, optionally compiled."""

import contextlib
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from experiments.bench.contenders import workload
from experiments.bench.contenders.serve import serve
from experiments.bench.contenders.workload import Workload


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions, the two halves of a head paired."""

    def __init__(self, work: Workload):
        super().__init__()
        self.heads = work.heads
        for name in ("query", "key", "value", "out"):
            self.add_module(name, nn.Linear(work.width, work.width, bias=False))

    def forward(self, x_BSD, cos_SA, sin_SA):
        def heads(y_BSD):
            return y_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def rotate(y_BHSA):
            a, b = y_BHSA.chunk(2, dim=-1)
            return torch.cat((a * cos_SA - b * sin_SA, b * cos_SA + a * sin_SA), dim=-1)

        q_BHSA, k_BHSA, v_BHSA = (heads(layer(x_BSD)) for layer in (self.query, self.key, self.value))
        # Autocast leaves rotation in float32; SDPA wants one dtype.
        q_BHSA, k_BHSA = rotate(q_BHSA).to(v_BHSA.dtype), rotate(k_BHSA).to(v_BHSA.dtype)
        y_BHSA = F.scaled_dot_product_attention(q_BHSA, k_BHSA, v_BHSA, is_causal=True)
        return self.out(y_BHSA.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Gated SiLU."""

    def __init__(self, work: Workload):
        super().__init__()
        self.gate = nn.Linear(work.width, work.hidden, bias=False)
        self.up = nn.Linear(work.width, work.hidden, bias=False)
        self.out = nn.Linear(work.hidden, work.width, bias=False)

    def forward(self, x_BSD):
        return self.out(F.silu(self.gate(x_BSD)) * self.up(x_BSD))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, work: Workload):
        super().__init__()
        self.attention_norm = nn.RMSNorm(work.width, eps=workload.NORM_EPS)
        self.mlp_norm = nn.RMSNorm(work.width, eps=workload.NORM_EPS)
        self.attention = Attention(work)
        self.mlp = FeedForward(work)

    def forward(self, x_BSD, cos_SA, sin_SA):
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SA, sin_SA)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Decoder(nn.Module):
    """The workload's model; returns the mean loss."""

    def __init__(self, work: Workload):
        super().__init__()
        self.embedding = nn.Embedding(work.vocab, work.width)
        self.layers = nn.ModuleList(Block(work) for _ in range(work.depth))
        self.norm = nn.RMSNorm(work.width, eps=workload.NORM_EPS)
        head = work.width // work.heads
        rate_A = workload.ROPE_BASE ** (-torch.arange(0, head, 2) / head)
        angle_SA = torch.arange(work.sequence)[:, None] * rate_A
        self.register_buffer("cos_SA", angle_SA.cos())
        self.register_buffer("sin_SA", angle_SA.sin())

    def forward(self, tokens_BS, targets_BS):
        x_BSD = self.embedding(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.cos_SA, self.sin_SA)
        logits_BSV = F.linear(self.norm(x_BSD), self.embedding.weight)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())


def load(model: Decoder, params: dict) -> None:
    """Copy the workload's parameters, by path, into the model; its linear layers keep them transposed."""
    tensors = {}
    for path, array in params.items():
        name = path.replace("/", ".").replace("embedding.table", "embedding.weight")
        if name.endswith("kernel"):
            contracted = 2 if ".attention.out." in name else 1  # [H, A, D] against [D, H, A] and [D, F]
            array = array.reshape(math.prod(array.shape[:contracted]), -1).T
        tensors[name.replace(".kernel", ".weight").replace(".scale", ".weight")] = torch.tensor(array)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) != {"cos_SA", "sin_SA"}:
        raise ValueError(f"parameters do not fit: missing {missing}, unexpected {unexpected}")


def prepare(work: Workload, options: dict):
    """Return a function that takes one step and returns its mean loss; options: compile, bf16 (bool)."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    model = Decoder(work)
    load(model, workload.parameters(work))
    decayed = [p for p in model.parameters() if p.ndim == 2 and p is not model.embedding.weight]
    others = [p for p in model.parameters() if p.ndim == 1 or p is model.embedding.weight]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": workload.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=workload.LEARNING_RATE,
        betas=workload.BETAS,
        eps=workload.EPS,
        fused=True,
    )
    arrays = workload.batch(work, packed=False)
    tokens_BS, targets_BS = (torch.tensor(arrays[name]).long() for name in ("tokens", "targets"))
    forward = torch.compile(model) if options["compile"] else model
    autocast = torch.autocast("cpu", torch.bfloat16) if options["bf16"] else contextlib.nullcontext()

    def one():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = forward(tokens_BS, targets_BS)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), workload.CLIP)
        optimizer.step()
        return loss.item()

    return one


if __name__ == "__main__":
    serve(prepare)
