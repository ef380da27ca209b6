"""Batches by step: a pure function of (prepared data, seed, step), with no state, no workers and no history."""

import functools
import hashlib

import numpy as np

from tinyjax.data import packing
from tinyjax.data.config import DataConfig
from tinyjax.data.mixture import rows_before
from tinyjax.data.packing import Batch, Epoch
from tinyjax.data.prepare import Prepared
from tinyjax.errors import UserError

EPOCHS_KEPT = 2  # shuffled orders in memory per corpus: a batch may straddle the border between two
DOCUMENTS, ROWS_OF_A_STEP = 0, 1  # last number of a random key: what is shuffled


class Batches:
    """The training batches of a run: `batches[step]` for step 0 to steps - 1, in any order, as often as wanted.

    A batch is {"tokens", "targets", "segment_ids", "positions"}, each int32 [batch, sequence]. Targets are the next
    token of the same document, or IGNORE where there is none (padding); segments count documents in the row from 1, 0
    is padding; positions count from 0 in every document's part of the row.

    Each corpus is passed over in epochs: in every epoch each prediction of each document comes exactly once, in another
    order. With a mixture the rows of a step are shuffled, so that slices of a batch hold all corpora.
    """

    def __init__(self, prepared: Prepared, data: DataConfig, seed: int, steps: int):
        if not 0 <= seed < 2**32:
            raise UserError(f"seed: expected 0 to 2**32 - 1, got {seed}")
        if steps < 0:
            raise UserError(f"steps: expected at least 0, got {steps}")
        self._splits = [corpus.train for corpus in prepared.corpora]
        self._rows = [packing.rows_per_epoch(split, data.sequence) for split in self._splits]
        self._data, self._seed, self._steps = data, seed, steps
        self._epoch = functools.lru_cache(maxsize=EPOCHS_KEPT * len(self._splits))(self._shuffled)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} is outside 0..{self._steps - 1}")
        first, last = self._share(step)
        parts = [
            self._part(corpus, np.arange(first[corpus], last[corpus]))
            for corpus in range(len(self._splits))
            if first[corpus] < last[corpus]
        ]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self._data.mixture is None:
            return batch
        order = np.random.RandomState([self._seed, step, ROWS_OF_A_STEP]).permutation(self._data.batch)
        return {name: array[order] for name, array in batch.items()}

    def epochs(self, step: int) -> tuple[float, ...]:
        """Return how many times each corpus has been passed over before `step`."""
        return tuple(int(rows) / per_epoch for rows, per_epoch in zip(self._given(step), self._rows, strict=True))

    def _share(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self._given(step), self._given(step + 1)

    def _given(self, step: int) -> np.ndarray:
        """Rows given to each corpus before `step`, int64 [corpora]."""
        return self._rows_before[step] if self._data.mixture else np.array([step * self._data.batch])

    @functools.cached_property
    def _rows_before(self) -> np.ndarray:
        return rows_before(self._data.mixture, self._data.batch, self._steps)

    def _shuffled(self, corpus: int, epoch: int) -> Epoch:
        key = (self._seed, corpus, epoch, DOCUMENTS)
        return packing.shuffled_epoch(self._splits[corpus], self._data.sequence, key)

    def _part(self, corpus: int, row_B: np.ndarray) -> Batch:
        """Rows number `row_B` (ascending, since the start of the run) of one corpus."""
        epoch_B, index_B = np.divmod(row_B, self._rows[corpus])
        parts = [
            packing.training_rows(
                self._splits[corpus], self._epoch(corpus, epoch), index_B[epoch_B == epoch], self._data.sequence
            )
            for epoch in np.unique(epoch_B).tolist()
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def batch_hash(batch: Batch) -> str:
    """Return 16 hex digits that identify a batch: its names, types, shapes and contents."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()
