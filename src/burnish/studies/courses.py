"""The course of each arm's training: reward, held-out score, and what each reward weighed.

A judge that is hacked says more while the held-out score says less, so the two belong in one row.
"""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.guard import FOLDER as GUARD
from burnish.hacking import counted
from burnish.looks import LOOKS
from burnish.run_config import RunConfig
from burnish.tracking import read_rows

_SPANS = 4
"""Parts of a training that no guard looked at."""
_SHARE = "advantage/share_"


def course(config: RunConfig, runs: Mapping[int, Path]) -> Iterator[dict[str, Any]]:
    """A row for every arm, seed and span of steps: from one look of the arm's guard to the next,
    or a quarter of the training where there is none.

    Args:
        config: whose stages are the arms.
        runs: run folder of each seed.

    Yields:
        `arm`, `seed`, `step` (the end of the span), `reward` (mean over its steps), `held_out` and
        `verdict` (of the look at its end), `shares` (of the advantage, per reward; means). None
        where nothing was seen.
    """
    for arm, (seed, run) in itertools.product(config.stages, runs.items()):
        stage = run / "stages" / arm
        looks = {row["step"]: row for row in counted(stage / GUARD / LOOKS)}
        trained = read_rows(stage / "metrics.jsonl")
        steps = config.stages[arm].steps
        ends = sorted(looks) or [steps * part // _SPANS for part in range(_SPANS + 1)]
        for first, end in itertools.pairwise([0, *ends]):
            span = [row for row in trained if first <= row["step"] < end]
            look = looks.get(end, {})
            reward = _mean([row.get("reward/mean") for row in span])
            if reward is not None or look:
                yield {
                    "study": config.name,
                    "arm": arm,
                    "seed": seed,
                    "step": end,
                    "reward": reward,
                    "held_out": look.get("held_out"),
                    "verdict": look.get("verdict"),
                    "shares": {
                        key.removeprefix(_SHARE): _mean([row.get(key) for row in span])
                        for key in dict.fromkeys(key for row in span for key in row)
                        if key.startswith(_SHARE)
                    },
                }


def mean_course(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of what all seeds of an arm have; an arm that ended early in one seed ends
    there."""
    found = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        seeds = {row["seed"] for row in own}
        for step in dict.fromkeys(row["step"] for row in own):
            here = [row for row in own if row["step"] == step]
            if len(here) == len(seeds):
                names = dict.fromkeys(name for row in here for name in row["shares"])
                found.append(
                    {
                        "arm": arm,
                        "step": step,
                        "reward": _mean([row["reward"] for row in here]),
                        "held_out": _mean([row["held_out"] for row in here]),
                        "hacked": sum(row["verdict"] == "hacked" for row in here),
                        "shares": {n: _mean([row["shares"].get(n) for row in here]) for n in names},
                    }
                )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Of what there is; None of nothing."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None
