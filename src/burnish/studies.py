"""A study: the stages of one recipe are arms, run with several seeds and compared on the oracle.

A study folder has a run folder for each seed, `seed-0` and so on, and what is computed from them:

    scores.jsonl   every score of every arm, so that anybody can compute the table again
    study.json     the table
    study.md       the table as it is read

Prompts are the unit of every interval: a prompt's value is its mean over pictures and seeds. How
far seeds differ is shown beside it, one number for each, because three of them make no interval.
"""

import json
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish.evaluation import Row, by_prompt, estimate
from burnish.stages import BASE, BASES, RunConfig, all_scores, is_complete
from burnish.summary import HEADLINE, KNOWLEDGE, Number, knowledge_ids, read_run, shown, summarise
from burnish.tracking import write_atomic, write_json, writing


def seed_folder(folder: Path, seed: int) -> Path:
    """The run folder of one seed."""
    return folder / f"seed-{seed}"


def share_base(folder: Path, seeds: Sequence[int], seed: int) -> None:
    """Give the run of a seed the measurements of the base, which does not depend on it.

    Args:
        folder: of the study.
        seeds: in the order in which they are run.
        seed: whose run folder exists.
    """
    here = seed_folder(folder, seed)
    for other in (seed_folder(folder, n) for n in seeds[: list(seeds).index(seed)]):
        if is_complete(other, f"measure/{BASE}") and not is_complete(here, f"measure/{BASE}"):
            # The marker that the job is complete stands in the first one.
            for name in reversed(BASES):
                shutil.copytree(
                    other / "evaluation" / name, here / "evaluation" / name, dirs_exist_ok=True
                )


def write_study(folder: Path, command: str) -> dict[str, Any]:
    """Compute the table of a study from its complete runs, and write it down.

    Args:
        folder: of the study.
        command: that makes it again.

    Raises:
        ValueError: no run is complete.
    """
    runs = {int(path.name.removeprefix("seed-")): path for path in sorted(folder.glob("seed-*"))}
    configs = {seed: read_run(path) for seed, path in runs.items()}
    done = [s for s, p in runs.items() if all(is_complete(p, job) for job in configs[s].jobs())]
    if not done:
        raise ValueError(f"need a complete run in {folder}, got none")
    config = configs[done[0]]
    rows = [row | {"run": s} for s in done for row in all_scores(configs[s], runs[s])]
    costs = [summarise(configs[s], runs[s], all_scores(configs[s], runs[s]))["cost"] for s in done]
    found = tabulate(config, rows, costs)
    found |= {"command": command, "seeds": done}
    with writing(folder / "study.json"):
        write_json(folder / "study.json", found)
        write_atomic(folder / "scores.jsonl", "".join(raw_rows(config, rows)))
        write_atomic(folder / "study.md", markdown(found))
    return found


def tabulate(
    config: RunConfig, rows: Sequence[Row], costs: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The table of a study as plain data.

    Args:
        config: of any of its runs.
        rows: scores of all runs; `run` is the seed.
        costs: of each run, as in its `summary.json`.
    """
    known = knowledge_ids(config)
    held_out = [row for row in rows if row["prompt"] not in known]
    arms = list(config.stages)
    results = []
    for arm in arms:
        for task in config.tasks(arm):
            of_task = [row for row in held_out if row["task"] == task]
            metrics = dict.fromkeys(r["metric"] for r in of_task if r["policy"] == arm)
            results += [
                {
                    "arm": arm,
                    "task": task,
                    "metric": metric,
                    **_effect(of_task, arm, arms[0], metric),
                }
                for metric in sorted(metrics.keys() - {"failed"}, key=lambda m: m != HEADLINE)
            ]
    remembered = [row for row in rows if row["prompt"] in known]
    return {
        "name": config.name,
        "question": config.study.question if config.study else "",
        "claim": config.study.claim if config.study else "",
        "arms": arms,
        "results": results,
        "knowledge": [
            {"arm": arm, "metric": metric, **_effect(remembered, arm, arms[0], metric)}
            for arm in arms
            for metric in KNOWLEDGE
            if any(r["policy"] == arm and r["metric"] == metric for r in remembered)
        ],
        "cost": {arm: _mean_cost(costs, arm) for arm in arms},
    }


def _effect(rows: Sequence[Row], arm: str, control: str, metric: str) -> dict[str, Any]:
    """Score of an arm, and its difference to the base and to the first arm."""
    mine = [row for row in rows if row["policy"] == arm and row["metric"] == metric]
    base = [row for row in rows if row["policy"] == BASE and row["metric"] == metric]
    first = [row for row in rows if row["policy"] == control and row["metric"] == metric]
    runs = sorted({row["run"] for row in mine})
    return {
        "score": _number(by_prompt(mine)),
        "gain": _number(_differences(mine, base)),
        "gain_of_each_seed": [
            statistics.fmean(
                v for d in _differences(_of(mine, n), _of(base, n)).values() for v in d
            )
            for n in runs
        ],
        "over_first_arm": None if arm == control else _number(_differences(mine, first)),
    }


def _of(rows: Sequence[Row], run: int) -> list[Row]:
    return [row for row in rows if row["run"] == run]


def _differences(mine: Sequence[Row], theirs: Sequence[Row]) -> dict[str, list[float]]:
    """Difference of two policies on every prompt that both have."""
    left, right = by_prompt(mine), by_prompt(theirs)
    return {
        prompt: [statistics.fmean(left[prompt]) - statistics.fmean(right[prompt])]
        for prompt in left
        if prompt in right
    }


def _number(values: Mapping[str, Sequence[float]]) -> Number:
    return asdict(estimate(values)) if values else None


def _mean_cost(costs: Sequence[Sequence[Mapping[str, Any]]], arm: str) -> dict[str, float]:
    """Pictures drawn, and minutes of one process, as means over seeds."""
    own = [stage for stages in costs for stage in stages if stage["stage"] == arm]
    return {
        "images": statistics.fmean(stage["images"] for stage in own),
        "minutes": statistics.fmean(stage["minutes"]["total"] for stage in own),
    }


def raw_rows(config: RunConfig, rows: Sequence[Row]) -> Iterator[str]:
    """A line for every score: study, arm, run, seed, prompt, task, category, metric, value."""
    for row in rows:
        own = {key: value for key, value in row.items() if key not in ("policy", "reason")}
        yield json.dumps({"study": config.name, "arm": row["policy"], **own}) + "\n"


def markdown(found: Mapping[str, Any]) -> str:
    """The table of a study for readers."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        f"# {found['question'] or found['name']}",
        "",
        *([f"Claim: {found['claim']}", ""] if found["claim"] else []),
        f"Command: `{found['command']}`; seeds {seeds}. Brackets are 95 % intervals over prompts of"
        " the mean over seeds, differences paired by prompt; the gain of each seed is beside them.",
        "",
        "| arm | task | metric | score | gain over base | of each seed | over the first arm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["results"]:
        lines.append(_line(row, (row["arm"], row["task"], row["metric"])))
    lines += _section(
        "What no reward asks for",
        "| arm | | metric | score | gain over base | of each seed | over the first arm |",
        [_line(row, (row["arm"], "", row["metric"])) for row in found["knowledge"]],
    )
    lines += _section(
        "Cost, mean over seeds",
        "| arm | pictures | minutes |",
        [
            f"| {arm} | {cost['images']:,.0f} | {cost['minutes']:.1f} |"
            for arm, cost in found["cost"].items()
        ],
    )
    return "\n".join(lines) + "\n"


def _section(title: str, head: str, lines: Sequence[str]) -> list[str]:
    rule = "|" + "---|" * (head.count("|") - 1)
    return ["", f"## {title}", "", head, rule, *lines] if lines else []


def _line(row: Mapping[str, Any], names: Sequence[str]) -> str:
    score = "missing" if row["score"] is None else f"{row['score']['mean']:.3f}"
    each = ", ".join(f"{gain:+.3f}" for gain in row["gain_of_each_seed"])
    over = "" if row["over_first_arm"] is None else shown(row["over_first_arm"], signed=True)
    cells = (*names, score, shown(row["gain"], signed=True), each, over)
    return f"| {' | '.join(cells)} |"
