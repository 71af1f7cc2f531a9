"""How well a judge agrees with raters, and the map that puts its scores on their scale.

Held-out pictures are read as a reward reads them, with the judge's own reasoning, because what it
was shown in training was the raters' reasoning, and the two differ. The map is monotone, so it
changes no order, and strictly rising between its knots: a flat piece would make unequal pictures
equal, and advantages inside a group live on small differences.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from burnish import images
from burnish.annotations.base import split
from burnish.annotations.schema import HIGHEST, LOWEST, Annotation
from burnish.config import ConfigError
from burnish.judges.concordance import spearman, within_prompt
from burnish.judges.lessons import compared, prompt_group, prompt_of
from burnish.judging import Calibration
from burnish.progress import Progress, progress
from burnish.rewards.vlm import Judge, Vlm
from burnish.types import Score, Scored, ScoreRequest

KNOTS = 10
"""Most knots of a calibration between the ends of the scale."""
_LEAST_SLOPE = 0.02
"""Of a calibration towards either end of the scale, beyond the outermost pictures seen."""
FEWEST = 20
"""Held-out scores below which no calibration is fitted."""


def request_of(annotation: Annotation) -> ScoreRequest:
    """What a reward is asked about an annotated picture; what raters said is not in it."""
    picture = images.decode(annotation.output, where=annotation.id)
    return ScoreRequest(prompt=prompt_of(annotation), image=images.to_tensor(picture))


def read_scores(
    judge: Judge,
    dimension: str,
    requests: Iterable[ScoreRequest],
    *,
    reasoning: bool,
    batch_size: int,
    bar: Progress,
) -> list[Score]:
    """Scores of a judge for pictures of one dimension.

    Args:
        judge: as it will be used.
        dimension: which of its rubrics to ask with.
        requests: what is judged; taken a batch at a time, so that the pictures of a lazy iterable
            are never in memory together.
        reasoning: whether the judge writes its reasoning first.
        batch_size: pictures at once.
        bar: advanced by every picture.
    """
    reward = Vlm(judge, dimension, reasoning=reasoning, batch_size=batch_size)
    found: list[Score] = []
    waiting = iter(requests)
    while part := list(islice(waiting, batch_size)):
        found += reward.score(part)
        bar.advance(len(part))
    return found


def raw_of(score: Score) -> float | None:
    """A judge's score before calibration; None where it failed."""
    return score.detail["raw"] if isinstance(score, Scored) else None


def sides(
    annotations: Sequence[Annotation], known: Mapping[str, Any] | None, *, advice: str
) -> tuple[list[Annotation], list[Annotation]]:
    """The annotations that a judge's training used and held out, by the `split` of its folder.

    Raises:
        ConfigError: its folder does not say.
    """
    if known is None:
        raise ConfigError(
            "held_out: need to know which prompts the judge's training held out, got a judge.json "
            f"without `split`; {advice}"
        )
    return split(annotations, held_out=known["held_out"], seed=known["seed"])


def by_prompt_hash(annotations: Sequence[Annotation]) -> list[Annotation]:
    """Prompt by prompt, in an order that says nothing, because files often go by subject."""
    return sorted(annotations, key=lambda a: hashlib.sha256(a.prompt.encode()).digest())


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


def calibrated_apart(
    annotations: Sequence[Annotation], raw: Sequence[float | None]
) -> list[float] | None:
    """Scores calibrated by a map fitted on other prompts, as a new picture's would be.

    Args:
        annotations: with scores.
        raw: the judge's scores.

    Returns:
        In the order given, or None where one half of the prompts is too small for a map.
    """
    names = sorted({prompt_group(annotation) for annotation in annotations})
    half = {name: number % 2 for number, name in enumerate(names)}
    sides = [half[prompt_group(annotation)] for annotation in annotations]
    found = [math.nan] * len(raw)
    for side in (0, 1):
        rows = [row for row, own in enumerate(sides) if own != side]
        fitted = fit_calibration([annotations[row] for row in rows], [raw[row] for row in rows])
        if fitted is None:
            return None
        for row, (own, score) in enumerate(zip(sides, raw, strict=True)):
            if own == side and score is not None:
                found[row] = fitted(score)
    return found


def _averages(values: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Weighted means of the runs that begin at `starts`."""
    return np.add.reduceat(weights * values, starts) / np.add.reduceat(weights, starts)


def _with_ends(knots: Sequence[tuple[float, float]]) -> Calibration:
    """The map through knots that rise in both, from one end of the scale to the other."""
    raw, heights = (np.asarray(side) for side in zip(*knots, strict=True))
    # Room to rise in, where raters gave the best picture seen their full five, or the worst a one.
    lowest = LOWEST + _LEAST_SLOPE * (raw - LOWEST)
    highest = HIGHEST - _LEAST_SLOPE * (HIGHEST - raw)
    inner = zip(raw.tolist(), heights.clip(lowest, highest).tolist(), strict=True)
    low = [(LOWEST, LOWEST)] if raw[0] > LOWEST else []
    high = [(HIGHEST, HIGHEST)] if raw[-1] < HIGHEST else []
    ends = zip(*low, *inner, *high, strict=True)
    return Calibration(*ends)


def agreement(
    annotations: Sequence[Annotation], raw: Sequence[float | None]
) -> dict[str, float | int | None]:
    """How a judge's raw scores agree with raters, on pictures held out from its training.

    Args:
        annotations: their ids must differ.
        raw: the judge's scores, None where it failed.

    Returns:
        `count` pictures and the share that `failed`; `absolute_error` in points and the rank
        correlations `spearman` over all pictures and `within_prompt`; `pairs` of pictures that
        were compared, and the share `pair_accuracy` that the judge orders as raters did, half for a
        tie.
        Correlation over all pictures mostly says whether the judge knows a hard prompt; training by
        groups lives on the others. None where it is not defined.
    """
    read = [
        (annotation, score)
        for annotation, score in zip(annotations, raw, strict=True)
        if score is not None and annotation.score_mean is not None
    ]
    ours = np.asarray([score for _, score in read], dtype=np.float64)
    theirs = np.asarray([annotation.score_mean for annotation, _ in read], dtype=np.float64)
    groups = np.asarray([prompt_group(annotation) for annotation, _ in read])
    leads = _leads(annotations, raw)
    right = (np.sign(leads) + 1) / 2
    return {
        "count": len(raw),
        "failed": sum(score is None for score in raw) / max(len(raw), 1),
        "absolute_error": float(np.abs(ours - theirs).mean()) if read else None,
        "spearman": _known(spearman(ours, theirs, groups)),
        "within_prompt": _known(within_prompt(ours, theirs, groups)),
        "pairs": len(leads),
        "pair_accuracy": float(right.mean()) if leads else None,
    }


def _leads(annotations: Sequence[Annotation], raw: Sequence[float | None]) -> list[float]:
    """By how much the better picture of each compared pair leads."""
    # By id, because comparing names the groups of those that have none.
    scores = {a.id: s for a, s in zip(annotations, raw, strict=True) if s is not None}
    return [
        scores[better.id] - scores[worse.id]
        for better, worse in compared(annotations)
        if better.id in scores and worse.id in scores
    ]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


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
    order = by_prompt_hash(annotations)
    parts = {name: [a for a in order if a.dimension == name][:limit] for name in judge.rubrics}
    calibrations, agreements = {}, {}
    with progress("held-out pictures", sum(map(len, parts.values()))) as bar:
        for name, part in parts.items():
            scores = read_scores(
                judge,
                name,
                map(request_of, part),
                reasoning=reasoning,
                batch_size=batch_size,
                bar=bar,
            )
            raw = [raw_of(score) for score in scores]
            agreements[name] = agreement(part, raw)
            fitted = fit_calibration(part, raw)
            if fitted is not None:
                calibrations[name] = {"raw": fitted.raw, "calibrated": fitted.calibrated}
    return {
        "calibrations": calibrations,
        "held_out": agreements,
        "held_out_reasoning": reasoning,
    }
