"""The config of one run: everything that decides its result, and nothing about where it runs."""

import dataclasses

from tinyjax.data.config import DataConfig, TokenizerConfig
from tinyjax.errors import ConfigError
from tinyjax.models.component import Architecture
from tinyjax.models.transformer import Transformer
from tinyjax.objectives.next_token import NextToken
from tinyjax.objectives.objective import Objective
from tinyjax.optim.optimizers import AdamW, Optimizer
from tinyjax.optim.schedules import Schedule, WarmupStableDecay


def _at_least(config, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < low:
            raise ConfigError(name, f"must be at least {low}, got {value}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, from which seed, in which portions."""

    steps: int = 1000  # optimizer updates
    seed: int = 0  # of parameters, data order and dropout
    microbatches: int = 1  # a batch is taken in this many parts, weighted by their tokens; saves memory
    steps_per_dispatch: int = 1  # steps in one compiled call; pays when a step takes about a millisecond
    log_every: int = 10  # steps per row of the training curve

    def __post_init__(self):
        _at_least(self, 1, "steps", "microbatches", "steps_per_dispatch", "log_every")
        if not 0 <= self.seed < 2**32:
            raise ConfigError("seed", f"must be from 0 to 2**32 - 1, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out documents, and what the model is asked to write."""

    every: int | None = 200  # steps; none: only at the end
    positions: int | None = 65536  # whole documents until this many predictions; none: all held-out documents
    samples: int = 3  # texts written at each evaluation
    sample_tokens: int = 96  # length of each
    prompt: str = ""  # what each text begins with
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # sample from the likeliest tokens that hold this share of the probability

    def __post_init__(self):
        _at_least(self, 1, "every", "positions", "sample_tokens")
        _at_least(self, 0, "samples", "temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"must be in (0, 1], got {self.top_p}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is written and which copies stay. The last step is always written."""

    every: int | None = 200  # steps; none: only at the end
    keep_last: int = 2  # newest checkpoints kept; with 2, a damaged newest one has a predecessor
    keep_best: int = 1  # checkpoints kept for their held-out loss, beside the newest

    def __post_init__(self):
        _at_least(self, 1, "every", "keep_last")
        _at_least(self, 0, "keep_best")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: Architecture = Transformer()
    objective: Objective = NextToken()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = WarmupStableDecay()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        if self.data.batch % self.train.microbatches:
            raise ConfigError("train.microbatches", f"{self.train.microbatches} does not divide {self.data.batch} rows")
