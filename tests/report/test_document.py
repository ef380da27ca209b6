import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tinyjax.report.document import Claim, Plot, Report, Series, Table, Text, verdict


def claim(value):
    return Claim("sentence", value, "evidence")


@pytest.mark.parametrize(
    "values", [v for n in range(4) for v in itertools.product(("holds", "fails", "undecided"), repeat=n)]
)
def test_verdict(values):
    overall = verdict([claim(v) for v in values])
    if "fails" in values:
        assert overall == "fails"
    elif "undecided" in values or not values:
        assert overall == "undecided"
    else:
        assert overall == "holds"


def test_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="'maybe' is not one of holds, fails, undecided"):
        claim("maybe")


@pytest.mark.parametrize("row", [(), (1,), (1, 2, 3)])
def test_ragged_rows_are_refused_by_number(row):
    with pytest.raises(ValueError, match=r"table 't', row 1: \d cells for 2 columns"):
        Table("t", ("a", "b"), ((1, 2), row))


@pytest.mark.parametrize("cell", [object(), [1.0], b"x", 1j, jnp.float32(1.0)])
def test_cells_of_other_types_are_refused(cell):
    with pytest.raises(ValueError, match="row 0, column 'b'"):
        Table("t", ("a", "b"), ((1, cell),))


def test_numpy_scalars_are_cells():
    Table("t", ("a", "b", "c"), ((np.float32(1.5), np.int64(3), np.float64("nan")),))


def test_empty_tables_are_tables():
    Table("t", (), ())
    Table("t", ("a",), ())


def test_series_takes_any_numbers_and_does_not_alias_them():
    x = np.arange(3)
    series = Series("s", x, jnp.ones(3), [0, 0.5, float("inf")])
    x[0] = 9
    assert series.x == (0.0, 1.0, 2.0)
    assert series == Series("s", [0, 1, 2], [1, 1, 1], [0, 0.5, np.inf])
    assert hash(series) == hash(Series("s", [0, 1, 2], [1, 1, 1], [0, 0.5, np.inf]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1]), "1 values of y for 2 of x"),
        (([1], [1], [1, 2]), "2 values of error for 1 of x"),
        (([[1, 2]], [1]), "x has 2 axes"),
        ((1.0, 1.0), "x has 0 axes"),
        (([1, 2], [1, 2], [0.1, -0.1]), "negative error at point 1"),
        (([1], [1], None, "bars"), "'bars' is not one of line, points, both"),
    ],
)
def test_bad_series_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Series("s", *arguments)


@pytest.mark.parametrize("name", ["", ".", "..", "../loss", "a/b", "a\\b", ".hidden", "a b", "loss\n", "é", "a" * 101])
def test_plot_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match="it names a file"):
        Plot(name, "t", "x", "y", ())


def test_two_plots_of_one_file_are_refused():
    items = (Plot("loss", "t", "x", "y", ()), Text("t", "b"), Plot("Loss", "t", "x", "y", ()))
    with pytest.raises(ValueError, match="named loss"):
        Report("r", "q", "s", "c", (), items)
