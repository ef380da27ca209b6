import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyjax.report.thinning import thin


def strided(y_N, count):
    """The plausible wrong way: every n-th point."""
    return np.arange(0, y_N.size, max(1, y_N.size // count))


@pytest.mark.parametrize("spike", [1, 123_457, 999_998])
def test_one_spike_in_a_million_survives_and_striding_loses_it(spike):
    y_N = np.sin(np.linspace(0, 9, 1_000_000))
    y_N[spike] = 50.0
    keep = thin(np.arange(y_N.size, dtype=float), y_N[None], 500)
    assert keep.size <= 500 * 6
    assert spike in keep
    assert spike not in strided(y_N, 500 * 6)


def test_every_column_keeps_its_own_extremes():
    y_N = np.random.default_rng(0).normal(size=10_000)
    keep = thin(np.arange(10_000.0), y_N[None], 100)
    for part in np.array_split(np.arange(10_000), 100):
        kept = np.intersect1d(keep, part)
        assert y_N[kept].min() == y_N[part].min()
        assert y_N[kept].max() == y_N[part].max()
        assert {part[0], part[-1]} <= set(kept)


def test_a_log_axis_keeps_its_first_decade():
    step_N = np.arange(1.0, 1_000_001)
    y_N = np.sin(step_N)
    early = np.arange(20)
    assert set(early) <= set(thin(np.log10(step_N), y_N[None], 1000))
    # Columns of equal index would show the first four decades as one stroke.
    assert not set(early) <= set(thin(step_N, y_N[None], 1000))


def test_gaps_stay_gaps():
    y_N = np.zeros(10_000)
    y_N[5_033] = np.nan  # inside a column: neither its first, its last nor an extreme
    y_N[7_000:7_500] = np.nan
    keep = thin(np.arange(10_000.0), y_N[None], 50)
    assert 5_033 in keep
    assert ((keep >= 7_000) & (keep < 7_500)).sum() > 0


def test_positions_that_go_back_keep_their_extremes():
    rng = np.random.default_rng(1)
    x_N, y_N = rng.normal(size=50_000), rng.normal(size=50_000)
    keep = thin(x_N, y_N[None], 100)
    assert keep.size < 1_000
    assert {x_N.argmin(), x_N.argmax(), y_N.argmin(), y_N.argmax()} <= set(keep)


numbers = st.floats(-1e300, 1e300) | st.just(float("nan"))


@given(st.lists(st.tuples(st.floats(-1e300, 1e300), numbers, numbers), max_size=60), st.integers(1, 9), st.booleans())
def test_any_data(points, columns, ascending):
    points = sorted(points, key=lambda p: p[0]) if ascending else points
    x_N, *channels = np.array(points, np.float64).reshape(-1, 3).T
    keep = thin(x_N, np.stack(channels), columns)
    assert (np.diff(keep) > 0).all()
    assert keep.size <= (2 + 2 + 3 * 2) * columns
    assert ((keep >= 0) & (keep < x_N.size)).all()
    for channel_N in channels:
        known_N = channel_N[~np.isnan(channel_N)]
        if known_N.size:
            assert np.nanmin(channel_N[keep]) == known_N.min()
            assert np.nanmax(channel_N[keep]) == known_N.max()
        assert np.isnan(channel_N[keep]).any() == np.isnan(channel_N).any()
