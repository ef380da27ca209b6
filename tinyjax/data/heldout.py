"""The held-out documents as evaluation batches, with what identifies the evaluation and the raw bytes it covers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyjax.data import packing
from tinyjax.data.config import DataConfig
from tinyjax.data.packing import Batch
from tinyjax.data.store import Split
from tinyjax.errors import UserError


@dataclass(frozen=True)
class Selection:
    """Which documents an evaluation covers: the first ones in order of their hash, all of each."""

    documents: int
    positions: int  # next-token predictions
    bytes: int  # UTF-8 bytes of their raw text, what bits per byte divide by
    hash: str  # 16 hex digits of the documents' content and the sequence length; neither batch size nor tokenizer


def heldout_selection(split: Split, data: DataConfig, max_positions: int | None) -> Selection:
    """Return the whole documents from the start of `split` until `max_positions` is reached; all of them for None."""
    if max_positions is not None and max_positions < 1:
        raise UserError(f"max_positions: expected at least 1 or none, got {max_positions}")
    ends = np.cumsum(split.lengths)
    reached = np.searchsorted(ends, split.positions if max_positions is None else max_positions) + 1
    documents = min(int(reached), split.documents)
    content = hashlib.blake2b(split.digests[:documents].tobytes(), digest_size=8, salt=b"%d" % data.sequence)
    return Selection(documents, int(ends[documents - 1]), int(split.byte_counts[:documents].sum()), content.hexdigest())


def heldout_text(split: Split, documents: int) -> bytes:
    """Return the raw UTF-8 bytes of the first `documents` held-out documents, end to end."""
    with open(split.text, "rb") as text:
        return text.read(int(split.byte_counts[:documents].sum()))


class HeldoutBatches(Sequence[Batch]):
    """Batches as in `Batches`, each of shape [batch, sequence], that hold every prediction of a selection once.

    A row holds nothing but documents of the selection, and what the model sees of a document is the same in every
    selection and at every batch size. The last batch is filled with rows of padding.
    """

    def __init__(self, split: Split, data: DataConfig, max_positions: int | None):
        self._split, self._data = split, data
        self.selection = heldout_selection(split, data, max_positions)
        self._rows = packing.pack_pieces(split, self.selection.documents, data.sequence)

    def __len__(self) -> int:
        return (len(self._rows) + self._data.batch - 1) // self._data.batch

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} is outside 0..{len(self) - 1}")
        size = self._data.batch
        rows = self._rows[index * size : (index + 1) * size]
        return packing.evaluation_rows(self._split, rows, size, self._data.sequence)

    def documents(self, index: int) -> np.ndarray:
        """Return int32 [batch, sequence]: the number of the document that each prediction lies in, -1 for padding."""
        size = self._data.batch
        document_BS = np.full((size, self._data.sequence), -1, np.int32)
        for r, row in enumerate(self._rows[index * size : (index + 1) * size]):
            start = 0
            for piece in row:
                document = np.searchsorted(self._split.offsets, piece.address, side="right") - 1
                document_BS[r, start : start + piece.length] = document
                start += piece.length
        return document_BS


def heldout_batches(split: Split, data: DataConfig, max_positions: int | None) -> HeldoutBatches:
    """Return the evaluation batches of the selection of `max_positions` (see `heldout_selection`)."""
    return HeldoutBatches(split, data, max_positions)
