import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyjax.report.document import Plot, Series
from tinyjax.report.plots import render


def plot(*series, **changes):
    return Plot("p", **({"title": "Loss", "x_label": "step", "y_label": "nats"} | changes), series=series)


def pixels(png: bytes) -> np.ndarray:
    """Return the colours as [height, width, 3]."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    image = Image.open(io.BytesIO(png))
    image.load()
    return np.asarray(image.convert("RGB"), np.int16)


def coloured(png: bytes, colour=(0x00, 0x72, 0xB2)) -> np.ndarray:
    """Where the picture has the first series' colour."""
    return (np.abs(pixels(png) - np.array(colour)) < 40).all(-1)


def test_a_curve_changes_the_picture():
    empty, curve = render(plot()), render(plot(Series("", [1, 2, 3], [3, 1, 2])))
    assert np.unique(pixels(empty).sum(-1)).size > 5
    assert coloured(empty).sum() == 0
    assert coloured(curve).sum() > 1_000


def test_the_curve_falls_when_the_values_fall():
    seen = coloured(render(plot(Series("", [0, 1], [5, 1]))))
    rows, columns = np.nonzero(seen)
    left, right = rows[columns < columns.min() + 20].mean(), rows[columns > columns.max() - 20].mean()
    assert left < right - 200


def test_equal_plots_give_equal_bytes_without_metadata():
    one = plot(Series("a", np.arange(50), np.arange(50) ** 0.5, np.ones(50), "both"), references=(("best", 2.0),))
    two = plot(Series("a", list(range(50)), [i**0.5 for i in range(50)], [1] * 50, "both"), references=(("best", 2.0),))
    png = render(one)
    assert png == render(two)
    assert png != render(plot(Series("a", [1], [1])))
    assert not set(Image.open(io.BytesIO(png)).info) & {"Software", "Creation Time", "date:create"}


@pytest.mark.parametrize("style", ["line", "points", "both"])
@pytest.mark.parametrize("y", [[2.0], [np.nan, 2.0, np.nan], [1.0, np.inf, 2.0, -np.inf, 1.5]])
def test_points_between_gaps_are_seen(style, y):
    assert coloured(render(plot(Series("", range(len(y)), y, style=style)))).sum() > 100


def test_a_gap_is_not_bridged():
    y = np.ones(101)
    whole = coloured(render(plot(Series("", range(101), y)))).sum()
    y[40:61] = np.nan
    assert coloured(render(plot(Series("", range(101), y)))).sum() < 0.9 * whole


@pytest.mark.parametrize("y", [[], [np.nan], [np.inf, -np.inf], [-1.0, 0.0]])
def test_nothing_to_draw(y):
    png = render(plot(Series("", range(1, len(y) + 1), y), log_y=True, log_x=True))
    assert coloured(png).sum() == 0


def test_log_axes_drop_values_that_are_not_positive():
    x, y = [0, 1, 10, 100, 1000], [5, 1e-3, -2, 10, 100]
    clean = render(plot(Series("", [1, 10, 100, 1000], [1e-3, np.nan, 10, 100]), log_x=True, log_y=True))
    assert render(plot(Series("", x, y), log_x=True, log_y=True)) == clean


def test_a_million_points_keep_their_spike():
    y = np.ones(1_000_000)
    y[777_777] = 9.0
    rows = np.nonzero(coloured(render(plot(Series("", np.arange(y.size), y)))))[0]
    assert np.ptp(rows) > 400


def test_a_million_points_keep_the_end_of_their_error():
    y, error = np.ones(100_000), np.full(100_000, 0.1)
    flat = render(plot(Series("", np.arange(y.size), y, error)))
    error[54_321] = 5.0
    spiked = render(plot(Series("", np.arange(y.size), y, error)))
    rows = np.nonzero((pixels(flat) != pixels(spiked)).any(-1))[0]
    assert np.ptp(rows) > 400


def test_errors_widen_the_picture():
    x, y = [1, 2, 3], [1, 1, 1]
    for style in ("line", "points"):
        bare, banded = render(plot(Series("", x, y, None, style))), render(plot(Series("", x, y, [0.5] * 3, style)))
        assert bare != banded
    assert render(plot(Series("", x, y, [np.nan] * 3))) == render(plot(Series("", x, y)))


def test_error_below_zero_on_a_log_axis():
    png = render(plot(Series("", [1, 2, 3], [1, 2, 3], [5, 0, 1]), Series("p", [1], [1], [2], "points"), log_y=True))
    assert coloured(png).sum() > 500


@pytest.mark.parametrize("style", ["line", "points"])
def test_a_point_is_in_view_when_its_error_reaches_below_a_log_axis(style):
    assert coloured(render(plot(Series("", [1], [1e-3], [5], style), log_y=True))).sum() > 100


def test_references_are_drawn():
    bare = plot(Series("a", [1, 2], [1, 2]))
    assert render(bare) != render(plot(*bare.series, references=(("full model", 1.5),)))
    for value in (math.nan, math.inf, -1.0):
        render(plot(*bare.series, log_y=True, references=(("nowhere", value),)))


@pytest.mark.parametrize(
    "text",
    [
        "$\\frac{1}{",
        "_hidden",
        "中文 \U0001f600",
        "a\nb\tc",
        "\x00\x1b\ud800",
        "x" * 500,
        "word " * 200,
        "%s {} \\",
        "$$",
    ],
)
def test_any_text(text):
    series = (Series(text, [1, 2], [1, 2]), Series("other", [1, 2], [2, 1]))
    png = render(plot(*series, title=text, x_label=text, y_label=text, references=((text, 1.5),)))
    assert coloured(png).sum() > 500


def test_a_label_with_an_underscore_has_its_place_in_the_legend():
    named, unnamed = render(plot(Series("_a", [1, 2], [1, 2]))), render(plot(Series("", [1, 2], [1, 2])))
    assert coloured(named).sum() > 0
    assert pixels(named).shape[0] >= pixels(unnamed).shape[0]
    assert named != unnamed


def test_many_series_leave_room_for_the_curves():
    many = plot(*(Series(f"seed {i} of a long sweep", [1, 2], [i + 1, i + 2]) for i in range(90)))
    png = render(many)
    height, width, _ = pixels(png).shape
    assert height < 3 * width
    assert coloured(png).sum() > 1_000


@pytest.mark.parametrize("span", [(2.0, 2.1), (1.0, 3.0), (1.0, 30.0), (1e-8, 1e12), (3.0, 3.0)])
def test_log_axes_of_any_span_have_labels(span):
    with_labels = pixels(render(plot(Series("", [1, 2], span), log_y=True)))
    assert (with_labels[:, 40:160].min(-1) < 120).sum() > 100


@pytest.mark.parametrize("value", [1e-4, 0.0, 5e-324, 1e149])
@pytest.mark.parametrize("ulps", [0, 1])
def test_values_that_coincide(value, ulps):
    y = [value, value + ulps * np.spacing(value)]
    for is_log in (False, True):
        render(plot(Series("", y, y), log_y=is_log, log_x=is_log, references=(("r", value),)))


values = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(values, values, values.map(abs)), max_size=4),
    st.sampled_from(["line", "points", "both"]),
    st.booleans(),
    st.booleans(),
    values,
)
def test_any_numbers(points, style, log_x, log_y, reference):
    x, y, error = np.array(points, np.float64).reshape(-1, 3).T
    render(plot(Series("a", x, y, error, style), log_x=log_x, log_y=log_y, references=(("r", reference),)))
