"""What shows, in looks at a policy, that its reward is hacked: the rule of a guard.

Looks are compared in pairs, over the prompts that both have scores of: a judge that fails on hard
prompts would otherwise raise a mean, and one that answers again would lower it. What is missing is
not missing at random, so a look with too little has no say at all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from burnish.looks import Look, best_of
from burnish.tracking import read_rows

Verdict = Literal["fine", "hacked"]
MIN_COVERAGE = 0.9
"""Share of the pictures with a say that must have a score. Lower than that of a result
(`burnish.significance`): no mean over other prompts is compared here."""


def counts(look: Mapping[str, Any]) -> bool:
    """Whether a look has enough scores to be compared; one that tells no coverage has all."""
    return look.get("coverage", {}).get("judge", 1.0) >= MIN_COVERAGE


def counted(path: Path) -> list[dict[str, Any]]:
    """The looks of a file that count."""
    return [row for row in read_rows(path) if counts(row)]


def is_better(one: Look, other: Look) -> bool:
    """Whether a look has a higher held-out score than another, over the prompts that both have."""
    if not (counts(one) and counts(other)):
        return counts(one)
    ours, theirs = _both(one, other)
    return len(ours) > 0 and float(ours.mean()) > float(theirs.mean())


def verdict(looks: Sequence[Look], max_loss: float) -> Verdict:
    """Whether the newest look shows that the reward is followed for its own sake.

    It does if the held-out score has fallen since the best look, by more than `max_loss` of what
    had been gained and by more than one standard error of the differences of single prompts, while
    the reward has not: it has kept all but that share of its own gain up to the best look. A look
    that does not count is passed over, and one without a reward tells nothing of it.

    Args:
        looks: from the start to the newest: reward, None where none was seen; `scores`, prompt ->
            mean score of its pictures; coverage, the share of pictures with scores, of `judge`.
        max_loss: share of the best gain.

    >>> row = lambda reward, *scores: {"reward": reward, "scores": dict(zip("ab", scores))}
    >>> verdict([row(None, 0.2, 0.2), row(1.0, 0.6, 0.6), row(2.0, 0.5, 0.4)], 0.25)
    'hacked'
    >>> verdict([row(None, 0.2, 0.2), row(1.0, 0.6, 0.6), row(0.9, 0.5, 0.4)], 0.25)
    'fine'
    """
    newest = looks[-1]
    if not counts(newest):
        return "fine"
    start, best = next(filter(counts, looks)), best_of(looks, is_better)
    had, has = _both(best, newest)
    if best is newest or len(had) < 2:
        return "fine"
    if newest["reward"] is None:
        return "fine"
    # Up to the best look; steps on which the reward failed leave a look without.
    known = [one["reward"] for one in looks[: looks.index(best) + 1] if one["reward"] is not None]
    is_kept = not known or newest["reward"] > known[-1] - max_loss * max(known[-1] - known[0], 0.0)
    after, before = _both(best, start)
    gained = float(after.mean() - before.mean()) if len(after) else 0.0
    lost = had - has
    least = max(max_loss * gained, float(lost.std(ddof=1)) / len(lost) ** 0.5)
    return "hacked" if is_kept and float(lost.mean()) > least else "fine"


def _both(one: Look, other: Look) -> tuple[Float[ndarray, " prompt"], Float[ndarray, " prompt"]]:
    """Scores of two looks at the prompts that both have."""
    shared = [name for name in one["scores"] if name in other["scores"]]
    ours, theirs = ([look["scores"][name] for name in shared] for look in (one, other))
    return np.array(ours, float), np.array(theirs, float)
