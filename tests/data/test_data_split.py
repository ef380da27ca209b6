"""The split is a function of a document's content."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from tinyjax.data.split import digest, digest_is_heldout, is_heldout


@given(st.text(), st.floats(0.01, 0.99))
def test_both_forms_agree(text, share):
    assert is_heldout(text, share) == digest_is_heldout(digest(text.encode()), share)


@given(st.text(), st.floats(0.01, 0.5), st.floats(0, 0.49))
def test_a_larger_share_only_adds_documents(text, share, more):
    assert is_heldout(text, share + more) or not is_heldout(text, share)


def test_the_share_is_met_and_frozen():
    heldout = [text for text in map(str, range(20_000)) if is_heldout(text, 0.05)]
    assert abs(len(heldout) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
    # Another hash would silently move documents of every corpus across the border.
    assert hashlib.sha256(" ".join(heldout).encode()).hexdigest()[:16] == "d3adc0ca14b60375"
