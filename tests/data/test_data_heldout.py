"""Evaluation batches cover whole documents once, and each document is seen in the same way in every evaluation."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data.config import DataConfig
from tinyjax.data.heldout import heldout_batches, heldout_selection, heldout_text
from tinyjax.data.packing import IGNORE
from tinyjax.errors import UserError


def data_of(sequence, batch=3):
    return DataConfig(corpus="x", sequence=sequence, batch=batch)


def seen(batches):
    """Return {input token: tokens of its segment up to it}: all that a prediction can depend on."""
    context = {}
    for batch in batches:
        assert all(array.shape == batch["tokens"].shape and array.dtype == np.int32 for array in batch.values())
        for tokens, targets, segments, positions in zip(
            *(batch[name].tolist() for name in ("tokens", "targets", "segment_ids", "positions")), strict=True
        ):
            pieces = collections.defaultdict(list)
            for token, target, segment, position in zip(tokens, targets, segments, positions, strict=True):
                assert (segment == 0) == (target == IGNORE)
                if segment:
                    assert target == token + 1
                    assert position == len(pieces[segment])
                    pieces[segment].append(token)
                    assert token not in context, "a prediction comes once"
                    context[token] = tuple(pieces[segment])
            assert list(pieces) == list(range(1, len(pieces) + 1))
    return context


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=15),
    st.integers(1, 30),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 400)),
)
def test_whole_documents_once_each(split_of, stored, sequence, size, limit):
    split = split_of(stored)
    batches = heldout_batches(split, data_of(sequence, size), limit)
    selection = batches.selection
    ends = np.cumsum(split.lengths)
    assert selection.positions == ends[selection.documents - 1]
    if limit is None:
        assert selection.documents == len(stored)
    else:  # the fewest documents that reach the limit
        assert selection.positions >= min(limit, split.positions)
        assert selection.documents == 1 or ends[selection.documents - 2] < limit
    context = seen(batches)
    assert len(context) == selection.positions
    for document in range(selection.documents):
        start = int(split.offsets[document])
        for token in range(start, int(split.offsets[document + 1]) - 1):
            piece = start + (token - start) // sequence * sequence
            assert context[token] == tuple(range(piece, token + 1))


def test_what_a_document_sees_does_not_depend_on_the_others(split_of):
    split = split_of([7, 30, 4, 12, 9, 5, 40, 3])
    everything = seen(heldout_batches(split, data_of(8), None))
    for limit, size in ((1, 1), (40, 2), (70, 5)):
        part = seen(heldout_batches(split, data_of(8, size), limit))
        assert part.items() <= everything.items()

    # The plausible wrong packing, end to end, cuts a document where its neighbours end.
    end_to_end = {}
    inputs = [t for a, b in zip(split.offsets, split.offsets[1:], strict=False) for t in range(a, b - 1)]
    for row in (inputs[i : i + 8] for i in range(0, len(inputs), 8)):
        for i, token in enumerate(row):
            start = max(int(o) for o in split.offsets if o <= token)
            end_to_end[token] = tuple(t for t in row[: i + 1] if t >= start)
    assert end_to_end != everything


def test_rows_are_filled_tightly(split_of):
    split = split_of(np.random.RandomState(0).randint(2, 40, 2000))
    batches = heldout_batches(split, data_of(64, 1), None)
    assert batches.selection.positions / (len(batches) * 64) > 0.98


def test_the_hash_names_documents_and_sequence_only(split_of):
    split = split_of([7, 30, 4, 12])
    base = heldout_selection(split, data_of(8, 3), None)
    assert heldout_selection(split, data_of(8, 5), None) == base
    assert heldout_selection(split, data_of(9, 3), None).hash != base.hash
    assert heldout_selection(split, data_of(8, 3), 10).hash != base.hash
    assert heldout_selection(split, data_of(8, 3), 10**9) == base


def test_the_text_is_the_raw_bytes_of_the_selection(prepared):
    split = prepared.corpora[0].heldout
    data = data_of(8)
    for limit in (1, 100, None):
        selection = heldout_selection(split, data, limit)
        text = heldout_text(split, selection.documents)
        assert len(text) == selection.bytes
        stored = [split.tokens[a:b] for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
        assert text == b"".join(map(prepared.tokenizer.decode_bytes, stored[: selection.documents]))


def test_documents_tell_where_each_prediction_lies(split_of):
    split = split_of([7, 30, 4, 12, 2])
    batches = heldout_batches(split, data_of(8, 2), 40)
    for index, batch in enumerate(batches):
        documents = batches.documents(index)
        assert documents.dtype == np.int32
        for token, target, document in zip(
            *(a.flat for a in (batch["tokens"], batch["targets"], documents)), strict=True
        ):
            assert document == (-1 if target == IGNORE else np.searchsorted(split.offsets, token, side="right") - 1)


def test_bad_sizes_are_refused(split_of):
    with pytest.raises(UserError, match="max_positions"):
        heldout_batches(split_of([5]), data_of(8), 0)
    batches = heldout_batches(split_of([5]), data_of(8), None)
    assert len(batches) == 1
    with pytest.raises(IndexError):
        batches[1]
