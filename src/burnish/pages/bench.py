"""The page and the table of a bench's result: the tree with intervals, and pictures behind it."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.table import Table
from rich.text import Text

from burnish import html, images
from burnish.benching import Sources
from burnish.images import ImageError
from burnish.significance import MIN_COVERAGE, detectable
from burnish.tables import shown
from burnish.tracking import write_atomic

WHOLE = "Overall"
"""Name of the top of the tree."""


def name_of(node: Sequence[str]) -> str:
    """A node in the words of a page."""
    return node[-1] if node else WHOLE


def tree_table(found: Mapping[str, Any]) -> Table:
    """What the command prints: the whole and the pillars."""
    table = Table(box=box.SIMPLE)
    for name in ("", *found["models"]):
        table.add_column(Text(name), justify="right" if name else "left")
    for row in found["rows"]:
        if len(row["node"]) > 1:
            continue
        cells = [_cell(row, name) for name in found["models"]]
        table.add_row(Text(name_of(row["node"])), *cells)
    return table


def heading(found: Mapping[str, Any]) -> str:
    """What stands above the table."""
    line = f"{found['bench']}, 0 to {found['scale']:g}, {found['prompts']} prompts"
    if len(found["models"]) == 1:
        return line
    return (
        f"{line}; differences to {found['base']} with 95 % intervals over prompts, * where Holm's "
        "rule over the pillars leaves p below 0.05"
    )


def _cell(row: Mapping[str, Any], name: str) -> str:
    own = row["models"][name]
    if own["mean"] is None:
        return "none"
    gain = row["gains"].get(name)
    if gain is None or gain["low"] is None:
        return f"{own['mean']:.1f}"
    star = "*" if is_clear(gain) else ""
    return f"{own['mean']:.1f}  {shown(gain, signed=True, digits=1)}{star}"


def is_clear(gain: Mapping[str, Any]) -> bool:
    """Whether a difference is told apart from none: by its p-value, or by its interval alone."""
    if gain["low"] is None:
        return False
    return gain["p"] < 0.05 if gain.get("p") is not None else not gain["low"] <= 0 <= gain["high"]


def why_invalid(found: Mapping[str, Any], name: str) -> str:
    """Why a model has no valid result."""
    own = found["models"][name]
    if own["coverage"] >= MIN_COVERAGE:
        return "its verdicts say nothing about the whole"
    reason = max(own["failed"], key=own["failed"].get, default="")
    return (
        f"{own['coverage']:.1%} of {own['expected']} questions have a verdict, "
        f"{MIN_COVERAGE:.0%} are needed ({reason})"
    )


def power(num_prompts: int, spread: float | None, scale: float) -> str:
    """What so many prompts can show, told before anybody is asked.

    Args:
        num_prompts: of the bench.
        spread: standard deviation over prompts of differences in an earlier result; None takes a
            quarter of the scale.
        scale: the best score.
    """
    assumed = scale / 4 if spread is None else spread
    least = detectable(num_prompts, assumed)
    source = "an assumed" if spread is None else "the measured"
    return (
        f"{num_prompts} prompts: a difference of {least:.1f} points of {scale:g} is found four "
        f"times in five if differences spread over prompts by {assumed:.1f} ({source} deviation)"
    )


def write_bench_page(
    found: Mapping[str, Any],
    path: Path,
    command: str,
    pictures: Mapping[str, Mapping[str, Path]],
    sources: Sources,
) -> Path:
    """Write the page of a result; returns it.

    Args:
        found: as `burnish.benching.result` returns it.
        path: of the page.
        command: that makes it again.
        pictures: file of every item's first picture, by model and item.
        sources: of edits.
    """
    text = html.template("bench.html.j2").render(
        found=found,
        command=command,
        colours=html.colours(list(found["models"])),
        **view(found, path.parent, pictures, sources),
    )
    write_atomic(path, text)
    return path


def view(
    found: Mapping[str, Any],
    folder: Path,
    pictures: Mapping[str, Mapping[str, Path]],
    sources: Sources,
) -> dict[str, Any]:
    """What the templates need besides the result, so that a report can show it, too."""
    names = list(found["models"])
    return {
        "names": names,
        "name_of": name_of,
        "is_clear": is_clear,
        "invalid": {
            name: why_invalid(found, name)
            for name, own in found["models"].items()
            if not own["is_valid"]
        },
        "examples": [
            {
                "name": name_of(own["node"]),
                "newest": own["newest"],
                "rows": [_example(row, names, folder, pictures, sources) for row in own["items"]],
            }
            for own in found["examples"]
        ],
    }


def _example(
    row: Mapping[str, Any],
    names: Sequence[str],
    folder: Path,
    pictures: Mapping[str, Mapping[str, Path]],
    sources: Sources,
) -> dict[str, Any]:
    shots = []
    for name in names:
        path = pictures.get(name, {}).get(row["item"])
        picture = None
        # A broken one was counted as a failure, and is told as missing.
        with contextlib.suppress(ImageError):
            picture = None if path is None else html.embedded(images.read(path))
        link = None if path is None else quote(os.path.relpath(path, folder))
        value = row["values"].get(name)
        shots.append({"model": name, "value": value, "picture": picture, "link": link})
    # Without pictures of the models a source would say nothing.
    given = html.sources(sources(row["item"]) if pictures else (), where=row["item"])
    return {"text": row["text"], "item": row["item"], "sources": given, "shots": shots}
