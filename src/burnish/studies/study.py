"""A study: the stages of one recipe are arms, run with several seeds and compared.

A study folder has a run folder for each seed, `seed-0` and so on, and what is computed from them:

    scores.jsonl   every score of every arm, so that anybody can compute the table again
    course.jsonl   reward, held-out score and shares of the advantage of every arm as it trained
    study.json     the table
    study.md       the table as it is read
    study.html     the same with curves and pictures, in one file

Prompts are the unit of every interval: a prompt's value is the mean over seeds of what it gained in
each. How far seeds differ is shown beside it, one number for each, because three of them make no
interval.
"""

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish.config import ConfigError, located
from burnish.evaluation import HEADLINE, Row, by_prompt, differences, estimate
from burnish.fixed_states import folded
from burnish.prompts import read_prompts
from burnish.run_config import BASE, ComparisonConfig, RunConfig
from burnish.run_folder import DONE, all_scores, is_complete, mark_complete, spent
from burnish.significance import MIN_COVERAGE
from burnish.studies.courses import course, mean_course
from burnish.studies.curves import budgets
from burnish.studies.page import write_study_page
from burnish.studies.table import markdown
from burnish.summary import (
    KNOWLEDGE,
    Number,
    knowledge_ids,
    points,
    ratio,
    read_run,
)
from burnish.tracking import write_atomic, write_json, write_rows
from burnish.wording import nearest


def seed_folder(folder: Path, seed: int) -> Path:
    """The run folder of one seed."""
    return folder / f"seed-{seed}"


def of_seed(config: RunConfig, seed: int) -> RunConfig:
    """The run of one seed: what is asked, claimed and known of the recipe, and which other seeds
    there are, is not part of it, so that all of it can change without running it again. Nor are
    benches and arena, which the table does not read: `burnish run` takes them with the same run."""
    plain = {"study": None, "evidence": "untested", "benches": {}, "arena": None}
    return config.model_copy(update={"seed": seed, **plain})


def check_comparisons(config: RunConfig) -> None:
    """Look, before anything runs, whether there are prompts for every comparison of a study.

    Raises:
        ConfigError: categories that no measured prompt has.
    """
    found = sorted({p.category for p in read_prompts(located(config.evaluation.prompts)).entries})
    for pair in config.study.compare if config.study else ():
        for wanted in pair.categories or ():
            if wanted not in found:
                raise ConfigError(
                    f"study.compare: need categories of the measured prompts ({', '.join(found)}), "
                    f"got {wanted!r}; did you mean {nearest(wanted, found) or found[0]!r}?"
                )


def share_base(folder: Path, seeds: Sequence[int], seed: int) -> None:
    """Give the run of a seed the measurements of the base, which does not depend on it.

    Args:
        folder: of the study.
        seeds: in the order in which they are run.
        seed: whose run folder exists.
    """
    here, job = seed_folder(folder, seed), f"measure/{BASE}"
    for other in (seed_folder(folder, n) for n in seeds[: list(seeds).index(seed)]):
        if is_complete(other, job) and not is_complete(here, job):
            for name in read_run(here).bases:
                source, target = (run / "evaluation" / name for run in (other, here))
                ignored = shutil.ignore_patterns(DONE)
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
            # Last: it says that the rest is whole.
            mark_complete(here, job)


def write_study(config: RunConfig, folder: Path, command: str) -> dict[str, Any]:
    """Compute the table of a study from its complete runs, and write it down.

    Args:
        config: with its seeds; runs of other seeds have no say.
        folder: of the study.
        command: that makes it again.

    Raises:
        ConfigError: no study, no run is complete, or one has other settings.
    """
    if config.study is None:
        raise ConfigError(f"need a recipe with `study:`, got {config.name}")
    runs = {seed: seed_folder(folder, seed) for seed in config.study.seeds}
    needed = of_seed(config, 0).jobs()
    done = [s for s, p in runs.items() if all(is_complete(p, job) for job in needed)]
    if not done:
        raise ConfigError(f"need a complete run in {folder}, got none; run the study to its end")
    for seed in done:
        if of_seed(read_run(runs[seed]), seed) != of_seed(config, seed):
            raise ConfigError(
                f"need runs of these settings, got others in {runs[seed]}; choose another folder"
            )
    rows = [row | {"run": s} for s in done for row in all_scores(config, runs[s])]
    folders = [runs[s] for s in done]
    trained = list(course(config, {s: runs[s] for s in done}))
    found = {
        "name": config.name,
        "question": config.study.question,
        "claim": config.study.claim,
        "command": command,
        "seeds": done,
        **tabulate(config, rows),
        "folding": [row for arm in config.stages for row in _folding(folders, arm)],
        "points": {task: points(config, task) for task in config.tasks(BASE)},
        "cost": {arm: _cost(config, folders, arm) for arm in config.stages},
        "budgets": budgets(config, folders),
        "course": mean_course(trained),
    }
    write_json(folder / "study.json", found)
    write_atomic(folder / "scores.jsonl", "".join(raw_rows(config, rows)))
    write_rows(folder / "course.jsonl", trained)
    write_atomic(folder / "study.md", markdown(found))
    write_study_page(config, found, folders, folder)
    return found


def tabulate(config: RunConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Scores and differences of all arms as plain data.

    Args:
        config: whose stages are the arms.
        rows: scores of all runs; `run` is the seed.
    """
    known = knowledge_ids(config)
    held_out = [row for row in rows if row["prompt"] not in known]
    remembered = [row for row in rows if row["prompt"] in known]
    return {
        "arms": list(config.policies()),
        "results": list(_results(config, held_out)),
        "knowledge": [r for r in _results(config, remembered) if r["metric"] in KNOWLEDGE],
        "comparisons": [
            row
            for pair in config.study.compare
            for row in _compared(config, pair, held_out, remembered)
        ]
        if config.study
        else [],
        "categories": [
            {**row, "category": category}
            for category in sorted({row["category"] for row in held_out})
            for row in _results(config, [r for r in held_out if r["category"] == category])
            if row["metric"] == HEADLINE
        ],
    }


def _results(config: RunConfig, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """One entry for each arm, task and metric, the headline first; it is there without scores."""
    first = config.policies()[0]
    for arm in config.policies():
        for task in config.tasks(arm):
            own = [row for row in rows if row["task"] == task]
            found = [row["metric"] for row in own if row["policy"] == arm]
            failed = found.count("failed")
            total = found.count(HEADLINE) + failed
            for metric in dict.fromkeys([HEADLINE, *found]):
                if metric != "failed":
                    yield {
                        "arm": arm,
                        "task": task,
                        "metric": metric,
                        "failed": failed,
                        "is_valid": total > 0 and found.count(HEADLINE) >= MIN_COVERAGE * total,
                        **_effect(own, arm, None if arm == first else first, metric),
                    }


def _effect(rows: Sequence[Row], arm: str, control: str | None, metric: str) -> dict[str, Any]:
    """Score of an arm, its difference to the base, and to the first arm if that is another one."""
    runs = _runs(rows)
    own = {n: [row for row in rows if row["run"] == n and row["metric"] == metric] for n in runs}
    gains = [differences(own[n], arm, BASE) for n in runs]
    return {
        "score": _number([by_prompt(own[n], policy=arm) for n in runs]),
        "gain": _number(gains),
        "gain_of_each_seed": [
            statistics.fmean(v for values in gain.values() for v in values) if gain else None
            for gain in gains
        ],
        "over_first_arm": control and _number([differences(own[n], arm, control) for n in runs]),
    }


def _compared(
    config: RunConfig, pair: ComparisonConfig, held_out: Sequence[Row], remembered: Sequence[Row]
) -> Iterator[dict[str, Any]]:
    """Two arms on every task that both have: the headline with its share, then what no reward asks
    for, on all prompts of that."""
    wanted = pair.categories
    asked = [row for row in held_out if wanted is None or row["category"] in wanted]
    for task in config.tasks(pair.arm):
        for rows, metric in ((asked, HEADLINE), *((remembered, name) for name in KNOWLEDGE)):
            own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
            runs = [[row for row in own if row["run"] == n] for n in _runs(own)]
            found = _number([differences(run, pair.arm, pair.over) for run in runs])
            if found is not None:
                gains = [
                    _joined([differences(run, arm, BASE) for run in runs])
                    for arm in (pair.arm, pair.over)
                ]
                shared = sorted(gains[0].keys() & gains[1].keys())
                mine, theirs = ([statistics.fmean(gain[p]) for p in shared] for gain in gains)
                share = ratio(mine, theirs) if metric == HEADLINE else None
                yield {
                    "arm": pair.arm,
                    "over": pair.over,
                    "task": task,
                    "categories": list(wanted) if wanted and metric == HEADLINE else None,
                    "metric": metric,
                    "difference": found,
                    "share": asdict(share) if share else None,
                }


def _runs(rows: Sequence[Row]) -> list[int]:
    return sorted({row["run"] for row in rows})


def _number(runs: Sequence[Mapping[str, Sequence[float]]]) -> Number:
    """Mean over prompts of what they have in all runs; None if there is nothing."""
    values = _joined(runs)
    return asdict(estimate(values)) if values else None


def _joined(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """What every prompt has in each run that has it."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for prompt, found in run.items():
            values.setdefault(prompt, []).append(statistics.fmean(found))
    return values


def _folding(runs: Sequence[Path], arm: str) -> Iterator[dict[str, Any]]:
    """What a student has taken in of each teacher, by band of noise: means over seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for part in folded(run / "stages" / arm):
            found.setdefault((part["label"], part["band"]), []).append(part)
    for (label, band), parts in found.items():
        shares = {
            "guidance": [part["guidance"] for part in parts],
            "learnt": [part["learnt"] for part in parts],
            "gap": [part["gap"] / part["way"] for part in parts],
            "of_the_way": [part["learnt_part"] / part["way"] for part in parts],
        }
        means = {name: statistics.fmean(values) for name, values in shares.items()}
        yield {"arm": arm, "label": label, "band": band, **means}


def _cost(config: RunConfig, runs: Sequence[Path], arm: str) -> dict[str, float | None]:
    """Means over seeds: pictures drawn in training and to choose prompts, network evaluations of
    the training, and minutes of one process."""
    own = [spent(config, run, arm) for run in runs]

    def mean(values: Sequence[int | float | None]) -> float | None:
        return statistics.fmean(v for v in values if v is not None) if None not in values else None

    names = ("images", "curated", "evaluations")
    minutes = mean([found["minutes"]["total"] for found in own])
    return {name: mean([found[name] for found in own]) for name in names} | {"minutes": minutes}


def raw_rows(config: RunConfig, rows: Sequence[Row]) -> Iterator[str]:
    """A line for every score; `seed` is that of the run, `picture` that of the measured picture."""
    for row in rows:
        own = {
            "study": config.name,
            "arm": row["policy"],
            "seed": row["run"],
            "picture": row["seed"],
            "prompt": row["prompt"],
            "task": row["task"],
            "category": row["category"],
            "metric": row["metric"],
            "value": row["value"],
        }
        yield json.dumps(own | ({"reason": row["reason"]} if "reason" in row else {})) + "\n"
