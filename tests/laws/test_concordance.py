"""Agreement of two sets of scores: known values, invariances, coverage of the intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.judges import concordance
from burnish.judges.concordance import (
    calibration_error,
    interval,
    pair_accuracy,
    pair_accuracy_with_ties,
    pearson,
    spearman,
    within_prompt,
)

seeds = st.integers(0, 2**31)
ALL = (pearson, spearman, within_prompt, pair_accuracy, pair_accuracy_with_ties)


def drawn(seed: int, prompts: int = 12, members: int = 4, noise: float = 0.5):
    """Raters' scores, a judge's, and groups."""
    rng = np.random.default_rng(seed)
    theirs = rng.normal(0, 1, prompts * members)
    ours = theirs + rng.normal(0, noise, len(theirs))
    return ours, theirs, np.repeat(np.arange(prompts), members)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_perfect_agreement_is_one_and_its_reverse_minus_one(seed: int) -> None:
    _, theirs, groups = drawn(seed)
    for statistic in ALL:
        assert statistic(2 * theirs + 1, theirs, groups) == pytest.approx(1)
    for statistic in (pearson, spearman, within_prompt):
        assert statistic(-theirs, theirs, groups) == pytest.approx(-1)
    assert pair_accuracy(-theirs, theirs, groups) == 0


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_ranks_do_not_see_a_monotone_map_nor_the_order_of_rows(seed: int) -> None:
    ours, theirs, groups = drawn(seed)
    rows = np.random.default_rng(seed).permutation(len(ours))
    for statistic in (spearman, within_prompt, pair_accuracy):
        value = statistic(ours, theirs, groups)
        assert statistic(np.exp(ours), theirs, groups) == pytest.approx(value)
        assert statistic(ours[rows], theirs[rows], groups[rows]) == pytest.approx(value)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_within_a_prompt_what_all_its_pictures_share_has_no_say(seed: int) -> None:
    """A judge that only knows which prompt is hard agrees over all pictures, and is no use."""
    ours, theirs, groups = drawn(seed)
    rng = np.random.default_rng(seed + 1)
    ours_hard, theirs_hard = ours + 9 * groups, theirs + 9 * groups
    value = within_prompt(ours, theirs, groups)
    assert within_prompt(ours_hard, theirs_hard, groups) == pytest.approx(value)
    blind = 9.0 * groups + rng.normal(0, 1e-3, len(groups))
    assert spearman(blind, theirs_hard, groups) > 0.9
    assert abs(within_prompt(blind, theirs_hard, groups)) < 0.6


def test_a_judge_that_says_the_same_of_all_pictures_has_no_rank() -> None:
    _, theirs, groups = drawn(0)
    same = np.full(len(theirs), 3.0)
    assert np.isnan(spearman(same, theirs, groups)) and np.isnan(pearson(same, theirs, groups))
    assert within_prompt(same, theirs, groups) == 0
    assert pair_accuracy(same, theirs, groups) == 0.5


def test_prompts_that_raters_like_alike_say_nothing() -> None:
    ours, theirs, groups = drawn(1)
    theirs[groups == 3] = 4.0
    kept = groups != 3
    assert within_prompt(ours, theirs, groups) == within_prompt(
        ours[kept], theirs[kept], groups[kept]
    )


def test_ties_are_counted_where_both_sides_have_them() -> None:
    """Small differences of the judge's are ties, and so are those of the raters."""
    rng = np.random.default_rng(0)
    theirs = rng.integers(1, 4, 400).astype(float)
    groups = np.repeat(np.arange(100), 4)
    ours = theirs + rng.normal(0, 0.05, 400)
    assert pair_accuracy_with_ties(ours, theirs, groups) > 0.98
    without = np.sign(theirs[:, None] - theirs[None]) == np.sign(ours[:, None] - ours[None])
    same = (groups[:, None] == groups[None]) & ~np.eye(400, dtype=bool)
    assert without[same].mean() < 0.75


def test_pairs_are_those_of_a_comparison_where_comparisons_are_told() -> None:
    ours, theirs, groups = drawn(2, prompts=30)
    pairs = np.arange(len(groups)) // 2
    for statistic in (pair_accuracy, pair_accuracy_with_ties):
        assert statistic(ours, theirs, groups, groups) == statistic(ours, theirs, groups)
        found = interval(statistic, ours, theirs, groups, pairs, resamples=50)
        assert found.value != statistic(ours, theirs, groups)
    one, other = (side.reshape(-1, 2) for side in (ours, theirs))
    right = np.sign(one[:, 0] - one[:, 1]) == np.sign(other[:, 0] - other[:, 1])
    assert pair_accuracy(ours, theirs, groups, pairs) == right.mean()


def test_calibration_error_is_the_offset_of_a_judge() -> None:
    theirs = np.random.default_rng(0).uniform(1, 5, 500)
    groups = np.arange(500)
    assert calibration_error(theirs, theirs, groups) == pytest.approx(0)
    assert calibration_error(theirs + 0.3, theirs, groups) == pytest.approx(0.3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Prompts, not pictures, are resampled, so pictures that share an error do not narrow it."""
    covered = 0
    for seed in range(80):
        rng = np.random.default_rng(seed)
        shared = np.repeat(rng.normal(0, 1, 30), 5)
        found = interval(
            lambda ours, theirs, groups: float(ours.mean()),
            shared + rng.normal(0, 0.1, 150),
            shared,
            np.repeat(np.arange(30), 5),
            resamples=200,
        )
        covered += found.low <= 0 <= found.high
    assert 0.85 <= covered / 80 <= 1


def test_an_interval_holds_its_value_and_is_a_function_of_its_data() -> None:
    data = drawn(5)
    for statistic in ALL:
        found = interval(statistic, *data, resamples=100)
        assert found.low <= found.value <= found.high
        assert found == interval(statistic, *data, resamples=100)


def test_nothing_is_defined_for_no_picture() -> None:
    none = np.empty(0)
    assert np.isnan(concordance.pair_accuracy(none, none, none))
    assert np.isnan(calibration_error(none, none, none))
