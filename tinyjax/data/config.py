"""What text is read, how it becomes tokens, and the shape of a batch."""

import math
from dataclasses import dataclass
from typing import Literal

from tinyjax.errors import ConfigError

SPECIALS = 3  # unk, bos, eos
BYTES = 256  # one piece per byte, so that any text can be encoded
MAX_KNOT_STEP = 10_000_000  # the mixture's quotas are tabulated up to its last knot


@dataclass(frozen=True)
class Knot:
    """Mixture weights at one step."""

    step: int  # training step, from 0
    weights: tuple[float, ...]  # one per corpus, in any unit; only their ratios count

    def __post_init__(self):
        if not 0 <= self.step <= MAX_KNOT_STEP:
            raise ConfigError("step", f"expected 0 to {MAX_KNOT_STEP}, got {self.step}")
        if any(weight < 0 for weight in self.weights):
            raise ConfigError("weights", f"must not be negative, got {list(self.weights)}")
        if not 0 < sum(self.weights) < math.inf:
            raise ConfigError("weights", f"their sum must be positive and finite, got {list(self.weights)}")


@dataclass(frozen=True)
class Mixture:
    """Several corpora; each knot's weights are scaled to sum to 1, linear between knots and constant outside."""

    corpora: tuple[str, ...]  # each as in DataConfig.corpus
    knots: tuple[Knot, ...]  # in order of step; one knot is a constant mixture

    def __post_init__(self):
        if not self.corpora:
            raise ConfigError("corpora", "name at least one corpus")
        if len(set(self.corpora)) < len(self.corpora):
            raise ConfigError("corpora", "a corpus is listed twice; add its weights together")
        if not self.knots:
            raise ConfigError("knots", "give at least one knot")
        for i, knot in enumerate(self.knots):
            if len(knot.weights) != len(self.corpora):
                raise ConfigError(
                    f"knots[{i}].weights", f"expected {len(self.corpora)}, one per corpus, got {len(knot.weights)}"
                )
            if i and knot.step <= self.knots[i - 1].step:
                raise ConfigError(f"knots[{i}].step", f"must be above {self.knots[i - 1].step}, got {knot.step}")


@dataclass(frozen=True)
class DataConfig:
    """The text of a run and the shape of its batches."""

    corpus: str | None = (
        "stdlib"  # "stdlib", a file, a folder, a glob, or hf:NAME[:CONFIG][@SPLIT]; none with a mixture
    )
    mixture: Mixture | None = None  # several corpora instead of one
    text_field: str = "text"  # column of jsonl, Parquet and Hugging Face rows that holds the text
    heldout: float = 0.05  # share of documents held out, chosen by a hash of their content
    sequence: int = 256  # tokens per row of a batch
    batch: int = 16  # rows per step

    def __post_init__(self):
        if (self.corpus is None) == (self.mixture is None):
            raise ConfigError("corpus", "set exactly one of corpus and mixture; the other is none")
        if self.corpus is not None and not self.corpus.strip():
            raise ConfigError("corpus", "is empty; give stdlib, a file, a folder, a glob or hf:NAME")
        if not self.text_field:
            raise ConfigError("text_field", "is empty; name the column that holds the text")
        if not 0 < self.heldout < 1:
            raise ConfigError("heldout", f"expected a share between 0 and 1, both excluded, got {self.heldout}")
        if self.sequence < 1:
            raise ConfigError("sequence", f"expected at least 1 token, got {self.sequence}")
        if self.batch < 1:
            raise ConfigError("batch", f"expected at least 1 row, got {self.batch}")

    @property
    def corpora(self) -> tuple[str, ...]:
        """All corpora, in the order of the mixture's weights."""
        return self.mixture.corpora if self.mixture else (self.corpus,)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that is fitted on the training documents."""

    kind: Literal["bpe", "unigram", "char", "byte"] = "bpe"  # char and byte learn no merges
    vocab_size: int = 4096  # pieces, with 256 bytes and 3 specials; an upper limit for char; 259 for byte
    train_bytes: int = 64 << 20  # bytes of training documents it is fitted on, in order of their hash

    def __post_init__(self):
        least = SPECIALS + BYTES
        if self.kind == "byte" and self.vocab_size != least:
            raise ConfigError("vocab_size", f"is always {least} for kind=byte ({BYTES} bytes + {SPECIALS} specials)")
        if self.kind != "byte" and self.vocab_size <= least:
            raise ConfigError(
                "vocab_size", f"expected more than {least} ({BYTES} bytes + {SPECIALS} specials), got {self.vocab_size}"
            )
        if self.train_bytes < 1:
            raise ConfigError("train_bytes", f"expected at least 1, got {self.train_bytes}")
