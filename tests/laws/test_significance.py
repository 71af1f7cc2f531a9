"""Laws of differences: what is covered, what is found by chance, and what is found at all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish import significance


def trials(effect: float, prompts: int, seed: int) -> tuple[float, float]:
    """How often p is below 5 %, and how often the interval covers the effect, of 3,000 times."""
    rng = np.random.default_rng(seed)
    differences = effect + rng.standard_normal((prompts, 3000))
    again = significance.draws(prompts, 1000) @ differences / prompts
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    found = [significance.two_sided(column) < 0.05 for column in again.T]
    return float(np.mean(found)), float(np.mean((low <= effect) & (effect <= high)))


def test_no_difference_is_found_one_time_in_twenty_and_intervals_cover() -> None:
    found, covered = trials(0.0, 100, seed=0)
    assert 0.04 <= found <= 0.07
    assert 0.93 <= covered <= 0.97


def test_what_is_called_detectable_is_found_four_times_in_five() -> None:
    effect = significance.detectable(60, 1.0)
    found, _ = trials(effect, 60, seed=1)
    assert 0.75 <= found <= 0.87


def test_p_is_below_five_percent_where_the_interval_leaves_zero_out() -> None:
    rng = np.random.default_rng(2)
    for shift in np.linspace(0, 4, 41):
        again = shift + rng.standard_normal(2000)
        low, high = np.quantile(again, [0.025, 0.975])
        p = significance.two_sided(again)
        if abs(p - 0.05) > 0.005:
            assert (p < 0.05) == (not low <= 0 <= high)


def test_holm_keeps_the_chance_of_any_false_find() -> None:
    """Five true null hypotheses: some p is below 5 % in a fifth of all experiments."""
    p_values = np.random.default_rng(3).random((2000, 5))
    raw = np.mean([min(row) < 0.05 for row in p_values])
    held = np.mean([min(significance.holm(list(row))) < 0.05 for row in p_values])
    assert raw > 0.18
    assert 0.03 <= held <= 0.06


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lowers_nothing_and_keeps_the_order(p_values: list[float]) -> None:
    held = significance.holm(p_values)
    assert all(b >= a for a, b in zip(p_values, held, strict=True))
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    assert [held[place] for place in order] == sorted(held)
    # The smallest is held to what Bonferroni holds all of them to.
    assert min(held) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


def test_what_is_not_asked_changes_nothing() -> None:
    held = significance.holm([0.01, float("nan"), 0.04])
    assert held[0] == pytest.approx(0.02) and np.isnan(held[1]) and held[2] == pytest.approx(0.04)


def test_every_resample_draws_as_many_prompts_and_the_seed_decides_which() -> None:
    first, again = (significance.draws(7, 50, seed=4) for _ in range(2))
    assert (first == again).all() and (first.sum(1) == 7).all()
    assert (first != significance.draws(7, 50, seed=5)).any()


def test_a_resample_without_a_value_has_no_p() -> None:
    assert np.isnan(significance.two_sided(np.array([1.0, float("nan")])))
