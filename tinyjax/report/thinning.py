"""Fewer points, the same picture: what a plot of a million steps can show without losing one spike."""

import numpy as np


def thin(position_N: np.ndarray, channels_CN: np.ndarray, columns: int) -> np.ndarray:
    """Return sorted indices of at most (4 + 2C) * columns points that draw the same curve.

    `position_N` are finite places along the displayed axis (log x on a log axis), cut into `columns` equal columns;
    where they do not ascend, columns are cut by index. Each column keeps its first and last point, the lowest and
    highest of every channel and of the position, and a NaN of each channel that has one, so gaps stay gaps.
    """
    n = position_N.size
    if n == 0:
        return np.zeros(0, np.int64)
    place_N = position_N if (np.diff(position_N) >= 0).all() else np.arange(n, dtype=np.float64)
    # Halved first: the difference of two finite floats can overflow.
    width = place_N[-1] / 2 - place_N[0] / 2
    fraction_N = (place_N / 2 - place_N[0] / 2) / width if width > 0 else np.zeros(n)
    column_N = np.minimum((fraction_N * columns).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(column_N, prepend=-1))
    keep = [starts, np.append(starts[1:], n) - 1]
    for channel_N in (position_N, *channels_CN):
        # NaN sorts last, so the head of each column is its extreme, or NaN only when the column has nothing else.
        keep += [np.lexsort((key_N, column_N))[starts] for key_N in (channel_N, -channel_N)]
        if np.isnan(channel_N).any():
            keep.append(np.lexsort((~np.isnan(channel_N), column_N))[starts])
    return np.unique(np.concatenate(keep))
