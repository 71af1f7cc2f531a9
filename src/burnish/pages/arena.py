"""The page and the table of a leaderboard: ratings, win rates, categories, voters."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from burnish import html
from burnish.tracking import write_atomic


def leaderboard(found: Mapping[str, Any]) -> Table:
    """What the command prints."""
    table = Table(
        title=f"Elo, {found['anchor']} at {found['at']:.0f}; 95 % intervals over prompts",
        box=box.SIMPLE,
    )
    for name in ("model", "Elo", "interval", "votes", "score"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in found["board"]["rows"]:
        table.add_row(
            Text(row["model"]), f"{row['elo']:.0f}", bounds(row), str(row["votes"]),
            f"{row['score']:.3f}",
        )  # fmt: skip
    table.caption = (
        f"{found['votes']:,} votes on {found['prompts']} prompts by {len(found['voters'])} voters; "
        f"ties {found['ties']:.0%}, both bad {found['both_bad']:.0%}"
    )
    return table


def bounds(row: Mapping[str, Any]) -> str:
    """The interval of a rating, where there is one."""
    if row["is_anchor"]:
        return "anchor"
    return "none" if row["low"] is None else f"{row['low']:.0f} to {row['high']:.0f}"


def write_arena_page(found: Mapping[str, Any], path: Path, command: str) -> Path:
    """Write the page of a leaderboard; returns it.

    Args:
        found: as `burnish.arena.board.rate` returns it.
        path: of the page.
        command: that makes it again.
    """
    names = [row["model"] for row in found["board"]["rows"]]
    text = html.template("arena.html.j2").render(
        found=found,
        command=command,
        names=names,
        colours=html.colours(names),
        **scale_of(found),
        shade=shade,
        boards={name: own for name, own in found["categories"].items() if own["rows"]},
        refused={name: own for name, own in found["categories"].items() if not own["rows"]},
        radar=radar(found, names),
    )
    write_atomic(path, text)
    return path


def scale_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of a leaderboard needs to place its marks."""
    ends = axis(found)
    return {"axis": ends, "place": lambda value: place(value, ends), "bounds": bounds}


def axis(found: Mapping[str, Any]) -> tuple[float, float]:
    """Round ends of a scale that holds all ratings and intervals of the whole board."""
    rows = found["board"]["rows"]
    low = min(min(row["elo"], row["low"] or row["elo"]) for row in rows)
    high = max(max(row["elo"], row["high"] or row["elo"]) for row in rows)
    return math.floor(low / 50 - 0.2) * 50.0, math.ceil(high / 50 + 0.2) * 50.0


def place(value: float, ends: tuple[float, float]) -> float:
    """Where a rating stands on the scale, in percent."""
    return round(100 * (value - ends[0]) / (ends[1] - ends[0]), 2)


def shade(rate: float | None) -> float:
    """How strongly a cell of the matrix is coloured: 0 at a half, 1 at all or nothing."""
    return 0.0 if rate is None else round(abs(rate - 0.5) * 2, 2)


def radar(found: Mapping[str, Any], names: list[str]) -> dict[str, Any] | None:
    """Ratings by category on spokes of one length; None with fewer than three categories."""
    boards = {name: own for name, own in found["categories"].items() if own["rows"]}
    ratings = {
        name: {row["model"]: row["elo"] for row in own["rows"]} for name, own in boards.items()
    }
    complete = [name for name in names if all(name in own for own in ratings.values())]
    if len(ratings) < 3 or not complete:
        return None
    every = [own[name] for own in ratings.values() for name in complete]
    low, high = min(every) - 25, max(every) + 25
    spokes = []
    for number, category in enumerate(ratings):
        turn = 2 * math.pi * number / len(ratings) - math.pi / 2
        spokes.append({"category": category, "x": math.cos(turn), "y": math.sin(turn)})

    def shape(name: str) -> str:
        points = []
        for spoke in spokes:
            far = 100 * (ratings[spoke["category"]][name] - low) / (high - low)
            points.append(f"{far * spoke['x']:.1f},{far * spoke['y']:.1f}")
        return " ".join(points)

    return {
        "spokes": spokes,
        "shapes": {name: shape(name) for name in complete},
        "low": low,
        "high": high,
    }
