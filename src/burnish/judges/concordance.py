"""How two sets of scores agree, with intervals over prompts; numbers alone, no judge.

One side are a judge's scores, the other what raters said of the same pictures; `groups` names the
prompt of each picture, because prompts are the unit of resampling and because training by groups
only ever compares pictures of one prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""One number per picture."""
Groups = NDArray[Any]
"""The prompt of each picture, or the comparison in which it stands."""
Statistic = Callable[..., float]
"""Of a judge's scores, raters' scores and prompts, and of comparisons where it is one of pairs; NaN
where it is not defined."""

RESAMPLES = 1000
BINS = 10
"""Of the expected calibration error, with equally many pictures each."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval over prompts; NaN where it is not defined."""

    value: float
    low: float
    high: float


def pearson(ours: Scores, theirs: Scores, groups: Groups) -> float:
    """Linear correlation over all pictures."""
    if len(ours) < 2 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return float("nan")
    return float(np.corrcoef(ours, theirs)[0, 1])


def spearman(ours: Scores, theirs: Scores, groups: Groups) -> float:
    """Rank correlation over all pictures, ties at their mean rank."""
    if len(ours) < 2:
        return float("nan")
    return pearson(scipy.stats.rankdata(ours), scipy.stats.rankdata(theirs), groups)


def within_prompt(ours: Scores, theirs: Scores, groups: Groups) -> float:
    """Mean over prompts of the rank correlation among the pictures of one prompt.

    Prompts with fewer than three pictures, or whose pictures raters all liked alike, say nothing; a
    judge that cannot tell pictures apart which raters can has a correlation of 0 there.
    """
    found = []
    for rows in _rows_of(groups):
        if len(rows) < 3 or np.ptp(theirs[rows]) == 0:
            continue
        rank = spearman(ours[rows], theirs[rows], groups[rows])
        found.append(0.0 if np.isnan(rank) else rank)
    return float(np.mean(found)) if found else float("nan")


def pair_accuracy(
    ours: Scores, theirs: Scores, groups: Groups, comparisons: Groups | None = None
) -> float:
    """Share of the pairs of one prompt that raters order and the judge orders alike; half for a
    tie of the judge's. With `comparisons`, only pictures of one of them make pairs."""
    lead, wanted = _pairs(ours, theirs, groups, comparisons)
    is_ordered = wanted != 0
    right = (np.sign(lead[is_ordered] * wanted[is_ordered]) + 1) / 2
    return float(right.mean()) if len(right) else float("nan")


def pair_accuracy_with_ties(
    ours: Scores, theirs: Scores, groups: Groups, comparisons: Groups | None = None
) -> float:
    """Share of the pairs of one prompt of which judge and raters say the same: better, worse, tie.

    With `comparisons`, only pictures of one of them make pairs.

    A judge's scores are never exactly equal, so leads up to a threshold count as ties; it is chosen
    on every other prompt and used on the rest, then the other way round.

    Reference: Deutsch, Foster and Freitag, "Ties Matter", arXiv:2305.14324, section 5, which takes
    the best threshold of the test set itself.
    """
    halves = np.unique(groups, return_inverse=True)[1] % 2
    within = groups if comparisons is None else comparisons
    right, count = 0.0, 0
    for part in (0, 1):
        others, own = (
            _pairs(*(side[rows] for side in (ours, theirs, groups, within)))
            for rows in (halves != part, halves == part)
        )
        chosen = _tie_threshold(*others)
        lead, wanted = own
        right += _agreed(lead, wanted, chosen).sum()
        count += len(lead)
    return right / count if count else float("nan")


def calibration_error(ours: Scores, theirs: Scores, groups: Groups) -> float:
    """Expected calibration error in points: how far the mean score of `BINS` bins of pictures with
    like scores is from raters' mean there, weighted by pictures.

    Chance alone makes it more than nothing; percentiles of resamples are no interval for it.
    """
    if not len(ours):
        return float("nan")
    parts = np.array_split(np.argsort(ours, kind="stable"), min(BINS, len(ours)))
    misses = [len(part) * abs(ours[part].mean() - theirs[part].mean()) for part in parts]
    return float(sum(misses) / len(ours))


def interval(
    statistic: Statistic,
    ours: Scores,
    theirs: Scores,
    groups: Groups,
    *comparisons: Groups,
    resamples: int = RESAMPLES,
) -> Interval:
    """A statistic with the percentile interval of a bootstrap over prompts.

    Args:
        statistic: any of this file.
        ours: the judge's scores.
        theirs: raters' scores of the same pictures.
        groups: the prompt of each picture.
        comparisons: in which each picture stands, for a statistic of pairs; none leaves them out.
        resamples: draws of as many prompts as there are, with replacement.
    """
    rows = _rows_of(groups)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = [rows[number] for number in rng.integers(len(rows), size=len(rows))]
        picks = np.concatenate(drawn)
        # A prompt that is drawn twice is two prompts.
        names = np.repeat(np.arange(len(drawn)), [len(part) for part in drawn])
        found.append(statistic(ours[picks], theirs[picks], names, *(c[picks] for c in comparisons)))
    known = [value for value in found if not np.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (float("nan"),) * 2
    return Interval(statistic(ours, theirs, groups, *comparisons), float(low), float(high))


def _rows_of(groups: Groups) -> list[NDArray[np.intp]]:
    """The rows of each group."""
    order = np.argsort(groups, kind="stable")
    edges = np.flatnonzero(groups[order][1:] != groups[order][:-1]) + 1
    return np.split(order, edges)


def _pairs(
    ours: Scores, theirs: Scores, groups: Groups, comparisons: Groups | None = None
) -> tuple[Scores, Scores]:
    """By how much the first picture of each pair of one prompt leads, for the judge and raters."""
    within = groups if comparisons is None else comparisons
    leads: Sequence[Scores] = [ours[:0]]
    wanted: Sequence[Scores] = [theirs[:0]]
    for rows in _rows_of(groups) if len(groups) else []:
        one, other = (rows[side] for side in np.triu_indices(len(rows), k=1))
        is_compared = within[one] == within[other]
        one, other = one[is_compared], other[is_compared]
        leads.append(ours[one] - ours[other])
        wanted.append(theirs[one] - theirs[other])
    return np.concatenate(leads), np.concatenate(wanted)


def _agreed(lead: Scores, wanted: Scores, threshold: float) -> NDArray[np.bool_]:
    said = np.where(np.abs(lead) <= threshold, 0, np.sign(lead))
    return said == np.sign(wanted)


def _tie_threshold(lead: Scores, wanted: Scores) -> float:
    """The threshold with the most agreement, among quantiles of the leads."""
    if not len(lead):
        return 0.0
    options = np.concatenate([[-1.0], np.quantile(np.abs(lead), np.linspace(0, 1, 41))])
    agreed = [float(_agreed(lead, wanted, option).mean()) for option in options]
    return float(options[int(np.argmax(agreed))])
