"""Ratings from battles: Bradley-Terry with ties, a weak prior, and intervals over prompts.

    P(left wins) = sigmoid(strength_left - strength_right + side)

A tie is half a win for each (Arena's own rule). Every player also ties once with the average
player, which keeps one who never lost at a finite rating with a wide interval. Elo is 400 / ln 10
per unit of strength, with one player anchored: only differences within one set of battles mean
anything.

Votes on one prompt share what is special about it, so a vote is not the unit of an interval:
prompts are drawn again, with all their votes. Where (nearly) all prompts say the same, so do all
resamples, and their spread is no measure of what the next prompt may say: each resample also has an
upset, a random part of a prompt that turned out the other way round. Everything works on tallies,
matrices of votes and scores by left and right player, so that thousands of resamples are one batch
of small systems.

Reference: Bradley and Terry (1952); ties as half wins and the scale of Elo as in Chatbot Arena,
arXiv:2403.04132. For a player who won everything the weight of upsets is that of Jeffreys' prior of
a chance: Brown, Cai and DasGupta, "Interval estimation for a binomial proportion" (2001).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from burnish.significance import POWER, draws

ELO = 400 / np.log(10)
"""Points per unit of strength: ten to one are 400 points apart."""
_TOLERANCE = 1e-7  # Of a strength; a hundred-thousandth of a point of Elo.
UPSET = 0.5
"""Prompts that an upset is worth in the mean; its weight is drawn from a gamma distribution of this
shape. A half covers at any distance of two players (`tests/laws/test_ratings.py`)."""
RESAMPLE_PRIOR = 0.1
"""Ties of each player with the average one in a resample: a whole one would bound how far apart two
players can be, and the upset keeps ratings finite."""
_MAX_STEPS = 500
_LONGEST_STEP = 2.0  # Of a strength; Newton's step may overshoot far from the end.


@dataclass(frozen=True)
class Tally:
    """Votes between every two players, by who stood on the left; leading axes are resamples."""

    votes: Float[ndarray, "*resample left right"]
    score: Float[ndarray, "*resample left right"]
    """Wins of the left player, ties as halves."""


def tally(
    left: Int[ndarray, " vote"],
    right: Int[ndarray, " vote"],
    score: Float[ndarray, " vote"],
    num_players: int,
    cluster: Int[ndarray, " vote"] | None = None,
) -> Tally:
    """Add up votes.

    Args:
        left, right: players of each vote, from 0.
        score: of the left player: 1 won, 0 lost, 0.5 tied.
        num_players: of all.
        cluster: of each vote, from 0: the tally has one row for each cluster then.

    >>> tally(np.array([0, 1]), np.array([1, 0]), np.array([1.0, 0.5]), 2).score
    array([[0. , 1. ],
           [0.5, 0. ]])
    """
    place = left * num_players + right
    shape: tuple[int, ...] = (num_players, num_players)
    if cluster is not None:
        place = cluster * num_players**2 + place
        shape = (int(cluster.max(initial=-1)) + 1, *shape)
    size = int(np.prod(shape))
    votes = np.bincount(place, minlength=size).astype(float)
    return Tally(votes.reshape(shape), np.bincount(place, score, minlength=size).reshape(shape))


@dataclass(frozen=True)
class Fit:
    """Strengths around the average player, and what standing on the left is worth."""

    strength: Float[ndarray, "*resample player"]
    side: Float[ndarray, "*resample"]

    def elo(self, anchor: int, at: float = 1000.0) -> Float[ndarray, "*resample player"]:
        """Ratings at which one player has a given number of points."""
        return at + ELO * (self.strength - self.strength[..., anchor : anchor + 1])


def fit(found: Tally, *, prior: float = 1.0, has_side: bool = False) -> Fit:
    """The most likely strengths, by Newton's method, of every resample at once.

    Args:
        found: votes.
        prior: ties of each player with the average one; 0 needs a graph of wins that leads from
            every player to every other.
        has_side: also fit what standing on the left is worth; else it is nothing.

    Raises:
        ValueError: no finite strengths, as somebody never lost or never won and there is no prior.

    >>> one_win = tally(np.array([0, 0, 1]), np.array([1, 1, 0]), np.array([1.0, 1.0, 1.0]), 2)
    >>> fit(one_win, prior=0.0).strength.round(3)
    array([ 0.347, -0.347])
    """
    num = found.votes.shape[-1]
    batch = found.votes.shape[:-2]
    strength, side = np.zeros((*batch, num)), np.zeros(batch)
    identity, ones = np.eye(num), np.ones((num, num))
    for _ in range(_MAX_STEPS):
        apart = strength[..., :, None] - strength[..., None, :] + side[..., None, None]
        chance = _sigmoid(apart)
        surplus = found.score - found.votes * chance
        weight = found.votes * chance * (1 - chance)
        own = _sigmoid(strength)
        slope = surplus.sum(-1) - surplus.sum(-2) + prior * (0.5 - own)
        pairs = weight + weight.swapaxes(-1, -2)
        diagonal = pairs.sum(-1) + prior * own * (1 - own)
        # The ones choose, of all that differ by a constant, the strengths that sum to 0.
        curve = diagonal[..., None] * identity - pairs + (ones if prior == 0 else 0.0)
        if has_side:
            slope, curve = _with_side(slope, curve, surplus, weight, _sigmoid(side))
        try:
            step = np.linalg.solve(curve, slope[..., None])[..., 0]
        except np.linalg.LinAlgError:
            break
        step *= np.minimum(1, _LONGEST_STEP / np.abs(step).max(-1, keepdims=True, initial=1e-300))
        strength = strength + step[..., :num]
        side = np.asarray(side + step[..., num]) if has_side else side
        if np.abs(step).max(initial=0.0) < _TOLERANCE:
            return Fit(strength, side)
    raise ValueError(
        "need battles in which everybody won and lost something, got players that only won or only "
        "lost; use a prior above 0"
    )


def _with_side(
    slope: ndarray, curve: ndarray, surplus: ndarray, weight: ndarray, side: ndarray
) -> tuple[ndarray, ndarray]:
    """Slope and curvature with one more unknown, the left side, which ties once with the right."""
    across = weight.sum(-1) - weight.sum(-2)
    corner = weight.sum((-1, -2)) + side * (1 - side)
    own = surplus.sum((-1, -2)) + 0.5 - side
    slope = np.concatenate([slope, own[..., None]], axis=-1)
    upper = np.concatenate([curve, across[..., None]], axis=-1)
    lower = np.concatenate([across, corner[..., None]], axis=-1)
    return slope, np.concatenate([upper, lower[..., None, :]], axis=-2)


def _sigmoid(values: ndarray) -> ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))


def has_both_sides(votes: Float[ndarray, "left right"]) -> bool:
    """Whether enough pairs met in both orders to tell a side from a strength: a tenth of all votes
    are answered by one in the other order."""
    return float(np.minimum(votes, votes.T).sum()) >= 0.1 * float(votes.sum())


def resampled(clusters: Tally, resamples: int, seed: int = 0) -> Tally:
    """Tallies of resamples: as many clusters as there are, drawn with repetition, with their votes.

    Args:
        clusters: one row for each cluster, such as a prompt.
        resamples: how many.
        seed: of the draws.
    """
    count, num = len(clusters.votes), clusters.votes.shape[-1]
    drawn = draws(count, resamples, seed)
    flat = (values.reshape(count, -1) for values in (clusters.votes, clusters.score))
    votes, score = (drawn @ values for values in flat)
    return Tally(votes.reshape(-1, num, num), score.reshape(-1, num, num))


def with_upsets(again: Tally, clusters: Tally, seed: int = 0) -> Tally:
    """Resamples, each with a random part of a prompt on which everybody lost as they won.

    Args:
        again: resamples, as `resampled` returns them.
        clusters: that they were drawn from.
        seed: of the weights, one for each resample.

    The votes of two players weigh as on a mean prompt of whoever of them met others on fewer.
    """
    met = (clusters.votes.sum(-1) + clusters.votes.sum(-2) > 0).sum(0)
    share = 1 / np.maximum(np.minimum.outer(met, met), 1)
    votes, score = clusters.votes.sum(0) * share, clusters.score.sum(0) * share
    weight = np.random.default_rng([seed, 1]).gamma(UPSET, size=len(again.votes))[:, None, None]
    return Tally(again.votes + weight * votes, again.score + weight * (votes - score))


def bootstrap(clusters: Tally, resamples: int, *, seed: int = 0, has_side: bool = False) -> Fit:
    """Fits to resamples of prompts with upsets; `interval` of their ratings is one over prompts.

    Args:
        clusters: one row for each prompt.
        resamples: how many.
        seed: of the draws.
        has_side: also fit what standing on the left is worth.
    """
    again = with_upsets(resampled(clusters, resamples, seed), clusters, seed)
    return fit(again, prior=RESAMPLE_PRIOR, has_side=has_side)


def components(votes: Float[ndarray, "left right"]) -> list[list[int]]:
    """Players that battles connect, directly or through others; more than one set has no common
    scale."""
    linked = (votes + votes.T) > 0
    found: list[list[int]] = []
    left = set(range(len(votes)))
    while left:
        reached, front = set(), {min(left)}
        while front:
            reached |= front
            front = {int(p) for q in front for p in np.flatnonzero(linked[q])} - reached
        found.append(sorted(reached))
        left -= reached
    return found


def win_rates(found: Tally) -> Float[ndarray, "player player"]:
    """Score of the row's player against the column's, both sides together; nan without a vote."""
    votes = found.votes + found.votes.T
    score = found.score + (found.votes - found.score).T
    return np.divide(score, votes, out=np.full_like(votes, np.nan), where=votes > 0)


def interval(
    values: Float[ndarray, " resample *value"], level: float = 0.95
) -> tuple[Float[ndarray, "*value"], Float[ndarray, "*value"]]:
    """Percentile interval over resamples."""
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high


def detectable(num_clusters: int, spread: float = 0.5) -> float:
    """Least difference in Elo of two players that so many clusters would show, four times in five.

    Args:
        num_clusters: prompts.
        spread: standard deviation of a prompt's mean score, at most 0.5 where all its votes agree.

    The mean score of two equal players has a standard error of `spread / sqrt(prompts)`; 2.8 of
    those are found in four of five experiments at the level of 5 %, and near equality a score of
    0.5 + d is 4 d units of strength.
    """
    return float(ELO * 4 * POWER * spread / np.sqrt(num_clusters))


def order(strength: Float[ndarray, " player"]) -> Sequence[int]:
    """Players from the strongest on."""
    return [int(player) for player in np.argsort(-strength, kind="stable")]
