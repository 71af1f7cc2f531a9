"""The table of a study as it is read, in Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.evaluation import HEADLINE
from burnish.html import plain
from burnish.studies.curves import told
from burnish.tables import shown


def markdown(found: Mapping[str, Any]) -> str:
    """The table of a study for readers."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        f"# {found['question'] or found['name']}",
        "",
        *([f"Claim: {found['claim']}", ""] if found["claim"] else []),
        f"Command: `{found['command']}`; seeds {seeds}. Brackets are 95 % intervals over prompts of"
        " the mean over seeds, differences paired by prompt; the gain of each seed is beside them.",
    ]
    lines += _gains("Results", found["results"], "metric")
    lines += _gains(f"By category, {HEADLINE}", found["categories"], "category")
    lines += _section(
        "Compared",
        "| arm | over | task | metric | difference | share of its gain |",
        [_comparison(row) for row in found["comparisons"]],
    )
    lines += _section(
        "Network evaluations until the first arm's held-out score is reached",
        "| arm | share of the first arm's | best look | last look |",
        [
            f"| {arm} | {told(own['share'])} | {max(own['held_out']):.3f} | "
            f"{own['held_out'][-1]:.3f} |"
            for arm, own in found["budgets"].items()
        ],
    )
    lines += _gains("What no reward asks for", found["knowledge"], "metric")
    lines += _section(
        "Folded in, on fixed states, mean over seeds",
        "| arm | teacher of | noise | guidance | learning | gap left | learning in the way |",
        [
            f"| {row['arm']} | {row['label']} | {row['band']} | {row['guidance']:.1%} | "
            f"{row['learnt']:.1%} | {row['gap']:.1%} | {row['of_the_way']:.1%} |"
            for row in found["folding"]
        ],
    )
    lines += _section(
        "While training, mean over seeds",
        "| arm | after steps | reward | held-out score | seeds called hacked | advantage from |",
        [_part(row) for row in found["course"]],
    )
    lines += _section(
        "Cost, mean over seeds",
        "| arm | pictures | to choose prompts | network evaluations | minutes of training | points "
        "gained a 1,000 pictures | a minute of training |",
        [
            f"| {arm} | {plain(cost['images'], 0)} | {plain(cost['curated'], 0)} | "
            f"{plain(cost['evaluations'], 0)} | {plain(cost['minutes'], 1)} | "
            f"{_rate(found, arm, 1000.0, cost['images'], cost['curated'])} | "
            f"{_rate(found, arm, 1.0, cost['minutes'])} |"
            for arm, cost in found["cost"].items()
        ],
    )
    return "\n".join(lines) + "\n"


def _rate(found: Mapping[str, Any], arm: str, per: float, *spent: float | None) -> str:
    """Points of 100 of the headline score, mean over tasks, for so much of what was spent."""
    rows = [r for r in found["results"] if (r["arm"], r["metric"]) == (arm, HEADLINE)]
    gains = [found["points"][row["task"]] * row["gain"]["mean"] for row in rows if row["gain"]]
    total = sum(n or 0.0 for n in spent)
    if None in spent or not gains or not total:
        return "missing"
    return plain(statistics.fmean(gains) * per / total, 2, "+")


def _part(row: Mapping[str, Any]) -> str:
    """One span of an arm's training."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
    reward, held_out = ("" if v is None else f"{v:.3f}" for v in (row["reward"], row["held_out"]))
    hacked = "" if row["held_out"] is None else str(row["hacked"])
    return f"| {row['arm']} | {row['step']} | {reward} | {held_out} | {hacked} | {shares} |"


def _comparison(row: Mapping[str, Any]) -> str:
    of = f"{row['task']} {', '.join(row['categories'])}" if row["categories"] else row["task"]
    share = "" if row["share"] is None else f"{shown(row['share'], digits=0, scale=100.0)} %"
    cells = (
        row["arm"],
        row["over"],
        of,
        row["metric"],
        shown(row["difference"], signed=True),
        share,
    )
    return f"| {' | '.join(cells)} |"


def _gains(title: str, rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Scores and gains; `key` is what tells rows of one arm and task apart."""
    head = f"| arm | task | {key} | score | gain over base | of each seed | over the first arm |"
    return _section(title, head, [_line(row, (row["arm"], row["task"], row[key])) for row in rows])


def _section(title: str, head: str, lines: Sequence[str]) -> list[str]:
    rule = "|" + "---|" * (head.count("|") - 1)
    return ["", f"## {title}", "", head, rule, *lines] if lines else []


def _line(row: Mapping[str, Any], names: Sequence[str]) -> str:
    score = "missing" if row["score"] is None else f"{row['score']['mean']:.3f}"
    if not row["is_valid"]:
        score = f"{score} invalid, {row['failed']} failed"
    each = ", ".join("none" if g is None else f"{g:+.3f}" for g in row["gain_of_each_seed"])
    over = "" if row["over_first_arm"] is None else shown(row["over_first_arm"], signed=True)
    cells = (*names, score, shown(row["gain"], signed=True), each, over)
    return f"| {' | '.join(cells)} |"
