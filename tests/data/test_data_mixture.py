"""Rows follow the mixture's weights within one row at every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data.config import Knot, Mixture
from tinyjax.data.mixture import quotas, rows_before

TOLERANCE = 1e-5  # rows; the schedule works with a slack of 1e-6


def mixture_of(*knots):
    return Mixture(tuple(map(str, range(len(knots[0][1])))), tuple(Knot(step, tuple(w)) for step, w in knots))


def summed_weights(mixture, batch, steps):
    """The definition, step by step."""
    total, rows = np.zeros(len(mixture.corpora)), [np.zeros(len(mixture.corpora))]
    steps_of_knots = [knot.step for knot in mixture.knots]
    shares = np.array([np.array(knot.weights) / sum(knot.weights) for knot in mixture.knots])
    for step in range(steps):
        total = total + batch * np.array([np.interp(step, steps_of_knots, column) for column in shares.T])
        rows.append(total)
    return np.array(rows)


def furthest_behind_first(mixture, batch, steps):
    """The plausible wrong rule: every row goes to the corpus that is furthest behind its quota."""
    due, count, counts = quotas(mixture, batch, steps), np.zeros(len(mixture.corpora)), []
    counts.append(count.copy())
    for step in range(steps):
        for _ in range(batch):
            count[np.argmax(due[step + 1] - count)] += 1
        counts.append(count.copy())
    return np.array(counts)


def furthest(counts, due):
    return np.abs(counts - due).max()


def assert_follows(counts, due, batch):
    np.testing.assert_array_equal(counts.sum(axis=1), batch * np.arange(len(due)))
    assert (np.diff(counts, axis=0) >= 0).all()
    assert furthest(counts, due) < 1 + TOLERANCE


@st.composite
def mixtures(draw):
    corpora = draw(st.integers(1, 6))
    steps = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=5)))
    weight = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0]), st.floats(0, 1))
    weights = st.lists(weight, min_size=corpora, max_size=corpora).filter(lambda values: sum(values) > 1e-3)
    return mixture_of(*((step, draw(weights)) for step in steps))


@settings(max_examples=150, deadline=None)
@given(mixtures(), st.integers(1, 5), st.integers(0, 60))
def test_counts_follow_the_quotas_within_a_row_at_every_step(mixture, batch, steps):
    due, counts = quotas(mixture, batch, steps), rows_before(mixture, batch, steps)
    np.testing.assert_allclose(due, summed_weights(mixture, batch, steps), atol=1e-9)
    assert_follows(counts, due, batch)


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(1, 4), st.integers(1, 30), st.integers(1, 30))
def test_counts_do_not_depend_on_the_length_of_the_run(mixture, batch, steps, more):
    np.testing.assert_array_equal(
        rows_before(mixture, batch, steps), rows_before(mixture, batch, steps + more)[: steps + 1]
    )


def test_weights_that_retire_one_corpus_after_another_need_foresight():
    # Each corpus is dropped just after it got its row or just before: the last ones are left with too little time.
    corpora = 8
    knots = [(0, [1.0] * corpora)]
    for gone in range(1, corpora):
        knots.append((gone, [0.0] * gone + [1.0] * (corpora - gone)))
    mixture = mixture_of(*knots)
    due = quotas(mixture, 1, corpora)
    assert_follows(rows_before(mixture, 1, corpora), due, 1)
    assert furthest(furthest_behind_first(mixture, 1, corpora), due) > 1


def test_constant_weights_need_foresight_too():
    """The plausible wrong rule, any corpus that may have a row in order of listing, has two due at once in step 3."""
    mixture = mixture_of((0, (0.1, 0.1, 0.4, 0.4)))
    due = quotas(mixture, 1, 40)
    assert_follows(rows_before(mixture, 1, 40), due, 1)
    count, counts = np.zeros(4), [np.zeros(4)]
    for step in range(40):
        low, high = np.floor(due[step + 1] + TOLERANCE), np.ceil(due[step + 1] - TOLERANCE)
        must, may = np.flatnonzero(count < low), np.flatnonzero(count < high)
        count[(must if len(must) else may)[0]] += 1
        counts.append(count.copy())
    assert furthest(np.array(counts), due) > 1


def test_a_corpus_of_weight_zero_gets_no_row():
    counts = rows_before(mixture_of((0, (0.0, 1.0)), (5, (0.0, 1.0)), (9, (1.0, 0.0))), 3, 5)
    assert counts[-1].tolist() == [0, 15]
    assert rows_before(mixture_of((3, (2.0,))), 4, 2).tolist() == [[0], [4], [8]]


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_tenths_are_exact(batch):
    # Sums of 0.1 in binary miss the whole numbers: the counts must not.
    counts = rows_before(mixture_of((0, (0.1, 0.2, 0.7))), batch, 1000)
    np.testing.assert_array_equal(counts[::10], np.outer(np.arange(101) * batch, [1, 2, 7]))
