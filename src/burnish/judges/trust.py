"""May a judge be trained against? What `burnish reward report` measures of one.

Per dimension, on pictures of prompts that the judge's training held out and that it reads as a
reward would: agreement with raters over all pictures and inside each prompt, calibration, failures
and probability on the digits, the noise of asking again, and what the probes of
`burnish.judges.probes` do to a score. `ceiling` is the same correlation for a judge that knows what
raters would say on average: raters differ, and nobody can agree with five of them better than that.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field

from burnish import images
from burnish.annotations.schema import Annotation
from burnish.config import Config, ConfigError
from burnish.judges import concordance
from burnish.judges.agreement import (
    by_prompt_hash,
    calibrated_apart,
    raw_of,
    read_scores,
    request_of,
    sides,
)
from burnish.judges.concordance import Interval, Scores, Statistic, interval
from burnish.judges.lessons import SourceConfig, comparison_group, prompt_group, read_sources
from burnish.judges.probes import PROBES
from burnish.progress import Progress, progress
from burnish.rewards.vlm import Judge
from burnish.types import Failed, Score, Scored, ScoreRequest

STATISTICS: dict[str, Statistic] = {
    "spearman": concordance.spearman,
    "pearson": concordance.pearson,
    "within_prompt": concordance.within_prompt,
}
"""Agreement with raters, of raw scores, as a monotone map changes none but `pearson`."""
PAIR_STATISTICS: dict[str, Statistic] = {
    "pair_accuracy": concordance.pair_accuracy,
    "pair_accuracy_with_ties": concordance.pair_accuracy_with_ties,
}
"""The same, of the pictures that were compared."""
CEILINGS = ("spearman", "within_prompt")
"""The statistics for which the best possible value is estimated."""


UNDEFINED = Interval(math.nan, math.nan, math.nan)


class TrustConfig(Config):
    """How a judge is examined."""

    annotations: tuple[SourceConfig, ...]
    dimensions: tuple[str, ...] = ()
    """Empty takes those that both the annotations and the judge know."""
    held_out: bool = True
    """Only prompts that the judge's training held out; False where the files are not those that it
    was trained on."""
    limit: int = Field(default=600, ge=20)
    """Most pictures of one dimension."""
    probed: int = Field(default=150, ge=2)
    """Pictures of a dimension on which noise is measured and the probes are tried."""
    reasoning: bool = True
    """Whether the judge writes its reasoning first."""
    batch_size: int = Field(default=64, ge=1)
    disagreements: int = Field(default=6, ge=0)
    """Worst disagreements of each dimension that the page shows."""


@dataclass(frozen=True)
class Reading:
    """One picture, what raters said of it, and what the judge says."""

    annotation: Annotation
    score: Score


@dataclass(frozen=True)
class Examination:
    """What was found in one dimension."""

    dimension: str
    readings: tuple[Reading, ...]
    metrics: dict[str, Interval]
    """By name: agreement, ceilings, calibration, noise, mass, failures; only the last where fewer
    than two pictures could be judged."""
    probes: dict[str, dict[str, Interval]]
    """Probe -> `shift`, mean change of the score in points; `moved`, mean size of the change;
    `rank`, rank correlation with the scores of the same pictures as they are; `noise`, as of asking
    again; `lost`, share of the pictures that can be judged no more."""

    def to_json(self) -> dict[str, Any]:
        """Metric -> value and interval, None where it is not defined."""
        found = {name: _plain(value) for name, value in self.metrics.items()}
        probed = {
            f"probe_{probe}_{name}": _plain(value)
            for probe, values in self.probes.items()
            for name, value in values.items()
        }
        return {"count": len(self.readings), **found, **probed}


def unseen(config: TrustConfig, known: Mapping[str, Any] | None) -> list[Annotation]:
    """The annotations to examine a judge with.

    Args:
        config: which files and dimensions.
        known: `held_out` and `seed` of the split of the judge's training, if it is known.

    Raises:
        ConfigError: what the files' readers refuse; an unknown split; or nothing is held out.
    """
    annotations = [
        annotation
        for annotation in read_sources(config.annotations, config.dimensions)
        # A picture about which a judge wrote is there a second time.
        if annotation.reasoned_by == "raters"
    ]
    if not config.held_out:
        return annotations
    _, found = sides(
        annotations, known, advice="pass held_out=false with annotations that it was not trained on"
    )
    if not found:
        raise ConfigError(
            f"held_out: need prompts that the judge's training held out, got none among "
            f"{len(annotations)} annotations; pass held_out=false if it was not trained on them"
        )
    return found


def examine(
    judge: Judge, annotations: Sequence[Annotation], config: TrustConfig
) -> list[Examination]:
    """Examine every dimension that the judge and the annotations share.

    Args:
        judge: as it will be used.
        annotations: with scores, of prompts that it was not trained on.
        config: how much is read.

    Raises:
        ConfigError: no such dimension, or none in which the judge scored two pictures.
    """
    scored = [annotation for annotation in annotations if annotation.score_mean is not None]
    known = sorted({a.dimension for a in scored} & judge.rubrics.keys())
    if not known:
        raise ConfigError(
            f"need annotations with scores in a dimension of the judge ({', '.join(judge.rubrics)})"
            f", got {len(annotations)} annotations without one; choose another file"
        )
    chosen = {
        name: by_prompt_hash([a for a in scored if a.dimension == name])[: config.limit]
        for name in known
    }
    calls = sum(
        len(part) + (1 + len(PROBES)) * min(len(part), config.probed) for part in chosen.values()
    )
    with progress("judge", calls) as bar:
        found = [_examined(judge, name, part, config, bar) for name, part in chosen.items()]
    if not any(examination.probes for examination in found):
        reasons = [r.score.reason for r in found[0].readings if isinstance(r.score, Failed)]
        raise ConfigError(
            f"need scores of at least two pictures in a dimension, got fewer in {', '.join(known)};"
            f" the first failure: {reasons[0] if reasons else 'none'}"
        )
    return found


def _examined(
    judge: Judge,
    dimension: str,
    annotations: Sequence[Annotation],
    config: TrustConfig,
    bar: Progress,
) -> Examination:
    def ask(requests: Iterable[ScoreRequest], batch_size: int = config.batch_size) -> list[Score]:
        return read_scores(
            judge,
            dimension,
            requests,
            reasoning=config.reasoning,
            batch_size=batch_size,
            bar=bar,
        )

    # A request holds its picture decoded, so none is kept.
    scores = ask(map(request_of, annotations))
    readings = [Reading(a, s) for a, s in zip(annotations, scores, strict=True)]
    read = [reading for reading in readings if isinstance(reading.score, Scored)]
    if len(read) < 2:
        return Examination(dimension, tuple(readings), _failures(readings), {})
    probed, before = annotations[: config.probed], readings[: config.probed]
    groups = _prompts(before)
    # Another order and other company in the batch: whatever changes is noise.
    again = ask(map(request_of, probed[::-1]), max(1, config.batch_size * 2 // 3))[::-1]
    probes = {
        name: _moved(before, ask(_changed(request_of(a), probe) for a in probed), groups)
        for name, probe in PROBES.items()
    }
    metrics = _agreement(read) | _soundness(readings, read)
    metrics |= {"repeat_noise": _moved(before, again, groups)["noise"]}
    return Examination(dimension, tuple(readings), metrics, probes)


def _agreement(read: Sequence[Reading]) -> dict[str, Interval]:
    """Agreement, its ceilings, and the calibration error of a map fitted on other prompts."""
    raw = [raw_of(reading.score) for reading in read]
    ours = np.asarray(raw, dtype=np.float64)
    theirs = np.asarray([reading.annotation.score_mean for reading in read], dtype=np.float64)
    groups = _prompts(read)
    compared = np.asarray([comparison_group(reading.annotation) for reading in read])
    found = {n: interval(s, ours, theirs, groups) for n, s in STATISTICS.items()}
    found |= {n: interval(s, ours, theirs, groups, compared) for n, s in PAIR_STATISTICS.items()}
    found |= _ceilings([reading.annotation for reading in read], theirs, groups)
    calibrated = calibrated_apart([reading.annotation for reading in read], raw)
    if calibrated is not None:
        mapped = np.asarray(calibrated)
        # A mean of absolute differences, so that chance only adds, once more in a resample: its
        # percentiles lie above what they are for.
        error = concordance.calibration_error(mapped, theirs, groups)
        found["calibration_error"] = Interval(error, math.nan, math.nan)
        found["absolute_error"] = interval(_absolute_error, mapped, theirs, groups)
    return found


def _ceilings(
    annotations: Sequence[Annotation], means: Scores, prompts: concordance.Groups
) -> dict[str, Interval]:
    """What a judge would reach that knew what raters would say on average, by statistic.

    Over all pictures opinions are told apart more easily than inside a prompt, so each has its own
    reliability. Undefined where a spread is not known, or comes from one rater.
    """
    everywhere = np.zeros(len(means), dtype=np.intp)
    units = {"spearman": everywhere, "within_prompt": np.unique(prompts, return_inverse=True)[1]}
    errors = _error_variances(annotations)
    return {
        f"{name}_ceiling": UNDEFINED
        if errors is None
        else interval(STATISTICS[name], _opinions(means, errors, units[name]), means, prompts)
        for name in CEILINGS
    }


def _error_variances(annotations: Sequence[Annotation]) -> Scores | None:
    """Error variance of each mean over raters; None where one is not known."""
    found = [
        None if a.score_std is None or a.num_raters < 2 else a.score_std**2 / (a.num_raters - 1)
        for a in annotations
    ]
    return None if None in found else np.asarray(found, dtype=np.float64)


def _opinions(means: Scores, errors: Scores, units: concordance.Groups) -> Scores:
    """What raters might think on average, given the means of some of them: a draw.

    A mean over raters lies further out than the opinion behind it, by the raters' own error. So
    means are drawn towards that of their unit by the reliability, the share of their variance there
    that is not error, before what is not known of an opinion is added. For normal opinions the
    correlation with the means is then the root of the reliability, and that is the best there is.
    The spread of three raters is a rough estimate, by which it comes out up to 0.05 too high.

    Args:
        means: over raters, one for each picture.
        errors: variance of each mean around the opinion; pictures differ, as raters agree on what
            is flawless.
        units: number of the unit of each picture.
    """
    counts = np.bincount(units)
    centres = (np.bincount(units, weights=means) / counts)[units]
    free = len(means) - len(counts)
    variance = float(((means - centres) ** 2).sum()) / free if free else 0.0
    reliability = max(0.0, 1 - float(errors.mean()) / variance) if variance > 0 else 0.0
    unknown = np.random.default_rng(0).normal(0.0, 1.0, len(means)) * np.sqrt(reliability * errors)
    return centres + reliability * (means - centres) + unknown


def _absolute_error(ours: Scores, theirs: Scores, groups: concordance.Groups) -> float:
    return float(np.abs(ours - theirs).mean())


def _soundness(readings: Sequence[Reading], read: Sequence[Reading]) -> dict[str, Interval]:
    """Share of failures, and probability on the digits."""
    masses = np.asarray([r.score.detail["mass"] for r in read if isinstance(r.score, Scored)])
    return {
        **_failures(readings),
        "mass": interval(_mean, masses, masses, _prompts(read)),
        "mass_lowest": Interval(float(masses.min()), math.nan, math.nan),
    }


def _failures(readings: Sequence[Reading]) -> dict[str, Interval]:
    is_failed = np.asarray([float(isinstance(r.score, Failed)) for r in readings])
    return {"failed": interval(_mean, is_failed, is_failed, _prompts(readings))}


def _prompts(readings: Sequence[Reading]) -> concordance.Groups:
    """The units of resampling."""
    return np.asarray([prompt_group(reading.annotation) for reading in readings])


def _mean(ours: Scores, theirs: Scores, groups: concordance.Groups) -> float:
    return float(ours.mean())


def _moved(
    before: Sequence[Reading], after: Sequence[Score], groups: concordance.Groups
) -> dict[str, Interval]:
    """How scores change between two askings about the same pictures, calibrated as a reward's."""
    values = [
        (_value(reading.score), _value(score)) for reading, score in zip(before, after, strict=True)
    ]
    gone = np.asarray([float(now is None) for once, now in values if once is not None])
    there = np.asarray([once is not None for once, _ in values])
    lost = interval(_mean, gone, gone, groups[there]) if len(gone) else UNDEFINED
    both = [(row, *pair) for row, pair in enumerate(values) if None not in pair]
    if not both:
        return dict.fromkeys(("shift", "moved", "rank", "noise"), UNDEFINED) | {"lost": lost}
    rows, old, new = (np.asarray(side) for side in zip(*both, strict=True))
    names = groups[rows]
    return {
        "shift": interval(_mean, new - old, old, names),
        "moved": interval(_mean, np.abs(new - old), old, names),
        "rank": interval(concordance.spearman, new, old, names),
        # Each asking has its own error, and the difference has both.
        "noise": interval(_spread, new - old, old, names),
        "lost": lost,
    }


def _value(score: Score) -> float | None:
    return score.value if isinstance(score, Scored) else None


def _spread(ours: Scores, theirs: Scores, groups: concordance.Groups) -> float:
    return float(np.sqrt((ours**2).mean() / 2))


def _changed(request: ScoreRequest, probe: Callable[..., Any]) -> ScoreRequest:
    return replace(request, image=images.to_tensor(probe(images.to_pil(request.image))))


def _plain(found: Interval) -> dict[str, float | None]:
    parts = {"value": found.value, "low": found.low, "high": found.high}
    return {name: None if math.isnan(number) else number for name, number in parts.items()}
