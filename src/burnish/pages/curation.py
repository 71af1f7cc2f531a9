"""The page of a curation: what every prompt's group said, and which prompts are kept."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish import html
from burnish.curation import Profile
from burnish.tracking import write_atomic

_SIDE = 240.0  # Of a plot, in its own units.


def write_curation_page(
    folder: Path,
    stage: str,
    rows: Sequence[Profile],
    kept: frozenset[str],
    found: Mapping[str, Any],
    command: str,
) -> Path:
    """Write `curation.html` into a folder; returns it.

    Args:
        folder: of the curation.
        stage: whose prompts these are.
        rows: of the profile.
        kept: ids of the prompts that pass.
        found: as `curation.write_kept` returns it.
        command: that makes the page again.
    """
    text = html.template("curation.html.j2").render(
        stage=stage,
        found=found,
        charts=charts(rows, kept),
        rule={name: rule for name, rule in found["rule"].items() if rule is not None},
        examples=_examples(rows, kept),
        command=command,
    )
    path = folder / "curation.html"
    write_atomic(path, text)
    return path


def charts(rows: Sequence[Profile], kept: frozenset[str]) -> list[dict[str, Any]]:
    """Range over mean of every measured prompt, a plot for each category, one scale for all."""
    measured = [row for row in rows if row["range"] is not None]
    if not measured:
        return []
    low = min(row["mean"] for row in measured)
    wide = (max(row["mean"] for row in measured) - low) or 1.0
    high = max(row["range"] for row in measured) or 1.0
    # A round number of one digit at the upper end.
    unit = 10.0 ** math.floor(math.log10(high))
    high = math.ceil(high / unit) * unit
    return [
        {
            "category": category,
            "low": low,
            "wide": wide,
            "high": high,
            "points": [
                {
                    "x": round(_SIDE * (row["mean"] - low) / wide, 1),
                    "y": round(_SIDE * (1 - row["range"] / high), 1),
                    "is_kept": row["prompt"] in kept,
                }
                for row in measured
                if row["category"] == category
            ],
        }
        for category in sorted({row["category"] for row in measured})
    ]


def _examples(rows: Sequence[Profile], kept: frozenset[str]) -> list[Profile]:
    """The prompts with the widest ranges, and the widest that is left out."""
    measured = sorted(
        (row for row in rows if row["range"] is not None), key=lambda row: -row["range"]
    )
    out = [row for row in measured if row["prompt"] not in kept]
    return [*[row for row in measured if row["prompt"] in kept][:8], *out[:4]]
