"""From verdicts to a result: every node of a bench's tree with its interval, and against a base.

Prompts are the unit: pictures and questions of a prompt come along when it is drawn again, and a
difference of two models draws the same prompts for both. P-values of the pillars are adjusted by
Holm's rule for each model; those below the pillars would be many more questions, so that only
intervals are told. Below `MIN_COVERAGE` of the questions answered a result is invalid.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from burnish import significance
from burnish.bench.base import Bench, Node, Share
from burnish.questions import Item
from burnish.significance import MIN_COVERAGE, MIN_PROMPTS
from burnish.types import Failed

RESAMPLES = 10_000
_BLOCK = 500  # Resamples at once; keeps memory small with many nodes.

Replies = Mapping[tuple[str, int, str], str | Failed]
"""By item, number of the picture, and question."""


@dataclass(frozen=True)
class Scores:
    """What the prompts of one model add to each node."""

    total: Float[ndarray, "prompt node"]
    weight: Float[ndarray, "prompt node"]
    expected: int
    """Questions."""
    failed: Mapping[str, int]
    """Reasons, and how often."""

    @property
    def coverage(self) -> float:
        """Share of the questions with a verdict."""
        return 1 - sum(self.failed.values()) / max(self.expected, 1)


def read(bench: Bench, items: Sequence[Item], num_images: int, replies: Replies) -> Scores:
    """Make numbers of replies.

    Args:
        bench: that asked.
        items: in the order of all models that are compared.
        num_images: pictures of each item.
        replies: those that came; what is missing failed.
    """
    place = {node: number for number, node in enumerate(bench.nodes())}
    total, weight = np.zeros((2, len(items), len(place)))
    failed: Counter[str] = Counter()
    came: dict[tuple[str, int], dict[str, str | Failed]] = {}
    for (item, number, question), reply in replies.items():
        came.setdefault((item, number), {})[question] = reply
    expected = 0
    for row, item in enumerate(items):
        asked = [question.name for question in bench.questions(item)]
        for number in range(num_images):
            expected += len(asked)
            # An official file may hold replies to more than is asked here; they count as there.
            said = {**dict.fromkeys(asked, _MISSING), **came.get((item.id, number), {})}
            verdicts = {}
            for name, reply in said.items():
                found = reply if isinstance(reply, Failed) else bench.parse(item, name, reply)
                if not isinstance(found, Failed):
                    verdicts[name] = found
                elif name in asked:
                    failed[found.reason] += 1
            for node, share in bench.shares(item, verdicts).items() if verdicts else ():
                _add(place, total[row], weight[row], node, share)
    return Scores(total, weight, expected, dict(failed))


_MISSING = Failed(reason="no reply")


def _add(
    place: Mapping[Node, int], total: ndarray, weight: ndarray, node: Node, share: Share
) -> None:
    # A judge may name a facet that the tree does not have; it counts where its parents are.
    if node in place:
        total[place[node]] += share.total
        weight[place[node]] += share.weight


def means(
    bench: Bench, scores: Scores, draws: Float[ndarray, "*resample prompt"]
) -> Float[ndarray, "*resample node"]:
    """The mean of every node, NaN where nothing has a say.

    Args:
        bench: whose tree it is.
        scores: of one model.
        draws: how often each prompt is drawn.
    """
    place = {node: number for number, node in enumerate(bench.nodes())}
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (draws @ scores.total) / (draws @ scores.weight)
    for node, parts in bench.averages().items():
        own = found[..., [place[part] for part in parts]]
        here = ~np.isnan(own)
        with np.errstate(invalid="ignore"):
            found[..., place[node]] = np.where(here, own, 0).sum(-1) / here.sum(-1)
    return found


def tabulate(
    bench: Bench, models: Mapping[str, Scores], base: str, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The whole result as plain data.

    Args:
        bench: whose tree it is.
        models: scores by name, all of the same items.
        base: that the others are compared with.
        resamples: of prompts.
    """
    num = len(next(iter(models.values())).total)
    every = {name: means(bench, scores, np.ones(num)) for name, scores in models.items()}
    again = {name: _resampled(bench, scores, resamples) for name, scores in models.items()}
    rows = [
        {
            "node": list(node),
            "models": {
                name: {
                    **_estimate(every[name][k], again[name][:, k]),
                    "num_prompts": int((scores.weight[:, k] > 0).sum()),
                }
                for name, scores in models.items()
            },
            "gains": {
                name: _estimate(
                    every[name][k] - every[base][k], again[name][:, k] - again[base][:, k]
                )
                for name in models
                if name != base
            },
        }
        for k, node in enumerate(bench.nodes())
    ]
    _adjust(rows, [name for name in models if name != base])
    newest = next((name for name in reversed(list(models)) if name != base), None)
    return {
        "scale": bench.scale,
        "base": base,
        "prompts": num,
        "spread": None if newest is None else _spread(again[newest][:, 0] - again[base][:, 0], num),
        "models": {
            name: {
                "coverage": scores.coverage,
                "is_valid": scores.coverage >= MIN_COVERAGE and not np.isnan(every[name][0]),
                "expected": scores.expected,
                "failed": dict(scores.failed),
            }
            for name, scores in models.items()
        },
        "rows": rows,
    }


def _resampled(bench: Bench, scores: Scores, resamples: int) -> Float[ndarray, "resample node"]:
    """Means of every resample, NaN for nodes of too few prompts."""
    # One seed, so that all models see the same prompts.
    draws = significance.draws(len(scores.total), resamples)
    found = np.concatenate(
        [means(bench, scores, draws[k : k + _BLOCK]) for k in range(0, resamples, _BLOCK)]
    )
    is_few = (scores.weight > 0).sum(0) < MIN_PROMPTS
    place = {node: number for number, node in enumerate(bench.nodes())}
    for node, parts in bench.averages().items():
        there = [part for part in parts if scores.weight[:, place[part]].any()]
        # A small part would drop out of resamples, and the mean would be of others.
        is_few[place[node]] = not there or any(is_few[place[part]] for part in there)
    found[:, is_few] = np.nan
    return found


def _estimate(value: float, again: Float[ndarray, " resample"]) -> dict[str, float | None]:
    """Mean, interval and p-value; None where a resample has none."""
    low = high = p = None
    if not np.isnan(again).any():
        low, high = (float(end) for end in np.quantile(again, [0.025, 0.975]))
        p = significance.two_sided(again)
    return {"mean": None if np.isnan(value) else float(value), "low": low, "high": high, "p": p}


def _adjust(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Adjust the p-values of the pillars; the whole is one question, deeper ones are not asked."""
    for name in names:
        pillars = [row["gains"][name] for row in rows if len(row["node"]) == 1]
        values = [float("nan") if own["p"] is None else own["p"] for own in pillars]
        for own, p in zip(pillars, significance.holm(values), strict=True):
            own["p"] = None if np.isnan(p) else p
    for row in rows:
        for own in row["models"].values():
            del own["p"]
        for own in row["gains"].values():
            if len(row["node"]) > 1:
                del own["p"]


def _spread(differences: Float[ndarray, " resample"], num: int) -> float | None:
    """Standard deviation over prompts that a mean difference behaves as if it had."""
    return None if np.isnan(differences).any() else float(differences.std() * np.sqrt(num))


def examples(
    bench: Bench, items: Sequence[Item], models: Mapping[str, Scores], base: str, count: int
) -> list[dict[str, Any]]:
    """Items behind the whole and each pillar: where the newest model differs most from the base.

    Half of them are its largest losses, half its largest gains; of a base alone, its lowest scores.

    Args:
        bench: whose tree it is.
        items: of the scores.
        models: by name; the last one is the newest.
        base: that it is compared with.
        count: items of each node, at most.
    """
    newest = next((name for name in reversed(list(models)) if name != base), base)
    values = {name: _by_prompt(bench, scores) for name, scores in models.items()}
    found = []
    for k, node in enumerate(bench.nodes()):
        if len(node) > 1:
            continue
        by = values[newest][:, k] - (0 if newest == base else values[base][:, k])
        order = [int(row) for row in np.argsort(by, kind="stable") if not np.isnan(by[row])]
        half = count if newest == base else count // 2
        chosen = dict.fromkeys([*order[:half], *order[max(half, len(order) - half) :]])
        rows = [
            {
                "item": items[row].id,
                "text": items[row].prompt.text,
                "values": {
                    name: None if np.isnan(own[row, k]) else float(own[row, k])
                    for name, own in values.items()
                },
            }
            for row in chosen
        ]
        if rows:
            found.append({"node": list(node), "newest": newest, "items": rows})
    return found


def _by_prompt(bench: Bench, scores: Scores) -> Float[ndarray, "prompt node"]:
    """The value of every prompt on every node; of an average the mean of its parts."""
    place = {node: number for number, node in enumerate(bench.nodes())}
    with np.errstate(invalid="ignore", divide="ignore"):
        values = scores.total / scores.weight
        for node, parts in bench.averages().items():
            own = values[:, [place[part] for part in parts]]
            here = ~np.isnan(own)
            values[:, place[node]] = np.where(here, own, 0).sum(1) / here.sum(1)
    return values
