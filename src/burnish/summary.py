"""The numbers of a run, from its scores and its logs: `summary.json`.

Every number is a mean over prompts with the 95 % interval of a bootstrap over prompts; two policies
are compared on the prompts both have, paired. What was not measured is `None` and named under
`missing`: nothing is ever filled in. Prompts of the knowledge set are kept out of the headline,
because no reward asks for what they show; they say what a stage forgot.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from burnish.algorithms.distill import DistillConfig
from burnish.caveats import caveats
from burnish.config import located, parse
from burnish.evaluation import HEADLINE, Estimate, Row, best_of, by_prompt, estimate, gain
from burnish.fixed_states import folded
from burnish.prompts import read_prompts
from burnish.run_config import BASE, BEST_OF, STAGE, RunConfig, teachers_of
from burnish.run_folder import all_scores, is_complete, spent
from burnish.significance import MIN_COVERAGE
from burnish.tracking import Run, write_json
from burnish.types import Task

KNOWLEDGE = ("likeness", "style")
"""Metrics of what no reward asks for, read on the knowledge prompts."""

Number = dict[str, Any] | None
"""An `Estimate` as plain data, or None where it was not measured."""


class Cells:
    """Scores by policy, task and metric; held-out and knowledge prompts apart."""

    def __init__(self, rows: Sequence[Row], knowledge: frozenset[str]) -> None:
        self._rows: dict[tuple[str, str, str, bool], list[Row]] = defaultdict(list)
        for row in rows:
            key = (row["policy"], row["task"], row["metric"], row["prompt"] in knowledge)
            self._rows[key].append(row)

    def rows(self, policy: str, task: str, metric: str, *, knowledge: bool = False) -> list[Row]:
        """The rows of one cell; none where nothing was measured."""
        return self._rows.get((policy, task, metric, knowledge), [])

    def metrics(self, policy: str, task: str) -> list[str]:
        """Names of the metrics on held-out prompts, in the order of their rows."""
        return [m for p, t, m, is_known in self._rows if (p, t) == (policy, task) and not is_known]

    def score(self, policy: str, task: str, metric: str, **options: Any) -> Number:
        """Mean over prompts; `category` and `knowledge` narrow the rows."""
        values = by_prompt(self._narrowed(policy, task, metric, **options))
        return asdict(estimate(values)) if values else None

    def gain(self, policy: str, over: str, task: str, metric: str, **options: Any) -> Number:
        """Mean difference over the prompts both policies have."""
        mine = self._narrowed(policy, task, metric, **options)
        theirs = self._narrowed(over, task, metric, **options)
        if policy == over or not by_prompt(mine).keys() & by_prompt(theirs).keys():
            return None
        return asdict(gain([*mine, *theirs], policy, over))

    def means(
        self, policy: str, task: str, only: str | None = None, but: Collection[str] = ()
    ) -> dict[str, float]:
        """Mean headline score of every held-out prompt, of one category or all but some."""
        rows = self._narrowed(policy, task, HEADLINE, category=only)
        values = by_prompt(row for row in rows if row["category"] not in but)
        return {prompt: statistics.fmean(found) for prompt, found in values.items()}

    def best(self, task: str) -> dict[str, float]:
        """Best of the base's pictures of every prompt it drew many of."""
        return {p: v[0] for p, v in best_of(self.rows(BEST_OF, task, HEADLINE)).items()}

    def _narrowed(
        self,
        policy: str,
        task: str,
        metric: str,
        category: str | None = None,
        knowledge: bool = False,
    ) -> list[Row]:
        rows = self.rows(policy, task, metric, knowledge=knowledge)
        return [row for row in rows if category is None or row["category"] == category]


def read_run(folder: Path) -> RunConfig:
    """The resolved configuration of the run in a folder."""
    return parse(RunConfig, Run.open(folder).config(), where=str(folder / "config.yaml"))


def write_summary(folder: Path) -> dict[str, Any]:
    """Compute the numbers of a run and write them to `summary.json`, whole or not at all."""
    config = read_run(folder)
    summary = summarise(config, folder, all_scores(config, folder))
    write_json(folder / "summary.json", summary)
    return summary


def headline(config: RunConfig) -> str:
    """What the judges' scores are called."""
    names = set(headlines(config).values())
    return names.pop() if len(names) == 1 else "score"


def headlines(config: RunConfig) -> dict[str, str]:
    """What the scores of each task's judge are called."""
    return {
        task: HEADLINE if judge.kind == "oracle" else getattr(judge, "dimension", "score")
        for task, judge in config.judges.items()
        if task in config.tasks(BASE)
    }


def summarise(config: RunConfig, folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What `summary.json` holds: every measured number has `mean`, `low`, `high`, `num_prompts`."""
    cells = Cells(rows, knowledge_ids(config))
    policies = [
        _policy(config, name) for name in (*config.bases, *config.policies()) if name != BEST_OF
    ]
    results = [
        _result(cells, policy["policy"], task) for policy in policies for task in policy["tasks"]
    ]
    summary: dict[str, Any] = {
        "format": 1,
        "name": config.name,
        "evidence": config.evidence,
        "headline": headline(config),
        "headlines": headlines(config),
        "judges": {t: judge.kind for t, judge in config.judges.items() if t in config.tasks(BASE)},
        "oracle_stages": [
            name
            for name, stage in config.stages.items()
            if any(reward.kind == "oracle" for reward in stage.rewards.values())
        ],
        "best_of": config.evaluation.best_of,
        "policies": policies,
        "results": results,
        "headroom": [_headroom(cells, task) for task in config.tasks(BASE)],
        "distillation": list(_distillation(config, cells)),
        "folding": [
            {"student": name, **part}
            for name in config.stages
            for part in folded(folder / "stages" / name)
        ],
        "metrics": list(_secondary(cells, results)),
        "categories": list(_by_category(cells, results)),
        "knowledge": list(_knowledge(config, cells, results)),
        "cost": [_cost(config, folder, cells, name) for name in config.stages],
    }
    return summary | caveats(config, summary)


def knowledge_ids(config: RunConfig) -> frozenset[str]:
    """The prompts that show what no reward asks for."""
    path = config.evaluation.knowledge
    return (
        frozenset()
        if path is None
        else frozenset(entry.id for entry in read_prompts(located(path)).entries)
    )


def teachers(config: RunConfig, student: str) -> dict[str, str]:
    """Teacher of each label of a policy that was distilled; one from elsewhere keeps its path."""
    found = teachers_of(config.stages[student]) if student in config.stages else {}
    return {task: teacher.path.removeprefix(STAGE) for task, teacher in found.items()}


def ratio(top: Sequence[float], bottom: Sequence[float], resamples: int = 4000) -> Estimate | None:
    """Ratio of two means over the same prompts, with the percentile interval over prompts.

    None where the 95 % interval of the lower mean reaches 0: a share of nothing has no size.

    >>> ratio([0.9, 1.8, 2.7], [1.0, 2.0, 3.0])
    Estimate(mean=0.9, low=0.9, high=0.9, num_prompts=3)
    """
    if not bottom:
        return None
    above, below = np.array(top, dtype=float), np.array(bottom, dtype=float)
    picks = np.random.default_rng(0).integers(len(below), size=(resamples, len(below)))
    divisors = below[picks].mean(axis=1)
    if np.quantile(divisors, 0.025) <= 0:
        return None
    # Divisors below 0 are rarer than 1 in 40 here; as infinite shares they widen the interval.
    shares = np.full(resamples, np.inf)
    np.divide(above[picks].mean(axis=1), divisors, out=shares, where=divisors > 0)
    low, high = np.quantile(shares, [0.025, 0.975], method="nearest").round(12)
    mean = round(float(above.mean() / below.mean()), 12)
    return Estimate(mean, float(low), float(high), len(below))


def _policy(config: RunConfig, name: str) -> dict[str, Any]:
    taught = {teacher for stage in config.stages for teacher in teachers(config, stage).values()}
    role = "merge" if name in config.merges else "base"
    if name in config.stages:
        is_student = isinstance(config.stages[name].algorithm, DistillConfig)
        role = "student" if is_student else "teacher" if name in taught else "stage"
    scale = config.deployed(name).scale
    return {
        "policy": name,
        "role": role,
        "tasks": list(config.tasks(name)),
        "guidance_scale": scale,
        # Guidance asks the network twice, with the prompt and without.
        "evaluations_per_step": 1 if scale == 1 else 2,
    }


def _result(cells: Cells, policy: str, task: str) -> dict[str, Any]:
    """Headline numbers of one policy on one task, held-out prompts only."""
    pictures, failed = (cells.rows(policy, task, metric) for metric in (HEADLINE, "failed"))
    total = len(pictures) + len(failed)
    return {
        "policy": policy,
        "task": task,
        "score": cells.score(policy, task, HEADLINE),
        "gain": cells.gain(policy, BASE, task, HEADLINE),
        "share_of_best": _share_of_best(cells, policy, task),
        "num_pictures": len(pictures),
        "num_failed": len(failed),
        "is_valid": len(pictures) >= MIN_COVERAGE * total if total else None,
    }


def _share_of_best(cells: Cells, policy: str, task: str) -> Number:
    """Gain as a share of the way from the base's mean to its best picture, on the same prompts."""
    mine, base, best = cells.means(policy, task), cells.means(BASE, task), cells.best(task)
    # The mean of the many pictures is the same quantity as the base's own, with less noise.
    many = cells.means(BEST_OF, task)
    shared = sorted(mine.keys() & base.keys() & best.keys()) if policy != BASE else []
    found = ratio([mine[p] - base[p] for p in shared], [best[p] - many[p] for p in shared])
    return asdict(found) if found else None


def _headroom(cells: Cells, task: str) -> dict[str, Any]:
    best, many = cells.best(task), cells.means(BEST_OF, task)
    sets = {"mean": many, "best": best, "distance": {p: best[p] - many[p] for p in best}}
    values = {name: list(found.values()) for name, found in sets.items()}
    return {"task": task} | {k: asdict(estimate(v)) if v else None for k, v in values.items()}


def _distillation(config: RunConfig, cells: Cells) -> Iterator[dict[str, Any]]:
    """What every student keeps of the gain of each of its teachers, on the prompts it is asked."""
    for student in config.stages:
        taught = teachers(config, student)
        for label, teacher in taught.items():
            task, slash, category = label.partition("/")
            # Who teaches a task without its category teaches what no other one of it does.
            own = {other.partition("/")[2] for other in taught if other.startswith(f"{task}/")}
            of = (category, ()) if slash else (None, own)
            mine, theirs, base = (cells.means(p, task, *of) for p in (student, teacher, BASE))
            shared = sorted(mine.keys() & theirs.keys() & base.keys())
            found = ratio(
                [mine[p] - base[p] for p in shared], [theirs[p] - base[p] for p in shared]
            )
            reason = "" if found else "the teacher has no gain that is clear of zero"
            yield {
                "student": student,
                "teacher": teacher,
                "label": label,
                "task": task,
                "kept": asdict(found) if found else None,
                "reason": reason if shared else "student, teacher and base are not all measured",
            }


def _compared(cells: Cells, result: Row, metric: str, **options: Any) -> dict[str, Any]:
    """One metric of the policy and task of a result, and its gain over the base."""
    policy, task = result["policy"], result["task"]
    return {
        "policy": policy,
        "task": task,
        "metric": metric,
        "score": cells.score(policy, task, metric, **options),
        "gain": cells.gain(policy, BASE, task, metric, **options),
    }


def _secondary(cells: Cells, results: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Every metric but the headline, on held-out prompts."""
    for result in results:
        for metric in cells.metrics(result["policy"], result["task"]):
            if metric not in (HEADLINE, "failed"):
                yield _compared(cells, result, metric)


def _by_category(cells: Cells, results: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for result in results:
        rows = cells.rows(result["policy"], result["task"], HEADLINE)
        for category in dict.fromkeys(row["category"] for row in rows):
            yield {"category": category, **_compared(cells, result, HEADLINE, category=category)}


def _knowledge(config: RunConfig, cells: Cells, results: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """What is left of what no reward asks for (`is_apart`), or else what the judge says of pictures
    of the knowledge prompts; `points` of 100 are the difference to the base."""
    for result in results:
        policy, task = result["policy"], result["task"]
        told = [m for m in KNOWLEDGE if cells.rows(policy, task, m, knowledge=True)]
        for metric in told or [HEADLINE]:
            if cells.rows(policy, task, metric, knowledge=True):
                found = _compared(cells, result, metric, knowledge=True)
                size = 100.0 if told else points(config, task)
                name = metric if told else headlines(config)[task]
                change = _scaled(found["gain"], size)
                yield {**found, "metric": name, "points": change, "is_apart": bool(told)}


def points(config: RunConfig, task: str) -> float:
    """Points of 100, of the way from a judge's worst score to its best, in one of its score."""
    return 100.0 / config.judges[cast(Task, task)].span


def _cost(config: RunConfig, folder: Path, cells: Cells, name: str) -> dict[str, Any]:
    """What one stage cost, and what it gained for that over where it started, in points of 100."""
    stage, cost = config.stages[name], spent(config, folder, name)
    total = cost["minutes"]["total"]
    # Those that chose the prompts were drawn and scored as well.
    images = cost["images"] and cost["images"] + cost["curated"]
    gains = {
        task: _scaled(cells.gain(name, stage.start, task, HEADLINE), points(config, task))
        for task in stage.prompts.tasks
    }
    return {
        "stage": name,
        "algorithm": stage.algorithm.kind,
        "planned_steps": stage.steps,
        "is_complete": is_complete(folder, f"train/{name}"),
        **cost,
        "over": stage.start,
        "rates": [
            {
                "task": task,
                "gain": change,
                "per_1000_images": _scaled(change, 1000 / images) if images else None,
                "per_minute": _scaled(change, 1 / total) if total else None,
            }
            for task, change in gains.items()
        ],
    }


def _scaled(number: Number, factor: float) -> Number:
    return number and {k: v if k == "num_prompts" else v * factor for k, v in number.items()}
