"""A judge's own reasoning about annotated pictures, as lessons for its score.

A judge is taught with raters' reasoning and reads with its own, which is not as good: its digit
trusts words that it should doubt. So a judge that can reason writes about pictures of its own
training, and a second training teaches what score raters gave after such words. The words are given
there and never imitated (`Annotation.reasoned_by`). That imitation must be taught on the states
that the learner itself visits is shown in arXiv 1011.0686 (DAgger).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from burnish.annotations.schema import Annotation, annotation_digest
from burnish.config import Config, ConfigError
from burnish.judges.agreement import by_prompt_hash, read_scores, request_of, sides
from burnish.judges.lessons import SourceConfig, read_sources
from burnish.ledger import Ledger, read_ledger
from burnish.progress import progress
from burnish.rewards.vlm import Judge
from burnish.runtime import Runtime, RuntimeConfig
from burnish.types import Score, Scored

_NAME = "rationales"
_BLOCK = 4
"""Batches of pictures between two writes."""


class RationalesConfig(Config):
    """Which judge writes, and about which pictures."""

    judge: str
    """The judge's folder."""
    annotations: tuple[SourceConfig, ...]
    dimensions: tuple[str, ...] = ()
    """Empty takes those that both the annotations and the judge know."""
    limit: int | None = Field(default=None, ge=1)
    """Most pictures of one dimension; None takes all."""
    batch_size: int = Field(default=64, ge=1)
    runtime: RuntimeConfig = RuntimeConfig()


def seen(
    config: RationalesConfig, rubrics: Collection[str], known: Mapping[str, Any] | None
) -> list[Annotation]:
    """The annotations to write about: of prompts that the judge's training did not hold out.

    Args:
        config: which files and dimensions, and how many.
        rubrics: the dimensions of the judge.
        known: the split of the judge's training, if it is known.

    Raises:
        ConfigError: what the files' readers refuse; no dimension of the judge; an unknown split; or
            all is held out.
    """
    annotations = read_sources(config.annotations, config.dimensions)
    there = sorted({annotation.dimension for annotation in annotations})
    shared = [name for name in there if name in rubrics]
    if not shared or (config.dimensions and shared != there):
        raise ConfigError(
            f"dimensions: need dimensions of the judge ({', '.join(sorted(rubrics))}), got "
            f"{', '.join(there)}; choose others"
        )
    advice = "train the judge with `burnish reward train`"
    found, _ = sides([a for a in annotations if a.dimension in shared], known, advice=advice)
    chosen = chosen_evenly([a for a in found if a.reasoned_by == "raters"], config.limit)
    if not chosen:
        raise ConfigError(
            "annotations: need prompts that the judge's training did not hold out, got none among "
            f"{len(annotations)} annotations; give it the files that it was trained on"
        )
    return chosen


def chosen_evenly(annotations: Sequence[Annotation], limit: int | None) -> list[Annotation]:
    """At most so many annotations of each dimension, prompt by prompt in an order by hash."""
    order = by_prompt_hash(annotations)
    return [
        annotation
        for dimension in sorted({a.dimension for a in order})
        for annotation in [a for a in order if a.dimension == dimension][:limit]
    ]


def write_rationales(
    judge: Judge, annotations: Sequence[Annotation], folder: Path, rt: Runtime, *, batch_size: int
) -> list[Annotation]:
    """The judge's own reasoning about annotated pictures, with the scores of their raters.

    What was written before the job was cut off is not written again, as long as it is about the
    same picture; ranks share the pictures.

    Args:
        judge: knows a rubric for each dimension.
        annotations: of prompts that its training did not hold out, or nothing can be measured.
        folder: gets `rationales-0.jsonl` and so on: the judge's words by the picture's digest. It
            must be this judge's (`burnish.ledger.pin`).
        rt: ranks and precision.
        batch_size: pictures at once.

    Returns:
        An annotation for every picture about which the judge gave an answer that has a score; the
        others are missing.
    """
    ledger = Ledger(folder, _NAME, rt)
    done = {row["digest"] for row in read_ledger(folder, _NAME)}
    rt.barrier()
    digests = {annotation.id: annotation_digest(annotation) for annotation in annotations}
    todo = [a for a in annotations if digests[a.id] not in done][rt.rank :: rt.world_size]
    with progress("rationales", len(todo)) as bar, rt.autocast():
        for dimension in sorted({annotation.dimension for annotation in todo}):
            part = [annotation for annotation in todo if annotation.dimension == dimension]
            for start in range(0, len(part), _BLOCK * batch_size):
                block = part[start : start + _BLOCK * batch_size]
                scores = read_scores(
                    judge,
                    dimension,
                    map(request_of, block),
                    reasoning=True,
                    batch_size=batch_size,
                    bar=bar,
                )
                ledger.add(
                    {"digest": digests[annotation.id], "reasoning": _said(score)}
                    for annotation, score in zip(block, scores, strict=True)
                )
    rt.barrier()
    said = {row["digest"]: row["reasoning"] for row in read_ledger(folder, _NAME)}
    return [
        replace(annotation, id=f"own-{annotation.id}", reasoning=words, reasoned_by="judge")
        for annotation in annotations
        if (words := said.get(digests[annotation.id]))
    ]


def _said(score: Score) -> str | None:
    return score.note if isinstance(score, Scored) else None
