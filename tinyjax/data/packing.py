"""Lay documents into rows of a fixed length: end to end for training, by whole pieces for evaluation.

A document stored as n tokens gives n - 1 predictions: position p has input token p and target token p + 1. Rows hold
predictions of one or more documents; a document that goes on in another row starts there without its past.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyjax.data.store import Split

IGNORE = -100  # target where there is nothing to predict
PADDING = 0  # input token there; the id of unk, which no text has

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Epoch:
    """One shuffled pass over a split: documents end to end, cut into rows of `sequence`, the rows shuffled again."""

    documents: np.ndarray  # int64 [documents], in the order of this epoch
    ends: np.ndarray  # int64 [documents], predictions up to and with each of them
    rows: np.ndarray  # int64 [rows], which row of the cut comes when


def rows_per_epoch(split: Split, sequence: int) -> int:
    """Return the rows of one pass over all documents; only the last of the cut is padded."""
    return -(-split.positions // sequence)


def shuffled_epoch(split: Split, sequence: int, key: Sequence[int]) -> Epoch:
    """Return the pass named by `key` (integers from 0 to 2**32 - 1): a pure function of its arguments.

    RandomState is used for its stream, which NumPy has frozen for good (NEP 19); that of Generator may change.
    """
    random = np.random.RandomState(list(key))
    documents = random.permutation(split.documents)
    return Epoch(documents, np.cumsum(split.lengths[documents]), random.permutation(rows_per_epoch(split, sequence)))


def training_rows(split: Split, epoch: Epoch, index_B: np.ndarray, sequence: int) -> Batch:
    """Return rows number `index_B` of an epoch as a batch of int32 [len(index_B), sequence]."""
    start_B1 = epoch.rows[index_B][:, None] * sequence
    place_BS = start_B1 + np.arange(sequence)
    valid_BS = place_BS < epoch.ends[-1]
    place_BS = np.minimum(place_BS, epoch.ends[-1] - 1)
    nth_BS = np.searchsorted(epoch.ends, place_BS, side="right")
    document_BS = epoch.documents[nth_BS]
    begin_BS = epoch.ends[nth_BS] - (split.offsets[document_BS + 1] - split.offsets[document_BS] - 1)
    return _gather(
        split,
        split.offsets[document_BS] + place_BS - begin_BS,
        segment_BS=nth_BS - nth_BS[:, :1] + 1,
        position_BS=place_BS - np.maximum(begin_BS, start_B1),
        valid_BS=valid_BS,
    )


def _gather(split: Split, address_BS, segment_BS, position_BS, valid_BS) -> Batch:
    return {
        "tokens": np.where(valid_BS, split.tokens[address_BS], PADDING).astype(np.int32),
        "targets": np.where(valid_BS, split.tokens[address_BS + 1].astype(np.int32), IGNORE).astype(np.int32),
        "segment_ids": np.where(valid_BS, segment_BS, 0).astype(np.int32),
        "positions": np.where(valid_BS, position_BS, 0).astype(np.int32),
    }


@dataclass(frozen=True)
class Piece:
    """Predictions of one document that lie in one row."""

    address: int  # of its first input token
    length: int  # predictions


def pack_pieces(split: Split, documents: int, sequence: int) -> list[list[Piece]]:
    """Return the rows of an evaluation of the first `documents` documents, each row a list of pieces.

    Documents are cut every `sequence` predictions from their own start and never elsewhere, so that what the model
    sees of a document does not depend on the others. Pieces fill rows best fit first, the longest before the shorter.
    """
    pieces = [
        Piece(int(offset) + start, min(sequence, int(length) - start))
        for offset, length in zip(split.offsets[:documents], split.lengths[:documents], strict=True)
        for start in range(0, int(length), sequence)
    ]
    rows: list[list[Piece]] = []
    by_room: list[list[int]] = [[] for _ in range(sequence + 1)]  # open rows by the predictions that still fit
    rooms = 0  # bit r is set while by_room[r] holds a row: finds the tightest fit without a search
    for piece in sorted(pieces, key=lambda piece: -piece.length):
        fitting = rooms >> piece.length
        if fitting:
            room = piece.length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = sequence, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left := room - piece.length:
            by_room[left].append(row)
            rooms |= 1 << left
    return rows


def evaluation_rows(split: Split, rows: Sequence[Sequence[Piece]], batch: int, sequence: int) -> Batch:
    """Return up to `batch` rows as a batch of int32 [batch, sequence], padded with empty rows."""
    address_BS = np.zeros((batch, sequence), np.int64)
    segment_BS, position_BS = np.zeros_like(address_BS), np.zeros_like(address_BS)
    for r, row in enumerate(rows):
        start = 0
        for nth, piece in enumerate(row, 1):
            span = slice(start, start + piece.length)
            position_BS[r, span] = np.arange(piece.length)
            address_BS[r, span] = piece.address + position_BS[r, span]
            segment_BS[r, span] = nth
            start += piece.length
    return _gather(split, address_BS, segment_BS, position_BS, valid_BS=segment_BS > 0)
