"""The page of a run: one `report.html` that holds everything it shows and opens without a network.

The page is written from what the run folder holds, so it can be made of an unfinished run, and
says what is missing. Prompts, names and notes are other people's text: the template escapes all of
it, and the page forbids itself scripts and anything that would be fetched.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish import html
from burnish.config import dump_yaml
from burnish.fixed_states import FOLDER as FIXED_STATES
from burnish.guard import FOLDER as GUARD
from burnish.hacking import counts
from burnish.looks import LOOKS
from burnish.pages.arena import scale_of
from burnish.pages.bench import view
from burnish.pages.charts import Line, chart
from burnish.pages.galleries import TASKS, in_words, with_galleries
from burnish.run_config import BASE, UNGUIDED, RunConfig
from burnish.standings import arena_results, bench_results
from burnish.summary import Number, read_run, teachers, write_summary
from burnish.tracking import Run, read_rows, write_atomic

_PICTURES = (6, 4, 2, 1)  # Prompts of each category, the first number whose page is small enough.
_TAUGHT = ("student", "teacher", "merge", *(f"arm-{place}" for place in range(3, 10)))
"""Colours of several curves in one chart: of a student, one for each teacher."""
_COLUMNS = {
    "base": "base",
    "teacher": "teacher",
    "stage": "teacher",
    "student": "student",
    "merge": "merge",
}


def write_report(folder: Path) -> Path:
    """Write `report.html` of the run in a folder, and its `summary.json`; returns the page."""
    config, summary = read_run(folder), write_summary(folder)
    template = html.template("report.html.j2")
    command = f"burnish report {folder}"
    benches = bench_results(config, folder, command)
    arenas = arena_results(config, folder, command)
    context = {
        "summary": summary,
        "facts": _facts(folder),
        "lede": _lede(config, summary),
        "oracle": _oracle(summary),
        "stages": [_stage(config, name) for name in config.stages],
        "panels": [_panel(summary, task) for task in config.tasks(BASE)],
        "charts": [c for name in config.stages for c in _charts(config, folder, name)],
        "benches": {
            name: {"found": own, **view(own, folder, shown, sources)}
            for name, (own, shown, sources) in benches.items()
        },
        "arenas": {task: {"found": own, **scale_of(own)} for task, own in arenas.items()},
        "config": dump_yaml(config),
        "tasks": TASKS,
        "base": BASE,
        # In an arena that is older than the run's settings there may be one that has no say here.
        "columns": {UNGUIDED: "base"}
        | {policy["policy"]: _COLUMNS[policy["role"]] for policy in summary["policies"]},
    }
    text = with_galleries(template, context, config, folder, _PICTURES)
    path = folder / "report.html"
    write_atomic(path, text)
    return path


def _facts(folder: Path) -> dict[str, Any]:
    """What the run folder says of itself: command, versions, machine."""
    path = folder / "environment.json"
    run = {key: value for key, value in Run.open(folder).facts.items() if key != "format"}
    machine = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"run": run, "machine": machine}


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _lede(config: RunConfig, summary: Mapping[str, Any]) -> str:
    """What was trained from what, and how it was measured."""
    students = [name for name in config.stages if teachers(config, name)]
    trained = [name for name in config.stages if name not in students]
    parts = [f"This run starts from the model {config.policy.path}."]
    if trained:
        parts.append(f"Reinforcement learning turns it into {_and(trained)}.")
    for name in students:
        taught = list(dict.fromkeys(teachers(config, name).values()))
        is_cheap = config.folds_guidance(name)
        cost = ", which draws without guidance, so with half the network evaluations" * is_cheap
        parts.append(f"On-policy distillation folds {_and(taught)} into {name}{cost}.")
    for name, merge in config.merges.items():
        parts.append(f"{name} merges the weights of {_and(merge.of)} ({merge.method}).")
    counts = [
        f"{result['score']['num_prompts']} prompts ({TASKS[result['task']].lower()})"
        for result in summary["results"]
        if result["policy"] == BASE and result["score"]
    ]
    if counts:
        parts.append(
            f"Every policy draws the same {summary['prompts']} from the same seeds: "
            f"{_and(counts)}, {_pictures(config.evaluation.num_seeds)} each. Brackets: 95 % "
            "intervals over prompts."
        )
    return " ".join(parts)


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _oracle(summary: Mapping[str, Any]) -> str:
    """Who the truth of the embedded world is in this run: reward, judge, both, or nobody."""
    trained, judges = summary["oracle_stages"], summary["judges"]
    tasks = [task for task, kind in judges.items() if kind == "oracle"]
    names = [TASKS[task].lower() for task in tasks]
    of_some = f" of {_and(names)}" if 0 < len(tasks) < len(judges) else ""
    truth = "the truth of the embedded world itself, measured from pixels"
    if trained:
        also = (
            f" The same oracle is the judge of every number{of_some} on this page." if tasks else ""
        )
        return (
            f"The training reward of {_and(trained)} is the oracle: {truth}, and not a learned "
            f"reward model.{also} The numbers show how well the optimisation works; they say "
            "nothing of how a learned reward would hold up."
        )
    if not tasks:
        return ""
    return f"The judge{of_some} is the oracle: {truth}. No stage was trained on it."


def _stage(config: RunConfig, name: str) -> dict[str, Any]:
    stage = config.stages[name]
    rewards = [
        f"{key} ({kind})" if (kind := reward.kind) != key else key
        for key, reward in stage.rewards.items()
    ]
    taught = [
        f"{teacher} ({in_words(label).lower()})"
        for label, teacher in teachers(config, name).items()
    ]
    return {
        "name": name,
        "algorithm": stage.algorithm.kind,
        "steps": stage.steps,
        "start": stage.start,
        "tasks": _and([TASKS[task].lower() for task in stage.prompts.tasks]),
        "learns_from": f"taught by {_and(taught)}" if taught else f"rewarded by {_and(rewards)}",
    }


def _panel(summary: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The numbers of one task: tiles, and rows with the places of their interval marks."""
    results = [result for result in summary["results"] if result["task"] == task]
    headroom = next(space for space in summary["headroom"] if space["task"] == task)
    base = next((r["score"] for r in results if r["policy"] == BASE), None)
    best = _above(base, headroom["distance"])
    policies = {policy["policy"]: policy for policy in summary["policies"]}
    kept = {k["student"]: k for k in summary["distillation"] if k["label"] == task}
    measured = [n for n in [*(r["score"] for r in results), best] if n is not None]
    # An axis that ends on round numbers and leaves no mark on its edge.
    step = 0.05
    low = math.floor(min((n["low"] for n in measured), default=0.0) / step - 0.1) * step
    high = math.ceil(max((n["high"] for n in measured), default=1.0) / step + 0.1) * step

    def place(number: Number) -> dict[str, float] | None:
        if number is None:
            return None
        ends = ("low", "mean", "high")
        return {end: round(100 * (number[end] - low) / (high - low), 2) for end in ends}

    rows = [
        {**r, **policies[r["policy"]], "place": place(r["score"]), "kept": kept.get(r["policy"])}
        for r in results
    ]
    return {
        "task": task,
        "name": TASKS[task],
        "rows": rows,
        "headroom": headroom,
        "best": best,
        "best_place": place(best),
        "base_place": place(base),
        "axis": (low, high),
        "tiles": [row for row in rows if row["policy"] not in (BASE, UNGUIDED)],
    }


def _above(base: Number, distance: Number) -> Number:
    """What lies some way above the base. The best of many was drawn for some of the prompts, so
    that only its distance, paired by prompt, can stand beside the scores of all of them."""
    if base is None or distance is None:
        return None
    ends = {end: base["mean"] + distance[end] for end in ("mean", "low", "high")}
    return ends | {"num_prompts": distance["num_prompts"]}


def _charts(config: RunConfig, folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The curves of one stage: its reward, or how far the student is from its teachers."""
    rows = read_rows(folder / "stages" / name / "metrics.jsonl")
    stage = config.stages[name]
    last, end = float(stage.steps - 1), f"{stage.steps} steps"

    def series(label: str, colour: str, metric: str, **wanted: Any) -> Line:
        found = [row for row in rows if all(row.get(key) == v for key, v in wanted.items())]
        points = [
            (float(row["step"]), float(row[metric])) for row in found if row.get(metric) is not None
        ]
        return {"label": label, "colour": colour, "points": points}

    if taught := teachers(config, name):
        looks = read_rows(folder / "stages" / name / FIXED_STATES / LOOKS)
        lines = [
            {
                "label": in_words(label).lower(),
                "colour": colour,
                "points": [
                    (float(look["step"]), part["gap"] / part["way"])
                    for look in looks
                    for part in look["parts"]
                    if (part["label"], part["band"]) == (label, "all")
                ],
            }
            for label, colour in zip(taught, _TAUGHT, strict=False)
        ]
        if looks:
            words = "gap on fixed states, share of the way"
            yield chart(name, words, lines, last=float(stage.steps), end=end, has_zero=True)
        for metric, words in (
            ("distill/gap_share", "gap to the teacher, as a share of its velocity"),
            ("loss", "loss"),
        ):
            lines = [
                series(in_words(label).lower(), colour, metric, **{f"teacher/is_{label}": 1.0})
                for label, colour in zip(taught, _TAUGHT, strict=False)
            ]
            yield chart(name, words, lines, last=last, end=end, has_zero=True)
        return
    mean = series("mean", "teacher", "reward/mean")
    yield chart(name, "mean reward", [mean], last=last, end=end)
    if len(stage.rewards) > 1:
        for reward in stage.rewards:
            line = series(reward, "teacher", f"reward/{reward}")
            yield chart(name, f"reward: {reward}", [line], last=last, end=end)
    yield from _guard_charts(name, read_rows(folder / "stages" / name / GUARD / LOOKS), stage.steps)


def _guard_charts(
    name: str, looks: Sequence[Mapping[str, Any]], steps: int
) -> Iterator[dict[str, Any]]:
    """What the guard of a stage saw: held-out scores, what is still known, guidance absorbed."""

    def line(label: str, values: Sequence[float | None], place: int) -> Line:
        points = [
            (float(look["step"]), value)
            for look, value in zip(looks, values, strict=True)
            if value is not None
        ]
        return {"label": label, "colour": _TAUGHT[place % len(_TAUGHT)], "points": points}

    def several(key: str, first: int) -> list[Line]:
        names = dict.fromkeys(n for look in looks for n in look.get(key, {}))
        return [
            line(one, [look.get(key, {}).get(one) for look in looks], place)
            for place, one in enumerate(names, first)
        ]

    judge = line("judge", [look["held_out"] if counts(look) else None for look in looks], 0)
    absorbed = line("absorbed", [look["traits"]["absorbed_guidance"] for look in looks], 0)
    for words, lines in (
        ("held-out score, looks of the guard", [judge, *several("others", 1)]),
        ("what no reward asks for, looks of the guard", several("retention", 0)),
        ("guidance absorbed, looks of the guard", [absorbed]),
    ):
        if any(one["points"] for one in lines):
            yield chart(name, words, lines, last=float(steps), end=f"{steps} steps")
