"""How much each reward has to say in each category, and the weights that follow from it.

The paper weights rewards by category and gives directions only: portraits raise the portrait
reward, words the alignment (arXiv 2606.27608, section 4.2). A z-score makes every reward as loud as
every other, so a reward that all samples of a category satisfy speaks in noise at full weight. What
is measured here, on the groups that `burnish curate` drew, is the share of a reward's variance
inside groups that is not its own noise:

    signal_k = max(0, 1 - floor_k^2 / var_k),   w_k proportional to prior_k * signal_k,

with the recipe's own weights as the prior, so that a person's sense of what matters is kept and
only what cannot be heard is turned down. It is a proposal: a person reads it, and may edit it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.curation import Profile
from burnish.rewards.base import MAX_ERROR, RewardConfig

LEAST_PROMPTS = 8
"""That a reward has scored, for an opinion of its own."""


@dataclass(frozen=True)
class Loudness:
    """One reward in one category."""

    prompts: int
    mean: float
    spread: float
    """Root of the mean unbiased variance inside groups, in the reward's unit."""
    signal: float
    """Share of that variance that is not the reward's own noise, in [0, 1]."""
    saturated: float
    """Share of groups whose spread is below the reward's floor."""
    missing: float
    """Share of samples without a score."""


def loudness(rows: Sequence[Profile], reward: str, floor: float) -> Loudness | None:
    """What a reward says inside the groups of some prompts; None where it has no say.

    Args:
        rows: of a profile.
        reward: its name.
        floor: standard deviation of scoring one image again.
    """
    groups = [row["scores"][reward] for row in rows if reward in row["scores"]]
    scored = [[value for value in group if value is not None] for group in groups]
    usable = [np.asarray(group, dtype=float) for group in scored if len(group) > 1]
    if not usable:
        return None
    variances = np.array([group.var(ddof=1) for group in usable])
    variance = float(variances.mean())
    return Loudness(
        prompts=len(usable),
        mean=float(np.mean([group.mean() for group in usable])),
        spread=variance**0.5,
        signal=max(0.0, 1 - floor**2 / variance) if variance > 0 else 0.0,
        saturated=float((variances < floor**2).mean()),
        missing=1 - sum(map(len, scored)) / sum(map(len, groups)),
    )


def correlation(rows: Sequence[Profile], left: str, right: str) -> float | None:
    """Correlation of two rewards inside groups, over the samples that both score.

    None where either is constant in every group, or where no group has both.
    """
    xs, ys = [], []
    for row in rows:
        if left in row["scores"] and right in row["scores"]:
            pairs = [
                (x, y)
                for x, y in zip(row["scores"][left], row["scores"][right], strict=True)
                if x is not None and y is not None
            ]
            if len(pairs) > 1:
                found = np.asarray(pairs, dtype=float)
                xs.append(found[:, 0] - found[:, 0].mean())
                ys.append(found[:, 1] - found[:, 1].mean())
    if not xs:
        return None
    x, y = np.concatenate(xs), np.concatenate(ys)
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 0 else None


def propose(
    rows: Sequence[Profile], configs: Mapping[str, RewardConfig]
) -> dict[str, dict[str, float]]:
    """Weights that sum to 1 on each task, by category: the recipe's own, turned down where nothing
    is heard.

    A category with few groups that a reward scored keeps the recipe's weight of it, and a task in
    which no reward is heard keeps all of them. A category is missing where a reward has a say on
    two tasks that would have to give it two weights.
    """
    proposal = {}
    for category in sorted({row["category"] for row in rows}):
        own = [row for row in rows if row["category"] == category]
        recipe = {name: config.weight_of(category) for name, config in configs.items()}
        turned = {
            name: weight * _heard(own, name, configs[name]) for name, weight in recipe.items()
        }
        # Rewards that score a prompt together are those of its task.
        scored = [tuple(name for name in configs if name in row["scores"]) for row in own]
        weights = recipe
        for names in dict.fromkeys(filter(None, scored)):
            told = turned if any(turned[name] > 0 for name in names) else recipe
            total = sum(told[name] for name in names) or 1.0
            weights = weights | {name: round(told[name] / total, 3) for name in names}
        # A task without prompts here has weights of the category, too, if it shares a reward.
        every = {task for config in configs.values() for task in config.tasks}
        groups = [[n for n, config in configs.items() if task in config.tasks] for task in every]
        changed = [own for own in groups if any(weights[n] != recipe[n] for n in own)]
        if all(abs(sum(weights[n] for n in own) - 1) <= MAX_ERROR for own in changed):
            proposal[category] = weights
    return proposal


def _heard(rows: Sequence[Profile], reward: str, config: RewardConfig) -> float:
    """Signal of a reward in the groups of a category; 1 where too few of them are known."""
    heard = loudness(rows, reward, config.floor)
    return heard.signal if heard is not None and heard.prompts >= LEAST_PROMPTS else 1.0


def calibrate(rows: Sequence[Profile], configs: Mapping[str, RewardConfig]) -> dict[str, Any]:
    """All of it as plain data: loudness by category and reward, correlations, proposed weights."""
    categories = sorted({row["category"] for row in rows})
    parts = {c: [row for row in rows if row["category"] == c] for c in categories}
    return {
        "loudness": {
            category: {
                name: vars(found)
                for name, config in configs.items()
                if (found := loudness(own, name, config.floor)) is not None
            }
            for category, own in parts.items()
        },
        "correlation": {
            category: {
                f"{left} {right}": correlation(own, left, right)
                for left, right in itertools.combinations(configs, 2)
            }
            for category, own in {"all": rows, **parts}.items()
        },
        "weights": propose(rows, configs),
    }
