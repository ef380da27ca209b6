import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyjax.report.display import is_numeric, printable, read


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("as it is", "as it is"),
        (True, "yes"),
        (0, "0"),
        (1234567, "1,234,567"),
        (-1234, "−1,234"),
        (np.int64(4096), "4,096"),
        (0.0, "0"),
        (-0.0, "0"),
        (2.05119, "2.051"),
        (-2.05119, "−2.051"),
        (np.float32(0.1), "0.1"),
        (9.99996, "10"),
        (0.0003, "0.0003"),
        (0.00001, "1×10⁻⁵"),
        (123456.7, "123,457"),
        (1.2345e15, "1.234×10¹⁵"),
        (-3e-30, "−3×10⁻³⁰"),
        (5e-324, "4.941×10⁻³²⁴"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_one_cell(value, text):
    assert read([value]) == [text]


def test_decimal_points_line_up():
    assert read([2.051, 2.05, 2.0]) == ["2.051", "2.050", "2.000"]
    assert read([0.1, 0.01, 0.001]) == ["0.100", "0.010", "0.001"]
    assert read([0.0, 0.25, None, "text", 7]) == ["0.00", "0.25", "–", "text", "7"]


def test_no_digits_beyond_the_significant_ones():
    assert read([0.0001234, 1234.5]) == ["0.0001234", "1,234"]


def plain(text: str) -> float:
    """The number that a reader takes from the text."""
    superscript = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
    mantissa, _, exponent = text.replace("−", "-").replace(",", "").partition("×10")
    return float(f"{mantissa}e{exponent.translate(superscript) or 0}")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_four_digits_survive_in_any_column(values):
    for value, text in zip(values, read(values), strict=True):
        shown = plain(text) if abs(value) < 1e300 else value
        assert shown == pytest.approx(value, rel=5.1e-4, abs=0)


@given(st.integers())
def test_integers_are_exact(value):
    assert plain(read([value])[0]) == float(value)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ((1, 2.5, None), True),
        (("2.05 ± 0.01", "−1.2", "< 3", "12%", "1e-4"), True),
        ((1, "text"), False),
        (("4-gram", "5-gram"), False),
        ((True, False), False),
        ((None, None), False),
        ((), False),
    ],
)
def test_which_columns_are_numeric(column, expected):
    assert is_numeric(column) is expected


@given(st.lists(st.integers(0, 0x10FFFF).map(chr)).map("".join))
def test_printable_text_can_be_encoded_and_does_nothing(text):
    shown = printable(text + "\ud800\x00\x1b[2J\u202e\ufffe\U0010ffff\x9b")
    shown.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\u202a-\u202e]", shown)


def test_printable_keeps_what_is_only_text():
    text = "tab\tline\nGrößer 中文 <b> \U0001f600 é\u200d"
    assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"
    assert printable("a\rb") == "a\ufffdb"
