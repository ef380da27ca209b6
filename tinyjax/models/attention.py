"""Grouped-query self-attention; normalised queries and keys, a window, a cap on the scores and sinks are optional."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels.attention.api import Implementation, attention
from tinyjax import sharding
from tinyjax.errors import ConfigError
from tinyjax.models.component import Build, Mixer, Norm, Position
from tinyjax.models.linear import Linear, matmul_flops


@dataclasses.dataclass(frozen=True)
class GroupedQuery(Mixer):
    """Multi-head attention in which groups of query heads share a key/value head (Ainslie et al. 2023)."""

    kind: ClassVar[str] = "gqa"
    heads: int = 4  # query heads H
    kv_heads: int | None = None  # key/value heads K; none: as many as query heads
    head_width: int | None = None  # A; none: width / heads
    qk_norm: bool = False  # normalise each query and key head with the model's norm before positions
    softcap: float | None = None  # scores become cap * tanh(score / cap)
    window: int | None = None  # tokens that a query sees, itself included; none: all up to itself
    sinks: bool = False  # a learnt logit per query head that takes a share of the probability (OpenAI 2025, gpt-oss)
    bias: bool = False  # on the four projections
    implementation: Implementation | None = None  # none: the kernel of the device where it can serve, else chunked

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_width", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, got {value}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError("kv_heads", f"{self.kv_heads} does not divide heads = {self.heads}")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError("softcap", f"must be positive, or none for off, got {self.softcap}")

    def check(self, width: int) -> None:
        if self.head_width is None and width % self.heads:
            raise ConfigError("heads", f"{self.heads} does not divide width = {width}; change one or set head_width")
        if self.rotated_width(width) % 2:
            raise ConfigError("head_width", f"must be even for rotary positions, got {self.rotated_width(width)}")

    def rotated_width(self, width: int) -> int:
        return self.head_width or width // self.heads

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Return (H, K, A)."""
        return self.heads, self.kv_heads or self.heads, self.rotated_width(width)

    def module(self, build: Build, norm: Norm, position: Position, name: str) -> nn.Module:
        return Attention(self, build, norm, position, name=name)

    def flops(self, width: int, sequence: int) -> dict[str, int]:
        h, k, a = self.sizes(width)
        projections = matmul_flops((width,), (h + 2 * k, a)) + matmul_flops((h, a), (width,))
        return {"attention projections": projections, "attention scores": 2 * matmul_flops((sequence,), (h, a))}


class Attention(nn.Module):
    """Parameters: query, key, value [D, heads, A], out [H, A, D]; query_norm, key_norm [A] and sinks [H] if asked."""

    config: GroupedQuery
    build: Build
    norm: Norm
    position: Position

    @nn.compact
    def __call__(self, x_BSD, tables, segment_ids_BS):
        c, build = self.config, self.build
        h, k, a = c.sizes(build.width)

        def project(heads, name):
            axes = ("embed", "heads" if name == "query" else "kv_heads", "head")
            return Linear(build, (build.width,), (heads, a), axes, "inward", c.bias, name=name)(x_BSD)

        q_BSHA, k_BTKA, v_BTKA = project(h, "query"), project(k, "key"), project(k, "value")
        if c.qk_norm:
            q_BSHA = self.norm.module(build, "query_norm")(q_BSHA)
            k_BTKA = self.norm.module(build, "key_norm")(k_BTKA)
        q_BSHA, k_BTKA = self.position.rotate(q_BSHA, tables), self.position.rotate(k_BTKA, tables)
        sinks_H = None
        if c.sinks:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
            sinks_H = self.param("sinks", zeros, (h,), jnp.float32)

        def attend(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, sinks_H):
            return attention(
                q_BSHA,
                k_BTKA,
                v_BTKA,
                segment_ids=segment_ids_BS,
                window=c.window,
                softcap=c.softcap,
                sinks_H=sinks_H,
                implementation=c.implementation,
            )

        shared = sharding.per_device(attend, (*[P("batch")] * 4, P()), P("batch"))
        y_BSHA = shared(q_BSHA, k_BTKA, v_BTKA, segment_ids_BS, sinks_H)
        out = Linear(build, (h, a), (build.width,), ("heads", "head", "embed"), "outward", c.bias, name="out")
        return out(y_BSHA)
