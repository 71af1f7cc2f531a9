"""The tables that a run prints at its end, and numbers as readers see them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from burnish.run_config import BASE, UNGUIDED
from burnish.summary import Number


def shown(number: Number, *, signed: bool = False, digits: int = 3, scale: float = 1.0) -> str:
    """A number with its interval for readers, e.g. `+0.120 [0.101, 0.139]`."""
    if number is None:
        return "missing"
    mean, low, high = (f"{scale * number[key]:.{digits}f}" for key in ("mean", "low", "high"))
    mean = "+" * (signed and number["mean"] >= 0) + mean
    return f"{mean} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")


def table(summary: Mapping[str, Any]) -> Table:
    """What a run prints at its end: scores, and gains and shares with their intervals."""
    title = f"{summary['name']}: {summary['headline']} on {summary['prompts']}, 95 % intervals"
    best = f"% to best-{summary['best_of']}"
    found = _table(title, ("policy",), ("NFE", "score", "gain over base", best, "% of teacher"))
    policies = {policy["policy"]: policy for policy in summary["policies"]}
    kept = {(k["student"], k["label"]): k["kept"] for k in summary["distillation"]}
    for task in policies[BASE]["tasks"]:
        found.add_section()
        found.add_row(Text(task, style="bold"))
        for result in (one for one in summary["results"] if one["task"] == task):
            name, score = result["policy"], result["score"]
            is_base, is_student = name in (BASE, UNGUIDED), (name, task) in kept
            mean = "missing" if score is None else f"{score['mean']:.3f}"
            found.add_row(
                Text(name),
                str(policies[name]["evaluations_per_step"]),
                f"{mean} invalid" if result["is_valid"] is False else mean,
                "" if name == BASE else shown(result["gain"], signed=True),
                "" if is_base else shown(result["share_of_best"], digits=0, scale=100.0),
                shown(kept[name, task], digits=0, scale=100.0) if is_student else "",
            )
    for metric in dict.fromkeys(row["metric"] for row in summary["knowledge"]):
        found.add_section()
        found.add_row(Text(f"{metric} kept", style="bold"))
        for row in (one for one in summary["knowledge"] if one["metric"] == metric):
            points = shown(row["points"], signed=True, digits=1) + " pt"
            mean = f"{row['score']['mean']:.3f}"
            found.add_row(Text(row["policy"]), "", mean, "" if row["policy"] == BASE else points)
    found.caption = "NFE: network evaluations per step; pt: points of 100"
    return found


def cost_table(summary: Mapping[str, Any]) -> Table:
    """What every stage cost, and its gain over its start per 1,000 pictures and per minute."""
    title = "Cost of the stages; gains in points of 100, 95 % intervals"
    numbers = ("images", "min", "per 1,000 images", "per minute")
    found = _table(title, ("stage", "method", "task"), numbers)
    for stage in summary["cost"]:
        name, method = Text(stage["stage"]), stage["algorithm"]
        images, minutes = stage["images"], stage["minutes"]["total"]
        drawn = "missing" if images is None else f"{images:,.0f}"
        if stage["curated"]:
            drawn += f" + {stage['curated']:,.0f}"
            found.caption = "+: images that chose the prompts"
        spent = "missing" if minutes is None else f"{minutes:.1f}"
        for rate in stage["rates"]:
            rates = (rate["per_1000_images"], rate["per_minute"])
            gains = (shown(one, digits=1) for one in rates)
            found.add_row(name, method, rate["task"], drawn, spent, *gains)
    return found


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    found = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for name in words:
        found.add_column(name, overflow="fold")
    for name in numbers:
        found.add_column(name, justify="right", no_wrap=True)
    return found
