"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyjax.train.checkpoint import to_delete


@pytest.mark.parametrize(
    ("losses", "last", "best", "gone"),
    [
        ({}, 2, 1, [1, 2]),
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}, 2, 1, [1]),  # 2 is best, 3 and 4 newest
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}, 1, 0, [1, 2, 3]),
        ({4: 0.5}, 1, 1, [1, 2, 3]),
        ({1: 1.0, 2: 1.0}, 1, 1, [2, 3]),  # of equals the older stays: it is the one already reported as best
        ({9: 0.0}, 4, 1, []),  # a loss without a checkpoint
    ],
)
def test_by_hand(losses, last, best, gone):
    assert to_delete([1, 2, 3, 4], losses, last, best) == gone


@given(
    st.sets(st.integers(1, 50)),
    st.dictionaries(st.integers(1, 50), st.floats(0, 9), max_size=50),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_the_newest_always_stay(steps, losses, last, best):
    gone = set(to_delete(sorted(steps), losses, last, best))
    assert gone <= steps
    assert not gone & set(sorted(steps)[-last:])
    assert len(steps - gone) <= last + best
