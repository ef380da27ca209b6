"""Loss on a fixed set of held-out documents: nats per token, bits per byte, and their standard errors."""

import dataclasses
import math

import jax
import numpy as np

from tinyjax import sharding
from tinyjax.data.config import DataConfig
from tinyjax.data.heldout import HeldoutBatches, heldout_batches
from tinyjax.data.prepare import Corpus
from tinyjax.models.model import Model
from tinyjax.objectives.next_token import token_nll


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model lost on one selection of documents."""

    name: str  # of the corpus
    hash: str  # of the selection: documents and sequence length
    documents: int
    tokens: int  # predictions, one per token and one per end of document
    bytes: int  # raw UTF-8 bytes of the documents
    nats_per_token: float
    bits_per_byte: float  # all predictions' bits, ends of documents included, over the raw bytes
    bits_per_byte_error: float  # standard error over documents


def ratio_error(numerator_D, denominator_D) -> float:
    """Return the standard error of sum(numerator) / sum(denominator) over independent documents D.

    Linearisation of a ratio estimator (Cochran 1977, section 2.11); nan for one document.
    """
    n = len(numerator_D)
    if n < 2:
        return math.nan
    total = float(np.sum(denominator_D))
    residual_D = numerator_D - np.sum(numerator_D) / total * denominator_D
    return math.sqrt(n / (n - 1) * float(np.sum(np.square(residual_D)))) / total


class Evaluator:
    """Held-out batches of every corpus and one compiled function; `evaluate(params)` may be called at any step."""

    def __init__(self, model: Model, corpora: tuple[Corpus, ...], data: DataConfig, positions: int | None, mesh):
        self._sets: list[tuple[Corpus, HeldoutBatches]] = [
            (corpus, heldout_batches(corpus.heldout, data, positions)) for corpus in corpora
        ]
        self._rows = sharding.batch_sharding(mesh, data.batch)
        self.compiled = jax.jit(sharding.within(mesh, lambda params, batch: token_nll(model, params, batch)))

    def evaluate(self, params) -> tuple[Evaluation, ...]:
        """Return one Evaluation per corpus."""
        return tuple(self._one(corpus, batches, params) for corpus, batches in self._sets)

    def _one(self, corpus: Corpus, batches: HeldoutBatches, params) -> Evaluation:
        chosen = batches.selection
        nats_D = np.zeros(chosen.documents)
        waiting = None
        # The next batch is dispatched before the last one's losses are fetched.
        for index in [*range(len(batches)), None]:
            ready, waiting = waiting, None
            if index is not None:
                waiting = index, self.compiled(params, jax.device_put(batches[index], self._rows))
            if ready is not None:
                document_BS = batches.documents(ready[0])
                nll_BS = np.asarray(ready[1], np.float64)
                np.add.at(nats_D, document_BS[document_BS >= 0], nll_BS[document_BS >= 0])
        bytes_D = np.asarray(corpus.heldout.byte_counts[: chosen.documents], np.float64)
        bits_D = nats_D / math.log(2)
        return Evaluation(
            name=corpus.name,
            hash=chosen.hash,
            documents=chosen.documents,
            tokens=chosen.positions,
            bytes=chosen.bytes,
            nats_per_token=float(nats_D.sum()) / chosen.positions,
            bits_per_byte=float(bits_D.sum()) / chosen.bytes,
            bits_per_byte_error=ratio_error(bits_D, bytes_D),
        )
