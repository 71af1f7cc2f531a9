"""Curves as a page draws them: lines in the units of their plot, and round numbers at its side."""

import math
from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT = 300.0, 120.0  # Of the plot inside a chart, in the chart's own units.


Line = dict[str, Any]
"""label, colour (a class of the page), points (x, y)."""


def chart(
    title: str, words: str, lines: list[Line], *, last: float, end: str, has_zero: bool = False
) -> dict[str, Any]:
    """A chart with its lines in the units of the plot: every point, and a moving average.

    Args:
        title: whose curves these are.
        words: what they show.
        lines: those without points are left out.
        last: x at the right end; the left end is 0.
        end: what stands below the right end.
        has_zero: the axis begins at 0.
    """
    lines = [line for line in lines if line["points"]]
    values = [value for line in lines for _, value in line["points"]]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = 0.0 if has_zero else low
    if high <= low:
        high = low + max(abs(low), 1.0) * 0.1
    # What differs by less would need labels that are too long.
    high = max(high, low + 1e-3 * abs(low))
    # Steps of 1, 2 or 5 times a power of ten, three to six of them.
    rough = (high - low) / 3
    tick = max(
        base * 10.0**power
        for power in (math.floor(math.log10(rough)) - 1, math.floor(math.log10(rough)))
        for base in (1, 2, 5)
        if base * 10.0**power <= rough
    )
    low, high = math.floor(low / tick + 1e-9) * tick, math.ceil(high / tick - 1e-9) * tick

    def path(points: Sequence[tuple[float, float]]) -> str:
        width, height = _WIDTH / (last or 1), _HEIGHT / (high - low)
        return " ".join(f"{x * width:.1f},{_HEIGHT - (y - low) * height:.1f}" for x, y in points)

    drawn = []
    for line in lines:
        smooth = _smoothed(line["points"])
        drawn.append(
            {**line, "raw": path(line["points"]), "smooth": path(smooth), "last": smooth[-1][1]}
        )
    digits = max(0, -math.floor(math.log10(tick)))
    ticks = [low + tick * n for n in range(round((high - low) / tick) + 1)]
    return {
        "title": title,
        "words": words,
        "lines": drawn,
        "ticks": [
            (round(_HEIGHT - (t - low) / (high - low) * _HEIGHT, 1), t, digits) for t in ticks
        ],
        "digits": digits + 1,
        "end": end,
    }


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over about a tenth of the points."""
    reach = len(points) // 20
    found = []
    for place, (step, _) in enumerate(points):
        near = points[max(0, place - reach) : place + reach + 1]
        found.append((step, sum(value for _, value in near) / len(near)))
    return found
