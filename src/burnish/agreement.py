"""How well a judge agrees with raters, and the map that puts its scores on their scale.

Held-out pictures are read as a reward reads them, with the judge's own reasoning, because what it
was shown in training was the raters' reasoning, and the two differ. The map is monotone, so it
changes no order, and strictly rising between its knots: a flat piece would make unequal pictures
equal, and advantages inside a group live on small differences.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata

from burnish import images
from burnish.annotations.schema import HIGHEST, LOWEST, Annotation
from burnish.judging import Calibration
from burnish.lessons import compared, prompt_of
from burnish.rewards.vlm import Judge, Vlm
from burnish.tracking import Progress, progress
from burnish.types import Scored, ScoreRequest

KNOTS = 10
"""Most knots of a calibration between the ends of the scale."""
FEWEST = 20
"""Held-out scores below which no calibration is fitted."""


def read_scores(
    judge: Judge,
    dimension: str,
    annotations: Sequence[Annotation],
    *,
    reasoning: bool,
    batch_size: int,
    bar: Progress | None = None,
) -> list[float | None]:
    """Raw scores of a judge for annotated pictures of one dimension; None where it failed.

    Args:
        judge: as it will be used.
        dimension: which of its rubrics to ask with.
        annotations: whose pictures to read; what raters said of them is not looked at.
        reasoning: whether the judge writes its reasoning first.
        batch_size: pictures at once.
        bar: advanced by every picture.
    """
    reward = Vlm(judge, dimension, reasoning=reasoning, batch_size=batch_size)
    found: list[float | None] = []
    for start in range(0, len(annotations), batch_size):
        part = annotations[start : start + batch_size]
        requests = [
            ScoreRequest(
                prompt=prompt_of(annotation),
                image=images.to_tensor(images.decode(annotation.output, where=annotation.id)),
            )
            for annotation in part
        ]
        scores = reward.score(requests)
        found += [score.detail["raw"] if isinstance(score, Scored) else None for score in scores]
        if bar is not None:
            bar.advance(len(part))
    return found


def fit_calibration(
    annotations: Sequence[Annotation], raw: Sequence[float | None]
) -> Calibration | None:
    """The monotone map from raw scores to raters' means that misses least, in squares.

    Isotonic regression, its steps joined by straight lines through their centres, thinned to at
    most `KNOTS` of them. The ends of the scale stay where they are: beyond the outermost pictures
    seen, better is still better.

    Args:
        annotations: held out from training.
        raw: the judge's scores, None where it failed.

    Returns:
        The map, or None where fewer than `FEWEST` pictures have both scores.
    """
    both = [
        (score, annotation.score_mean)
        for annotation, score in zip(annotations, raw, strict=True)
        if score is not None and annotation.score_mean is not None
    ]
    if len(both) < FEWEST:
        return None
    scores, wanted = (np.asarray(side, dtype=np.float64) for side in zip(*both, strict=True))
    levels, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    weights = counts.astype(np.float64)
    means = np.bincount(places, weights=wanted) / weights
    found = isotonic_regression(means, weights=weights)
    steps = np.asarray(found.blocks)[:-1]
    sizes = np.add.reduceat(weights, steps)
    centres, heights = _averages(levels, weights, steps), np.asarray(found.x)[steps]
    part = ((np.cumsum(sizes) - sizes / 2) / sizes.sum() * KNOTS).astype(int)
    runs = np.flatnonzero(np.diff(part, prepend=-1))
    raws, calibrated = (_averages(side, sizes, runs).tolist() for side in (centres, heights))
    return _with_ends(list(zip(raws, calibrated, strict=True)))


def _averages(values: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Weighted means of the runs that begin at `starts`."""
    return np.add.reduceat(weights * values, starts) / np.add.reduceat(weights, starts)


def _with_ends(knots: Sequence[tuple[float, float]]) -> Calibration:
    """The map through knots that rise in both, from one end of the scale to the other."""
    (first, lowest), (last, highest) = knots[0], knots[-1]
    low = [(LOWEST, LOWEST)] if first > LOWEST and lowest > LOWEST else []
    high = [(HIGHEST, HIGHEST)] if last < HIGHEST and highest < HIGHEST else []
    raw, calibrated = zip(*low, *knots, *high, strict=True)
    return Calibration(raw, calibrated)


def agreement(
    annotations: Sequence[Annotation], raw: Sequence[float | None]
) -> dict[str, float | int | None]:
    """How a judge's raw scores agree with raters, on pictures held out from its training.

    Args:
        annotations: their ids must differ.
        raw: the judge's scores, None where it failed.

    Returns:
        `count` pictures and the share that `failed`; `absolute_error` in points and the rank
        correlation `spearman` over all pictures; `pairs` of pictures of one prompt, and the share
        `pair_accuracy` that the judge orders as raters did, half for a tie. Correlation over all
        pictures mostly says whether the judge knows a hard prompt; training by groups lives on the
        pairs. None where it is not defined.
    """
    read = [(a, score) for a, score in zip(annotations, raw, strict=True) if score is not None]
    values = [(score, a.score_mean) for a, score in read if a.score_mean is not None]
    found: dict[str, float | int | None] = {
        "count": len(raw),
        "failed": sum(score is None for score in raw) / max(len(raw), 1),
        "absolute_error": None,
        "spearman": None,
    }
    if values:
        ours, theirs = (np.asarray(side) for side in zip(*values, strict=True))
        found["absolute_error"] = float(np.abs(ours - theirs).mean())
        if len(set(ours)) > 1 and len(set(theirs)) > 1:
            found["spearman"] = float(np.corrcoef(rankdata(ours), rankdata(theirs))[0, 1])
    # By id, because comparing names the groups of those that have none.
    scores = {annotation.id: score for annotation, score in read}
    leads = [
        scores[better.id] - scores[worse.id]
        for better, worse in compared(annotations)
        if better.id in scores and worse.id in scores
    ]
    right = (np.sign(leads) + 1) / 2
    return found | {"pairs": len(leads), "pair_accuracy": float(right.mean()) if leads else None}


def measured(
    judge: Judge,
    annotations: Sequence[Annotation],
    *,
    limit: int,
    reasoning: bool,
    batch_size: int,
) -> dict[str, Any]:
    """Agreement and calibration of every dimension of a judge, as `judge.json` holds them.

    Args:
        judge: knows a rubric for each dimension.
        annotations: held out from its training.
        limit: most pictures of one dimension that are read.
        reasoning: whether the judge writes its reasoning first.
        batch_size: pictures at once.
    """
    # Prompt by prompt, in an order that says nothing: files often go by subject.
    order = sorted(annotations, key=lambda a: hashlib.sha256(a.prompt.encode()).digest())
    parts = {name: [a for a in order if a.dimension == name][:limit] for name in judge.rubrics}
    calibrations, agreements = {}, {}
    with progress("held-out pictures", sum(map(len, parts.values()))) as bar:
        for name, part in parts.items():
            raw = read_scores(
                judge, name, part, reasoning=reasoning, batch_size=batch_size, bar=bar
            )
            agreements[name] = agreement(part, raw)
            fitted = fit_calibration(part, raw)
            if fitted is not None:
                calibrations[name] = {"raw": fitted.raw, "calibrated": fitted.calibrated}
    return {
        "calibrations": calibrations,
        "held_out": agreements,
        "held_out_reasoning": reasoning,
    }
