"""Training batches: every prediction once an epoch, and nothing but (data, seed, step) decides where."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data import packing
from tinyjax.data.batches import Batches, batch_hash
from tinyjax.data.config import DataConfig, Knot, Mixture
from tinyjax.data.packing import IGNORE
from tinyjax.errors import UserError

GOLDEN = ["0f68a06237d20260", "a05cb21aa6ba32c3", "97a7cbc4eb8a6e25"]
AWKWARD = [[3], [2], [3, 3, 3], [50], [3, 17, 4, 90, 3, 5], [8, 8, 8, 8], [2, 2, 30, 2]]
SEQUENCES = [1, 2, 7, 8, 64]


def data_of(sequence, batch=1, corpora=1, knots=None):
    if corpora == 1:
        return DataConfig(corpus="x", sequence=sequence, batch=batch)
    knots = knots or (Knot(0, (1.0,) * corpora),)
    return DataConfig(
        corpus=None, mixture=Mixture(tuple(map(str, range(corpora))), knots), sequence=sequence, batch=batch
    )


def predictions(batches):
    """Count the (input, target) pairs of some batches; tokens are unique, so a pair says where it is from."""
    pairs = collections.Counter()
    for batch in batches:
        valid = batch["targets"] != IGNORE
        pairs.update(zip(batch["tokens"][valid].tolist(), batch["targets"][valid].tolist(), strict=True))
    return pairs


def expected(split):
    pairs = collections.Counter()
    for start, end in itertools.pairwise(split.offsets):
        pairs.update(itertools.pairwise(split.tokens[start:end].tolist()))
    return pairs


def naive_row(batch, split, row):
    """Check one row against the definition of its four arrays, token by token."""
    ends = set((split.offsets[1:] - 1).tolist())  # eos tokens: never an input
    starts = set(split.offsets[:-1].tolist())
    segment, position, previous = 0, 0, None
    columns = (batch[name][row].tolist() for name in ("tokens", "targets", "segment_ids", "positions"))
    padded = False
    for token, target, segment_id, position_id in zip(*columns, strict=True):
        if target == IGNORE:
            padded = True
            assert (token, segment_id, position_id) == (0, 0, 0)
            continue
        assert not padded, "padding lies at the end"
        assert token not in ends
        assert target == token + 1
        continues = previous is not None and token == previous + 1 and token not in starts
        segment, position = (segment, position + 1) if continues else (segment + 1, 0)
        assert (segment_id, position_id) == (segment, position)
        previous = token


@pytest.mark.parametrize("stored", AWKWARD)
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_every_prediction_comes_once_an_epoch(prepared_of, stored, sequence):
    prepared = prepared_of(stored)
    split = prepared.corpora[0].train
    rows = packing.rows_per_epoch(split, sequence)
    batches = Batches(prepared, data_of(sequence), seed=3, steps=3 * rows)
    for epoch in range(3):
        assert predictions(batches[step] for step in range(epoch * rows, (epoch + 1) * rows)) == expected(split)
    assert batches.epochs(rows) == (1.0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 50), st.integers(1, 5), st.integers(0, 9))
def test_epochs_and_rows_are_right_for_any_documents(prepared_of, stored, sequence, size, seed):
    prepared = prepared_of(stored)
    split = prepared.corpora[0].train
    rows = packing.rows_per_epoch(split, sequence)
    batches = Batches(prepared, data_of(sequence, size), seed, rows)  # `size` epochs, borders inside batches
    total = predictions(batches[step] for step in range(rows))
    assert total == collections.Counter(dict.fromkeys(expected(split), size))
    for step in range(rows):
        batch = batches[step]
        assert set(batch) == {"tokens", "targets", "segment_ids", "positions"}
        assert all(array.dtype == np.int32 and array.shape == (size, sequence) for array in batch.values())
        for row in range(size):
            naive_row(batch, split, row)


def test_the_check_rejects_targets_that_cross_documents(prepared_of):
    """The plausible wrong packing: one stream of tokens cut into rows, as if it were one document."""
    split = prepared_of([5, 4, 6]).corpora[0].train
    stream = np.asarray(split.tokens, np.int32)
    wrong = {"tokens": stream[None, :-1], "targets": stream[None, 1:]}
    assert predictions([wrong]) != expected(split)
    wrong |= {"segment_ids": np.ones_like(wrong["tokens"]), "positions": np.arange(len(stream) - 1)[None]}
    with pytest.raises(AssertionError):
        naive_row(wrong, split, 0)


def orders_differ(batches, rows, epochs):
    """Whether no two epochs come in the same order."""
    orders = [
        tuple(batch_hash(batches[step]) for step in range(epoch * rows, (epoch + 1) * rows)) for epoch in range(epochs)
    ]
    return len(set(orders)) == epochs


def test_every_epoch_has_an_order_of_its_own(prepared_of):
    prepared = prepared_of([5, 9, 4, 12, 7, 8, 11])
    rows = packing.rows_per_epoch(prepared.corpora[0].train, 4)
    batches = Batches(prepared, data_of(4), 0, 4 * rows)
    assert orders_differ(batches, rows, 4)

    class SameOrder(Batches):
        def _shuffled(self, corpus, epoch):
            return super()._shuffled(corpus, 0)

    assert not orders_differ(SameOrder(prepared, data_of(4), 0, 4 * rows), rows, 4)


def test_documents_are_shuffled_not_only_rows(prepared_of):
    prepared = prepared_of([3] * 50)
    batches = Batches(prepared, data_of(4), 0, 25)
    neighbours = {tuple(sorted(batches[step]["tokens"][0].tolist())) for step in range(25)}
    in_stored_order = {(6 * n, 6 * n + 1, 6 * n + 3, 6 * n + 4) for n in range(25)}
    assert len(neighbours & in_stored_order) < 10


def test_a_batch_depends_on_seed_and_step_alone(prepared_of):
    prepared = prepared_of([5, 9, 40], [3, 3, 21, 6])
    data = data_of(6, 4, corpora=2, knots=(Knot(0, (3.0, 1.0)), Knot(20, (1.0, 2.0))))
    forward = [batch_hash(batch) for batch in (Batches(prepared, data, 7, 60)[step] for step in range(60))]
    backward = Batches(prepared, data, 7, 60)
    assert [batch_hash(backward[step]) for step in reversed(range(60))] == forward[::-1]
    assert batch_hash(backward[33]) == batch_hash(backward[33]) == forward[33]
    longer = Batches(prepared, data, 7, 500)
    assert [batch_hash(longer[step]) for step in range(60)] == forward
    assert [batch_hash(Batches(prepared, data, 8, 60)[step]) for step in range(60)] != forward
    assert len(set(forward)) == 60


def test_a_mixture_takes_rows_by_weight_and_passes_over_each_corpus(prepared_of):
    prepared = prepared_of([30] * 5, [12] * 20)
    data = data_of(8, 4, corpora=2, knots=(Knot(0, (1.0, 0.0)), Knot(10, (1.0, 0.0)), Knot(11, (1.0, 3.0))))
    border = int(prepared.corpora[0].train.offsets[-1])
    batches = Batches(prepared, data, 0, 200)
    from_second = [int((batches[step]["tokens"][:, 0] >= border).sum()) for step in range(200)]
    assert from_second[:11] == [0] * 11
    assert from_second[11:] == [3] * 189
    rows = packing.rows_per_epoch(prepared.corpora[1].train, 8)
    pairs = predictions(batches[step] for step in range(11, 11 + rows))  # three rows a step: three whole epochs
    second = {pair: count for pair, count in pairs.items() if pair[0] >= border}
    assert second == dict.fromkeys(expected(prepared.corpora[1].train), 3)
    places = {tuple((batches[step]["tokens"][:, 0] >= border).tolist()) for step in range(11, 200)}
    assert len(places) == 4, "the rows of a step are shuffled"


def test_steps_outside_the_run_and_bad_seeds_are_refused(prepared_of):
    batches = Batches(prepared_of([5]), data_of(4), 0, 2)
    assert len(batches) == 2
    for step in (-1, 2):
        with pytest.raises(IndexError):
            batches[step]
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="seed"):
            Batches(prepared_of([5]), data_of(4), seed, 2)
    with pytest.raises(UserError, match="steps"):
        Batches(prepared_of([5]), data_of(4), 0, -1)


def test_the_order_of_a_fixed_corpus_is_frozen(prepared):
    """If this fails, every run that is resumed gets other data: raise cache.FORMAT and say so in the release notes."""
    data = DataConfig(corpus="x", sequence=16, batch=4)
    batches = Batches(prepared, data, 0, 50)
    assert [batch_hash(batches[step]) for step in (0, 1, 49)] == GOLDEN


def test_the_hash_sees_names_types_shapes_and_contents():
    batch = {"a": np.zeros((2, 3), np.int32), "b": np.ones((1,), np.int32)}
    others = [
        {"a": batch["a"], "c": batch["b"]},
        {"a": batch["a"].astype(np.int64), "b": batch["b"]},
        {"a": batch["a"].reshape(3, 2), "b": batch["b"]},
        {"a": batch["a"], "b": 2 * batch["b"]},
    ]
    assert len({batch_hash(b) for b in (batch, *others)}) == 5
    assert batch_hash(dict(reversed(batch.items()))) == batch_hash(batch)
    assert batch_hash({"a": np.asfortranarray(batch["a"]), "b": batch["b"]}) == batch_hash(batch)
    assert len(batch_hash(batch)) == 16
