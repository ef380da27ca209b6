"""Schedules at steps worked out by hand, traced as in Python, and never rising after the warm-up."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.config import variants
from tinyjax.errors import ConfigError
from tinyjax.optim.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay

STEPS = 100

# Warm-up of 10 steps: 0.1 at step 0, 1 at step 9. A decay that starts at 10 has progress 0.5 at 55 and 89/90 at 99.
VALUES = [
    (Constant(0.1), {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
    (Constant(0.0), {0: 1, 99: 1}),
    (Cosine(0.1, 0.2), {0: 0.1, 9: 1, 10: 1, 55: 0.6, 99: 0.2 + 0.4 * (1 + math.cos(math.pi * 89 / 90)), 100: 0.2}),
    (Cosine(0.0, 0.0), {0: 1, 50: 0.5, 25: 0.5 + math.sqrt(0.125)}),
    (Linear(0.1, 0.0), {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: 1 / 90, 100: 0}),
    (Linear(0.1, 0.4), {10: 1, 55: 0.7, 99: 0.4 + 0.6 / 90}),
    (WarmupStableDecay(0.1, 0.2, "1-sqrt"), {0: 0.1, 9: 1, 79: 1, 80: 1, 85: 0.5, 99: 1 - math.sqrt(0.95), 100: 0}),
    (WarmupStableDecay(0.1, 0.2, "linear"), {79: 1, 80: 1, 90: 0.5, 99: 0.05}),
    (WarmupStableDecay(0.1, 0.2, "cosine"), {80: 1, 85: 0.5 + math.sqrt(0.125), 90: 0.5}),
    (WarmupStableDecay(0.1, 0.2, "exponential", 0.01), {80: 1, 90: 0.1, 100: 0.01}),
    (WarmupStableDecay(0.1, 0.2, "1-sqrt", 0.1), {85: 0.55, 100: 0.1}),
    (WarmupStableDecay(0.0, 0.0), {0: 1, 99: 1}),
    (WarmupStableDecay(0.0, 1.0, "linear"), {0: 1, 25: 0.75, 99: 0.01}),
]


@pytest.mark.parametrize(("schedule", "values"), VALUES, ids=str)
def test_values_by_hand(schedule, values):
    for step, expected in values.items():
        assert float(schedule.factor(step, STEPS)) == pytest.approx(expected, abs=2e-6), step


def test_every_schedule_and_form_has_values():
    assert {type(s) for s, _ in VALUES} == set(variants(Schedule).values())
    forms = WarmupStableDecay.__dataclass_fields__["form"].type.__args__
    assert {s.form for s, _ in VALUES if isinstance(s, WarmupStableDecay)} == set(forms)


def all_factors(schedule, steps):
    return np.asarray(jax.vmap(lambda step: schedule.factor(step, steps))(jnp.arange(steps)))


SCHEDULES = [s for s, _ in VALUES] + [cls() for cls in variants(Schedule).values()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_traced_is_python_and_every_factor_is_a_share(schedule, steps):
    traced = all_factors(schedule, steps)
    assert traced.dtype == jnp.float32
    assert traced.shape == (steps,)
    for step in {0, steps // 2, steps - 1}:
        assert float(schedule.factor(step, steps)) == pytest.approx(float(traced[step]), rel=1e-5, abs=1e-6)
    assert (traced > 0).all(), "a step with a rate of zero is wasted"
    assert (traced <= 1).all()


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.one_of(
        st.builds(Constant, st.floats(0, 1)),
        st.builds(Cosine, st.floats(0, 1), st.floats(0, 1)),
        st.builds(Linear, st.floats(0, 1), st.floats(0, 1)),
        st.builds(
            WarmupStableDecay,
            st.floats(0, 0.5),
            st.floats(0, 0.5),
            st.sampled_from(["1-sqrt", "linear", "cosine", "exponential"]),
            st.floats(0.01, 1),
        ),
    ),
    steps=st.integers(1, 60),
)
def test_factors_rise_in_the_warm_up_and_never_again(schedule, steps):
    factors = all_factors(schedule, steps).astype(np.float64)
    assert (factors > 0).all()
    assert (factors <= 1 + 1e-6).all()
    warm = min(round(schedule.warmup * steps), steps)
    # A warm-up and a decay of one half each may share the middle step after rounding.
    assert (np.diff(factors[: max(warm - 1, 0)]) > 0).all()
    assert (np.diff(factors[warm:]) <= 1e-6).all()


def test_step_zero_learns_and_the_warm_up_ends_at_one():
    factors = all_factors(Constant(0.05), 100)
    np.testing.assert_allclose(factors[:6], [0.2, 0.4, 0.6, 0.8, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: Constant(1.5), "warmup"),
        (lambda: Cosine(warmup=-0.1), "warmup"),
        (lambda: Cosine(final=2.0), "final"),
        (lambda: Linear(final=-1.0), "final"),
        (lambda: WarmupStableDecay(decay=1.1), "decay"),
        (lambda: WarmupStableDecay(warmup=0.5, decay=0.6), "decay"),
        (lambda: WarmupStableDecay(form="exponential"), "final"),
    ],
)
def test_bad_shares_name_their_field(build, path):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.path == path


def test_shares_that_fill_the_run_are_accepted():
    for percent in range(101):
        WarmupStableDecay(warmup=percent / 100, decay=(100 - percent) / 100)
