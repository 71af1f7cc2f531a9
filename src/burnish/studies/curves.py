"""Learning curves of arms: the held-out score at each look of a guard, over network evaluations.

The question of a budget, how much an arm must spend to be as good as another one at its end, is
answered from them. The guards of all arms must look at the same prompts with the same judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from burnish.curation import num_drawn
from burnish.evaluation import Estimate
from burnish.guard import FOLDER as GUARD
from burnish.hacking import counted
from burnish.looks import LOOKS
from burnish.run_config import RunConfig
from burnish.run_folder import job_folder
from burnish.tracking import read_rows

_RESAMPLES = 1000
_TAIL = 0.025  # Of the resamples, which an interval leaves out at each end.


@dataclass(frozen=True)
class Curve:
    """What one arm had spent and gained at each look, as means over seeds."""

    steps: tuple[int, ...]
    evaluations: Float[ndarray, " look"]
    """Of the network, curation included and the looks themselves left out."""
    scores: Float[ndarray, "look prompt"]
    prompts: tuple[str, ...]


def learning_curve(config: RunConfig, runs: Sequence[Path], arm: str) -> Curve | None:
    """The curve of an arm over the looks and prompts that all runs have; None without a look.

    Args:
        config: of the study.
        runs: run folders, one for each seed.
        arm: a stage.
    """
    looks = [
        {row["step"]: row["scores"] for row in counted(run / "stages" / arm / GUARD / LOOKS)}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(own) for own in looks)))
    if not steps:
        return None
    names = [set(scores) for own in looks for step, scores in own.items() if step in steps]
    prompts = sorted(set.intersection(*names))
    scores = [[[own[step][name] for name in prompts] for step in steps] for own in looks]
    return Curve(
        steps=tuple(steps),
        evaluations=np.mean([_spent(config, run, arm, steps) for run in runs], axis=0),
        scores=np.mean(np.array(scores, dtype=float), axis=0),
        prompts=tuple(prompts),
    )


def _spent(config: RunConfig, run: Path, arm: str, steps: Sequence[int]) -> list[float]:
    """Network evaluations before each of some steps."""
    stage, profile = config.stages[arm], config.profile_of(arm)
    branches = 1 if stage.rollout.guidance_scale == 1 else 2
    drawn = num_drawn(job_folder(run, f"curate/{profile}")) if profile else 0
    rows = read_rows(run / "stages" / arm / "metrics.jsonl")
    trained = {row["step"]: row.get("data/evaluations", 0.0) for row in rows}
    first = float(drawn * stage.rollout.num_steps * branches)
    return [first + sum(n for step, n in trained.items() if step < end) for end in steps]


def crossing(spent: Float[ndarray, " look"], means: Float[ndarray, " look"], level: float) -> float:
    """Where a curve first reaches a level, between looks by a straight line; infinite if never.

    >>> crossing(np.array([0.0, 10.0, 20.0]), np.array([0.5, 0.5, 0.7]), 0.6)
    15.0
    """
    for place, mean in enumerate(means):
        if mean >= level:
            if place == 0:
                return float(spent[0])
            before = means[place - 1]
            share = (level - before) / (mean - before)
            return float(spent[place - 1] + share * (spent[place] - spent[place - 1]))
    return float("inf")


def budget(control: Curve, other: Curve) -> Estimate | None:
    """What an arm must spend to be as good as the control at its end, as a share of what the
    control spent until it first was.

    Args:
        control: whose best score of the last three looks' mean is the level, so that a lucky last
            look is no goal.
        other: another arm, or the control itself.

    Returns:
        With the 95 % interval over prompts; infinite where the level is not reached. None without a
        prompt that both have, and where the control is at its level from its first look on, or in
        more resamples than the interval leaves out: what gained nothing had no need to spend.
    """
    shared = [name for name in control.prompts if name in set(other.prompts)]
    if not shared:
        return None
    own, theirs = (
        curve.scores[:, [curve.prompts.index(name) for name in shared]]
        for curve in (control, other)
    )

    def share(rows: Int[ndarray, " pick"]) -> float:
        means = own[:, rows].mean(axis=1)
        level = float(means[-3:].mean())
        if means[0] >= level:
            return float("nan")
        needed = crossing(control.evaluations, means, level)
        return crossing(other.evaluations, theirs[:, rows].mean(axis=1), level) / needed

    mean = share(np.arange(len(shared)))
    rng = np.random.default_rng(0)
    found = np.array(
        [share(rng.integers(len(shared), size=len(shared))) for _ in range(_RESAMPLES)]
    )
    known = found[~np.isnan(found)]
    if np.isnan(mean) or len(known) < (1 - _TAIL) * _RESAMPLES:
        return None
    low, high = np.quantile(known, [_TAIL, 1 - _TAIL], method="nearest")
    return Estimate(mean, float(low), float(high), len(shared))


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is never reached."""
    return {name: value if value < float("inf") else None for name, value in numbers.items()}


def told(share: Mapping[str, float | None] | None) -> str:
    """A share for readers.

    >>> told({"mean": 0.5, "low": 0.4, "high": None})
    '0.50 [0.40, never]'
    """
    if share is None:
        return "missing"
    ends = {name: "never" if value is None else f"{value:.2f}" for name, value in share.items()}
    return f"{ends['mean']} [{ends['low']}, {ends['high']}]"


def budgets(config: RunConfig, runs: Sequence[Path]) -> Mapping[str, Any]:
    """Curves of all arms and what each needs against the first, as plain data; none unless all
    arms have a guard, and one that only looks."""
    guards = [stage.guard for stage in config.stages.values()]
    if any(guard is None or guard.action != "warn" for guard in guards):
        return {}
    curves = {arm: learning_curve(config, runs, arm) for arm in config.stages}
    control = curves[next(iter(curves))]
    return {
        arm: {
            "steps": list(curve.steps),
            "evaluations": curve.evaluations.tolist(),
            "held_out": curve.scores.mean(axis=1).tolist(),
            "share": (found := control and budget(control, curve)) and _finite(asdict(found)),
        }
        for arm, curve in curves.items()
        if curve is not None
    }
