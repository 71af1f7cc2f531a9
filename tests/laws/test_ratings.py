"""Ratings: agreement with other programs, recovery of what was planted, intervals that cover."""

import json
from pathlib import Path

import choix
import numpy as np
import pytest
from numpy import ndarray

from burnish import ratings
from burnish.significance import MIN_PROMPTS

# Written by tests/laws/arena_rank_reference.py with arena-rank 0.1.1, in an environment of its own.
REFERENCE = Path(__file__).parent / "arena_rank_reference.json"


def votes(
    seed: int, num_players: int, count: int, ties: float = 0.2, side: float = 0.0
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Left, right, score and true strengths of a random tournament."""
    rng = np.random.default_rng(seed)
    strength = rng.normal(0, 0.7, num_players)
    left = rng.integers(0, num_players, count)
    right = (left + rng.integers(1, num_players, count)) % num_players
    chance = 1 / (1 + np.exp(-(strength[left] - strength[right] + side)))
    score = (rng.random(count) < chance).astype(float)
    score[rng.random(count) < ties] = 0.5
    return left, right, score, strength


@pytest.mark.parametrize("seed", range(8))
def test_ratings_are_those_of_choix(seed: int) -> None:
    """A tie is one win for each where everything else counts twice."""
    num = 3 + seed
    left, right, score, _ = votes(seed, num, 800)
    wins: list[tuple[int, int]] = []
    for a, b, s in zip(left.tolist(), right.tolist(), score.tolist(), strict=True):
        wins += [(a, b)] * int(2 * s) + [(b, a)] * int(2 - 2 * s)
    wanted = choix.opt_pairwise(num, wins, alpha=0.0, tol=1e-12)
    found = ratings.fit(ratings.tally(left, right, score, num), prior=0.0)
    assert np.abs(found.elo(0) - 1000 - ratings.ELO * (wanted - wanted[0])).max() < 0.1


def test_ratings_are_those_of_arena_rank() -> None:
    for case in json.loads(REFERENCE.read_text()):
        left, right, score, _ = votes(case["seed"], case["players"], case["votes"])
        found = ratings.fit(ratings.tally(left, right, score, case["players"]), prior=0.0)
        wanted = np.array(case["ratings"])
        assert np.abs(found.elo(0) - found.elo(0).mean() - wanted + wanted.mean()).max() < 0.1


def test_the_slope_vanishes_at_the_fit() -> None:
    """Expected and observed scores are the same for every player, up to the prior's tie."""
    left, right, score, _ = votes(1, 6, 500, side=0.4)
    found = ratings.tally(left, right, score, 6)
    fitted = ratings.fit(found, prior=1.0, has_side=True)
    apart = fitted.strength[:, None] - fitted.strength[None, :] + fitted.side
    surplus = found.score - found.votes / (1 + np.exp(-apart))
    own = surplus.sum(1) - surplus.sum(0) + 0.5 - 1 / (1 + np.exp(-fitted.strength))
    assert np.abs(own).max() < 1e-6
    assert abs(surplus.sum() + 0.5 - 1 / (1 + np.exp(-float(fitted.side)))) < 1e-6


def test_a_side_is_told_from_a_strength() -> None:
    left, right, score, strength = votes(2, 5, 20_000, ties=0.0, side=0.5)
    found = ratings.tally(left, right, score, 5)
    fitted = ratings.fit(found, has_side=True)
    assert float(fitted.side) == pytest.approx(0.5, abs=0.06)
    assert np.abs(fitted.strength - strength + strength.mean()).max() < 0.1
    assert ratings.has_both_sides(found.votes)
    one_way = ratings.tally(np.minimum(left, right), np.maximum(left, right), score, 5)
    assert not ratings.has_both_sides(one_way.votes)


def test_resamples_at_once_are_the_resamples_one_by_one() -> None:
    left, right, score, _ = votes(3, 4, 600)
    cluster = np.arange(600) // 10
    clusters = ratings.tally(left, right, score, 4, cluster)
    again = ratings.resampled(clusters, 6, seed=1)
    together = ratings.fit(again, has_side=True)
    for row in range(6):
        alone = ratings.fit(ratings.Tally(again.votes[row], again.score[row]), has_side=True)
        np.testing.assert_allclose(together.strength[row], alone.strength, atol=1e-8)
    assert again.votes.sum((1, 2)).tolist() == [600.0] * 6


def test_a_winner_of_everything_has_a_finite_rating_and_a_wide_interval() -> None:
    left, right, score = np.zeros(20, int), np.ones(20, int), np.ones(20)
    found = ratings.tally(left, right, score, 2)
    apart = float(np.ptp(ratings.fit(found).elo(0)))
    assert 300 < apart < 1500
    with pytest.raises(ValueError, match="everybody won and lost"):
        ratings.fit(found, prior=0.0)
    # However many votes, and along a chain in which each beats only the next.
    many = ratings.Tally(1e7 * found.votes, 1e7 * found.score)
    assert np.isfinite(ratings.fit(many).strength).all()
    first = np.arange(50)
    chain = ratings.tally(first, first + 1, np.ones(50), 51)
    assert (np.diff(ratings.fit(chain).strength) < 0).all()
    # Who is 400 points ahead wins twenty of twenty in one case of seven, who is 800 ahead mostly.
    each = ratings.tally(left, right, score, 2, np.arange(20))
    low, high = ratings.interval(ratings.bootstrap(each, 1000).elo(1, at=0.0))
    assert 200 < low[0] < 400 < apart < 800 < high[0]


def test_players_that_no_battle_connects_are_told_apart() -> None:
    left, right = np.array([0, 2, 4]), np.array([1, 3, 2])
    found = ratings.tally(left, right, np.ones(3), 6)
    assert ratings.components(found.votes) == [[0, 1], [2, 3, 4], [5]]


def test_win_rates_take_both_sides_together() -> None:
    left, right, score, _ = votes(4, 3, 300)
    rates = ratings.win_rates(ratings.tally(left, right, score, 3))
    np.testing.assert_allclose(rates + rates.T, np.where(np.eye(3), np.nan, 1.0))
    own = (left == 0) & (right == 1), (left == 1) & (right == 0)
    wanted = (score[own[0]].sum() + (1 - score[own[1]]).sum()) / (own[0].sum() + own[1].sum())
    assert rates[0, 1] == pytest.approx(wanted)


def coverage(prompts: int, tournaments: int) -> tuple[float, float]:
    """Share of planted ratings inside intervals over prompts, and over single votes.

    Votes on a prompt agree more than chance: each prompt draws its own chance for each pair, Beta
    around the pair's, so that strengths stay those of all prompts.
    """
    rng = np.random.default_rng(0)
    num, per_pair = 4, 5
    strength = np.array([0.0, 0.3, -0.3, 0.8])
    pairs = np.array([(i, j) for i in range(num) for j in range(num) if i != j])
    chance = 1 / (1 + np.exp(-(strength[pairs[:, 0]] - strength[pairs[:, 1]])))
    planted = ratings.ELO * (strength - strength[0])
    covered, naive = [], []
    for _ in range(tournaments):
        own = rng.beta(2 * chance, 2 * (1 - chance), (prompts, len(pairs)))
        wins = rng.binomial(per_pair, own).astype(float)
        clusters = ratings.Tally(np.zeros((prompts, num, num)), np.zeros((prompts, num, num)))
        clusters.votes[:, pairs[:, 0], pairs[:, 1]] = per_pair
        clusters.score[:, pairs[:, 0], pairs[:, 1]] = wins
        low, high = ratings.interval(ratings.bootstrap(clusters, 400).elo(0, at=0.0))
        covered.append((low[1:] <= planted[1:]) & (planted[1:] <= high[1:]))
        # The same votes, each for itself: intervals that are far too narrow.
        whole = ratings.Tally(clusters.votes.sum(0), clusters.score.sum(0))
        fitted = ratings.fit(whole).strength
        draws = rng.binomial(
            whole.votes.astype(int),
            1 / (1 + np.exp(-np.subtract.outer(fitted, fitted))),
            (100, num, num),
        ).astype(float)
        again = ratings.fit(ratings.Tally(np.broadcast_to(whole.votes, draws.shape), draws))
        low, high = ratings.interval(again.elo(0, at=0.0))
        naive.append((low[1:] <= planted[1:]) & (planted[1:] <= high[1:]))
    return float(np.mean(covered)), float(np.mean(naive))


def test_intervals_over_prompts_cover_what_was_planted() -> None:
    share, plain = coverage(prompts=60, tournaments=1000)
    print(f"60 prompts: {share:.3f} covered over prompts, {plain:.3f} over votes")
    assert 0.93 <= share <= 0.97 and plain < 0.85


def test_few_prompts_make_intervals_that_are_somewhat_short() -> None:
    """At the least number that makes one at all."""
    share, _ = coverage(prompts=MIN_PROMPTS, tournaments=400)
    print(f"{MIN_PROMPTS} prompts: {share:.3f} covered over prompts")
    assert 0.85 <= share <= 0.95


def coverage_at(prompts: int, gap: float, tournaments: int) -> float:
    """Share of intervals that hold how far two players are apart, one vote on each prompt."""
    rng = np.random.default_rng(0)
    first, chance = np.arange(prompts), 1 / (1 + 10 ** (-gap / 400))
    covered = []
    for _ in range(tournaments):
        right = rng.integers(2, size=prompts)
        wins = rng.random(prompts) < chance
        score = np.where(right == 1, wins, ~wins).astype(float)
        clusters = ratings.tally(1 - right, right, score, 2, first)
        low, high = ratings.interval(ratings.bootstrap(clusters, 200).elo(1, at=0.0))
        covered.append(low[0] <= gap <= high[0])
    return float(np.mean(covered))


@pytest.mark.parametrize("prompts", [MIN_PROMPTS, 20, 96])
def test_intervals_cover_however_far_two_players_are_apart(prompts: int) -> None:
    """Where one wins nearly always, all prompts say the same, and so would all resamples."""
    found = {gap: coverage_at(prompts, gap, tournaments=100) for gap in (0, 200, 400, 600, 800)}
    print(f"{prompts} prompts:", ", ".join(f"{share:.3f} at {gap}" for gap, share in found.items()))
    assert min(found.values()) >= 0.9


def test_ratings_of_resamples_do_not_depend_on_the_order_of_players() -> None:
    left, right, score, _ = votes(5, 4, 300)
    cluster, order = np.arange(300) // 10, np.array([2, 0, 3, 1])
    one, other = (
        ratings.bootstrap(ratings.tally(a, b, score, 4, cluster), 20).strength
        for a, b in ((left, right), (order[left], order[right]))
    )
    np.testing.assert_allclose(one, other[:, order], atol=1e-6)


def test_the_prior_pulls_few_votes_to_the_middle_and_many_not_at_all() -> None:
    pulls = {}
    for count in (200, 2_000, 100_000):
        left, right, score, _ = votes(3, 6, count)
        tally = ratings.tally(left, right, score, 6)
        plain, pulled = (ratings.fit(tally, prior=prior).elo(0) for prior in (0.0, 1.0))
        pulls[count] = float(np.abs(plain - pulled).max())
        assert np.ptp(pulled) < np.ptp(plain)
    print(", ".join(f"{count:,} votes: {pull:.2f} Elo" for count, pull in pulls.items()))
    assert pulls[200] > pulls[2_000] > pulls[100_000] and pulls[100_000] < 0.1


def test_what_a_number_of_prompts_can_show() -> None:
    assert ratings.detectable(400) == pytest.approx(ratings.detectable(100) / 2)
    assert ratings.detectable(100, 0.25) == pytest.approx(48.6, abs=0.1)
