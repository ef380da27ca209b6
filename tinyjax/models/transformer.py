"""The decoder: embedding, a stack of pre-norm blocks, final norm, tied or untied head."""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyjax.errors import ConfigError
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.component import Architecture, Build, FeedForward, Mixer, Norm, Position
from tinyjax.models.feed_forward import Gated
from tinyjax.models.init import GPT2, Init
from tinyjax.models.norms import RMSNorm
from tinyjax.models.position import Rotary

REMAT_POLICIES = {
    "full": None,  # keep only each block's input
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,  # keep the projections, redo the rest
}


@dataclasses.dataclass(frozen=True)
class Transformer(Architecture):
    """A decoder-only transformer composed of the components named in its fields."""

    kind: ClassVar[str] = "transformer"
    depth: int = 4  # blocks L
    width: int = 128  # D
    attention: Mixer = GroupedQuery()
    mlp: FeedForward = Gated()
    norm: Norm = RMSNorm()
    position: Position = Rotary()
    init: Init = GPT2()
    tied: bool = True  # the head is the token table
    logit_softcap: float | None = None  # logits become cap * tanh(logit / cap)
    dropout: float = 0.0  # share of the embeddings and of each block's two outputs set to zero in training
    layers: Literal["scan", "unroll"] = "scan"  # one compiled block, or one per layer (faster when small)
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass computes again
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU

    def __post_init__(self):
        for name in ("depth", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError("dropout", f"must be in [0, 1), got {self.dropout}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ConfigError("logit_softcap", f"must be positive, or none for off, got {self.logit_softcap}")
        try:
            self.attention.check(self.width)
        except ConfigError as error:
            raise ConfigError(f"attention.{error.path}", error.reason) from None

    def module(self, vocab_size: int, dtype: Any) -> nn.Module:
        return Decoder(self, Build(self.width, self.depth, dtype, self.init, self.dropout), vocab_size)

    def flops(self, vocab_size: int, sequence: int) -> dict[str, int]:
        parts = self.attention.flops(self.width, sequence) | {"mlp": self.mlp.flops(self.width)}
        return {k: self.depth * v for k, v in parts.items()} | {"head": 2 * self.width * vocab_size}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    config: Transformer
    build: Build
    train: bool

    @nn.compact
    def __call__(self, x_BSD, tables, segment_ids_BS):
        c, build = self.config, self.build

        def drop(y_BSD):
            return nn.Dropout(build.dropout, deterministic=not self.train)(y_BSD) if build.dropout else y_BSD

        mixer = c.attention.module(build, c.norm, c.position, "attention")
        x_BSD = x_BSD + drop(mixer(c.norm.module(build, "attention_norm")(x_BSD), tables, segment_ids_BS))
        mlp = c.mlp.module(build, "mlp")
        return x_BSD + drop(mlp(c.norm.module(build, "mlp_norm")(x_BSD)))


class Unrolled(nn.Module):
    """The blocks one after another, as children named 0 .. L-1."""

    config: Transformer
    build: Build
    train: bool

    @nn.compact
    def __call__(self, x_BSD, tables, segment_ids_BS):
        block = _remat(Block, self.config, prevent_cse=True)
        for i in range(self.config.depth):
            x_BSD = block(self.config, self.build, self.train, name=str(i))(x_BSD, tables, segment_ids_BS)
        return x_BSD


class ScanStep(nn.Module):
    """One block in the form that nn.scan wants: (carry, broadcast inputs) -> (carry, nothing)."""

    config: Transformer
    build: Build
    train: bool

    @nn.compact
    def __call__(self, x_BSD, tables, segment_ids_BS):
        block = Block(self.config, self.build, self.train)
        nn.share_scope(self, block)
        return block(x_BSD, tables, segment_ids_BS), None


def _remat(block, config: Transformer, prevent_cse: bool):
    if config.remat == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[config.remat], prevent_cse=prevent_cse)


class Decoder(nn.Module):
    """Parameters: embedding/table [V, D], layers/... (a leading axis L when scanned), norm, head/table if untied."""

    config: Transformer
    build: Build
    vocab_size: int

    def setup(self):
        self.embedding = Table(self.build, self.vocab_size, "embedding")
        self.norm = self.config.norm.module(self.build, None)
        if not self.config.tied:
            self.unembedding = Table(self.build, self.vocab_size, "head", name="head")

    @nn.compact
    def hidden(self, batch, train: bool = False):
        """Return x_BSD after the final norm; batch holds tokens, positions and maybe segment_ids, all [B, S]."""
        c, build = self.config, self.build
        x_BSD = jnp.take(self.embedding(), batch["tokens"], axis=0)
        if build.dropout:
            x_BSD = nn.Dropout(build.dropout, deterministic=not train)(x_BSD)
        tables = c.position.tables(batch["positions"], c.attention.rotated_width(c.width))
        segment_ids_BS = batch.get("segment_ids")
        if c.layers == "unroll":
            stack = Unrolled(c, build, train, name="layers")
            return self.norm(stack(x_BSD, tables, segment_ids_BS))
        stack = nn.scan(
            _remat(ScanStep, c, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return self.norm(stack(c, build, train, name="layers")(x_BSD, tables, segment_ids_BS)[0])

    def head(self):
        """Return the output table c_VD in the compute dtype."""
        return self.embedding() if self.config.tied else self.unembedding()

    def __call__(self, batch, train: bool = False):
        """Return logits_BSV in float32, after the cap."""
        x_BSD = self.hidden(batch, train)
        logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, self.head(), preferred_element_type=jnp.float32)
        cap = self.config.logit_softcap
        return logits_BSV if cap is None else cap * jnp.tanh(logits_BSV / cap)


class Table(nn.Module):
    """One vector per token: parameter table [V, D]."""

    build: Build
    vocab_size: int
    role: Literal["embedding", "head"]

    @nn.compact
    def __call__(self):
        build = self.build
        init = build.init.initializer(self.role, build.width, build.width, build.depth)
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        return self.param("table", init, (self.vocab_size, build.width), jnp.float32).astype(build.dtype)
