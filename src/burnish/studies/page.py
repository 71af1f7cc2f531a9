"""The page of a study: its table, what each arm spent, its curves, and pictures of all arms."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish import html
from burnish.config import dump_yaml
from burnish.evaluation import HEADLINE
from burnish.pages.charts import Line, chart
from burnish.pages.galleries import TASKS, with_galleries
from burnish.run_config import BASE, RunConfig
from burnish.studies.curves import told
from burnish.summary import Number
from burnish.tracking import read_rows, write_atomic

_PICTURES = (4, 2, 1)  # Prompts of each category, the first number whose page is small enough.
_CURVES = {
    "reward/mean": "mean training reward",
    "policy/clipped": "share of clipped ratios",
    "policy/grad_norm": "norm of the gradient",
}
"""Metrics that are drawn for all arms that log them, in the words of the page."""


def write_study_page(
    config: RunConfig, found: Mapping[str, Any], runs: Sequence[Path], folder: Path
) -> Path:
    """Write `study.html`; returns it.

    Args:
        config: of the study.
        found: as `studies.write_study` computed it.
        runs: complete run folders, one for each seed; the first shows its pictures.
        folder: of the study.
    """
    template = html.template("study.html.j2")
    colours = {BASE: "base", **html.colours(config.policies())}
    context = {
        "found": found,
        "headline": HEADLINE,
        "panels": [_panel(found, task) for task in _tasks(found)],
        "others": [row for row in found["results"] if row["metric"] != HEADLINE],
        "charts": [*_budget_chart(found, colours), *_charts(config, runs, colours)],
        "columns": colours,
        "tasks": TASKS,
        "told": told,
        "base": BASE,
        "config": dump_yaml(config),
    }
    text = with_galleries(template, context, config, runs[0], _PICTURES)
    path = folder / "study.html"
    write_atomic(path, text)
    return path


def _tasks(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in found["results"]))


def _panel(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The gains of one task with the places of their interval marks."""
    rows = [r for r in found["results"] if (r["task"], r["metric"]) == (task, HEADLINE)]
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    step = 0.02
    low = math.floor(min([0.0, *(gain["low"] for gain in gains)]) / step - 0.1) * step
    high = math.ceil(max([0.0, *(gain["high"] for gain in gains)]) / step + 0.1) * step

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    def places(number: Number) -> dict[str, float] | None:
        return number and {end: place(number[end]) for end in ("low", "mean", "high")}

    return {
        "name": TASKS[task],
        "rows": [{**row, "place": places(row["gain"])} for row in rows],
        "zero": place(0.0),
        "axis": (low, high),
    }


def _budget_chart(found: Mapping[str, Any], colours: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Held-out score over network evaluations, if guards looked."""
    lines: list[Line] = [
        {
            "label": arm,
            "colour": colours[arm],
            "points": list(zip(own["evaluations"], own["held_out"], strict=True)),
        }
        for arm, own in found["budgets"].items()
    ]
    if lines:
        last = max(line["points"][-1][0] for line in lines)
        end = f"{last / 1000:,.0f} thousand network evaluations"
        yield chart("held out", "score at each look of the guard", lines, last=last, end=end)


def _charts(
    config: RunConfig, runs: Sequence[Path], colours: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Curves of training, all arms in one, means over seeds."""
    logged = {
        arm: [read_rows(run / "stages" / arm / "metrics.jsonl") for run in runs]
        for arm in config.stages
    }
    shares = {
        key: f"share of the advantage: {key.removeprefix('advantage/share_')}"
        for rows in logged.values()
        for row in rows[0][:1]
        for key in row
        if key.startswith("advantage/share_")
    }
    last = max(stage.steps for stage in config.stages.values()) - 1
    for metric, words in (_CURVES | shares).items():
        lines: list[Line] = [
            {"label": arm, "colour": colours[arm], "points": points}
            for arm, rows in logged.items()
            if (points := _mean_of_seeds(rows, metric))
        ]
        if lines:
            yield chart("training", words, lines, last=float(last), end=f"{last + 1} steps")


def _mean_of_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> list[Any]:
    """(step, mean over the seeds that have it)."""
    values: dict[int, list[float]] = {}
    for rows in runs:
        for row in rows:
            if row.get(metric) is not None:
                values.setdefault(row["step"], []).append(row[metric])
    return [(float(step), statistics.fmean(own)) for step, own in sorted(values.items())]
