"""Which corpus each row of each step comes from, following weights that change over time."""

import numpy as np

from tinyjax.data.config import Mixture

SLACK = 1e-6  # rows; far above the rounding of a quota of 1e9 rows in float64, far below one row


def quotas(mixture: Mixture, batch: int, steps: int) -> np.ndarray:
    """Return the rows due to each corpus before each step, float64 [steps + 1, corpora].

    These are sums of the weights of all earlier steps, each an arithmetic series from its knot on: adding step by step
    would gather rounding errors over a long run.
    """
    weight_KC = np.array([mixture.knots[0].weights, *(knot.weights for knot in mixture.knots)], np.float64)
    weight_KC = batch * (weight_KC / weight_KC.sum(axis=1, keepdims=True))
    knot_K = np.array([0, *(knot.step for knot in mixture.knots)])  # the first knot's weights hold from step 0
    length_K1 = np.maximum(np.diff(knot_K), 1)[:, None]
    slope_KC = np.concatenate([np.diff(weight_KC, axis=0) / length_K1, np.zeros((1, weight_KC.shape[1]))])

    def series(knot, elapsed):
        elapsed = elapsed[:, None].astype(np.float64)
        return weight_KC[knot] * elapsed + slope_KC[knot] * (elapsed * (elapsed - 1) / 2)

    whole_KC = series(np.arange(len(knot_K) - 1), np.diff(knot_K))
    before_KC = np.concatenate([np.zeros((1, weight_KC.shape[1])), np.cumsum(whole_KC, axis=0)])
    step_T = np.arange(steps + 1)
    knot_T = np.searchsorted(knot_K, step_T, side="right") - 1
    return before_KC[knot_T] + series(knot_T, step_T - knot_K[knot_T])


def rows_before(mixture: Mixture, batch: int, steps: int) -> np.ndarray:
    """Return the rows given to each corpus before each step, int64 [steps + 1, corpora].

    Every count is its quota rounded up or down, at every step, however the weights move. That needs foresight: giving
    rows to the corpus furthest behind can leave three corpora due at once. Seen as jobs, row j of a corpus may be given
    as soon as the quota exceeds j - 1 and must be given once it reaches j; a schedule that keeps all these deadlines
    exists (Tijdeman 1980, the chairman assignment problem), and giving the earliest deadline first finds one, as always
    for jobs of equal length. The counts of a step do not depend on `steps`.
    """
    due_TC = quotas(mixture, batch, steps)[1:]
    low_TC = np.floor(due_TC + SLACK).astype(np.int64)
    high_TC = np.ceil(due_TC - SLACK).astype(np.int64)
    # The step at which row `high` must have been given: looked up until the last knot, on a straight line after it.
    last = mixture.knots[-1].step
    ramp_TC = quotas(mixture, batch, last)
    weights = np.array(mixture.knots[-1].weights, np.float64)
    deadline_TC = np.empty(high_TC.shape)
    with np.errstate(divide="ignore", over="ignore"):  # a corpus that is not used any more has no deadline
        for c, rate in enumerate(batch * weights / weights.sum()):
            met = np.searchsorted(ramp_TC[:, c], high_TC[:, c] - SLACK)
            after = last + np.ceil((high_TC[:, c] - SLACK - ramp_TC[-1, c]) / rate)
            deadline_TC[:, c] = np.where(met <= last, met, after)
    count = [0] * len(weights)
    counts = [tuple(count)]
    for low, high, deadline in zip(low_TC.tolist(), high_TC.tolist(), deadline_TC.tolist(), strict=True):
        free = batch + sum(count)
        count = list(map(max, low, count))
        free -= sum(count)
        if free:
            open_ = [c for c in range(len(count)) if count[c] < high[c]]
            for c in sorted(open_, key=deadline.__getitem__)[:free]:
                count[c] += 1
        counts.append(tuple(count))
    return np.array(counts, np.int64)
