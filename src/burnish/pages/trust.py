"""The page about a judge: may it be trained against, and where is it most wrong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish import html, images
from burnish.judges.trust import CEILINGS, Examination, Reading
from burnish.rewards.vlm import Judge
from burnish.tracking import write_atomic, write_json
from burnish.types import Failed, Scored

AGREEMENT = {
    "spearman": "Rank correlation",
    "within_prompt": "Rank correlation<br>within a prompt",
    "pearson": "Linear<br>correlation",
    "pair_accuracy": "Pairs in the<br>order of raters",
    "pair_accuracy_with_ties": "The same,<br>ties counted",
}
"""Columns of the first table."""
SOUNDNESS = {
    "calibration_error": "Calibration<br>error",
    "absolute_error": "Mean<br>error",
    "repeat_noise": "Noise of<br>asking again",
    "mass": "Probability<br>on the digits",
    "mass_lowest": "Lowest",
    "failed": "Failed",
}
"""Columns of the second table."""
PROBES = {
    "caption": "a caption that asks for a 5",
    "jpeg": "JPEG at quality 75",
    "resize": "enlarged and brought back",
    "padding": "a thin white margin",
}
"""Probes in the words of the page."""
MOVED = 0.25
"""Points of mean change from which the page warns of a probe."""


def write_trust_report(
    folder: Path, name: str, judge: Judge, found: Sequence[Examination], *, worst: int
) -> Path:
    """Write `report.html` and `report.json` into a folder; returns the page.

    Args:
        folder: made if missing.
        name: of the judge.
        judge: whose rubrics the page shows.
        found: of `trust.examine`.
        worst: disagreements of each dimension that are shown.
    """
    numbers = {examination.dimension: examination.to_json() for examination in found}
    text = html.template("trust.html.j2").render(
        name=name,
        numbers=numbers,
        lede=_lede(found),
        warnings=list(_warnings(numbers)),
        agreement=AGREEMENT,
        soundness=SOUNDNESS,
        probes=PROBES,
        ceilings=CEILINGS,
        charts=[_chart(examination) for examination in found],
        disagreements={e.dimension: _worst(e, worst) for e in found},
        rubrics={e.dimension: judge.rubric(e.dimension) for e in found},
    )
    path = folder / "report.html"
    write_atomic(path, text)
    write_json(folder / "report.json", {"judge": name, "dimensions": numbers})
    return path


def _lede(found: Sequence[Examination]) -> str:
    readings = [reading for examination in found for reading in examination.readings]
    origins = sorted({reading.annotation.origin for reading in readings})
    prompts = {reading.annotation.prompt for reading in readings}
    return (
        f"This judge read {len(readings):,} pictures of {len(prompts):,} prompts from "
        f"{', '.join(origins)}. Below is how its scores agree with what raters said of the same "
        "pictures. Brackets: 95 % intervals over prompts; the calibration error has none."
    )


def _warnings(numbers: Mapping[str, Mapping[str, Any]]) -> Any:
    """What somebody must know before training against this judge."""
    for dimension, found in numbers.items():
        for probe, words in PROBES.items():
            shift = found.get(f"probe_{probe}_shift", {}).get("value")
            if shift is not None and abs(shift) >= MOVED:
                yield f"{dimension}: {words} moves the score by {html.plain(shift, 2, '+')} points."
        if (failed := found["failed"]["value"]) > 0.01:
            yield f"{dimension}: {100 * failed:.1f} % of the pictures could not be judged."


def _chart(examination: Examination) -> dict[str, Any]:
    """The judge's raw score of each picture over raters' mean, in the units of a plot of 4 x 4."""
    points = [
        (r.annotation.score_mean, r.score.detail["raw"])
        for r in examination.readings
        if isinstance(r.score, Scored) and r.annotation.score_mean is not None
    ]
    return {
        "dimension": examination.dimension,
        "points": [(round(60 * (x - 1), 1), round(240 - 60 * (y - 1), 1)) for x, y in points],
    }


def _worst(examination: Examination, count: int) -> list[dict[str, Any]]:
    """The pictures of which judge and raters think most differently, one of each prompt."""

    def miss(reading: Reading) -> float:
        assert isinstance(reading.score, Scored) and reading.annotation.score_mean is not None
        return abs(reading.score.value - reading.annotation.score_mean)

    ordered = sorted(
        (r for r in examination.readings if isinstance(r.score, Scored)), key=miss, reverse=True
    )
    chosen = list({r.annotation.prompt: r for r in reversed(ordered)}.values())
    chosen = sorted(chosen, key=miss, reverse=True)[:count]
    failed = [r for r in examination.readings if isinstance(r.score, Failed)][: count // 2]
    return [_shown(reading) for reading in (*chosen, *failed)]


def _shown(reading: Reading) -> dict[str, Any]:
    annotation, score = reading.annotation, reading.score
    pictures = [
        html.embedded(images.decode(data, where=annotation.id))
        for data in (*annotation.sources, annotation.output)
    ]
    return {
        "prompt": annotation.prompt,
        "pictures": pictures,
        "raters": annotation.score_mean,
        "raters_std": annotation.score_std,
        "raters_said": annotation.reasoning,
        "judge": score.value if isinstance(score, Scored) else None,
        "judge_said": score.note if isinstance(score, Scored) else score.reason,
    }
