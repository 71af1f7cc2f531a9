"""From the comparisons of a public set to annotations in which position tells nothing."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from burnish.annotations.schema import HIGHEST, LOWEST, Annotation, checked, row_of
from burnish.config import ConfigError
from burnish.types import Task


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One image of a comparison in a public set."""

    output: bytes
    judged: Mapping[str, tuple[float | None, int | None]]
    """Dimension -> mean score from 1 to 5, and rank; either may be None."""


def comparison(
    name: str,
    candidates: Sequence[Candidate],
    *,
    prompt: str,
    licence: str,
    origin: str,
    task: Task = "t2i",
    sources: tuple[bytes, ...] = (),
    num_raters: int = 1,
    category: str = "general",
) -> list[Annotation]:
    """The annotations of one comparison of a public set, where position tells nothing.

    Several sets put the preferred image first. Here the images stand in the order of a hash of
    name and bytes, in which the label has no part, and the ids count in that order.

    Args:
        name: of the pair group, unique over all files of the set.
        candidates: the images.
        prompt: and the others: as in `Annotation`.
    """

    def place(candidate: Candidate) -> bytes:
        return hashlib.sha256(name.encode() + b"\0" + candidate.output).digest()

    return [
        Annotation(
            id=f"{name}-{number}-{dimension}",
            task=task,
            prompt=prompt,
            sources=sources,
            output=candidate.output,
            dimension=dimension,
            score_mean=score,
            num_raters=num_raters,
            pair_group=name,
            rank=rank,
            category=category,
            licence=licence,
            origin=origin,
        )
        for number, candidate in enumerate(sorted(candidates, key=place), start=1)
        for dimension, (score, rank) in candidate.judged.items()
    ]


def collect(
    path: Path, comparisons: Iterable[tuple[str, Sequence[Annotation]]], limit: int | None
) -> list[Annotation]:
    """The checked annotations of the first comparisons of a public set.

    Args:
        path: the file of the set, for messages.
        comparisons: each with its place in the file.
        limit: so many comparisons; None takes all.

    Raises:
        ConfigError: what `schema.checked` refuses, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: need at least 1, got {limit}; leave it out to read all")
    rows = (
        (where, row_of(annotation))
        for where, group in islice(comparisons, limit)
        for annotation in group
    )
    return checked(path, rows)


def rescaled(score: float, low: float, high: float) -> float:
    """A score on a scale from `low` to `high`, on the scale from 1 to 5.

    >>> rescaled(7.0, 1.0, 7.0)
    5.0
    """
    return LOWEST + (HIGHEST - LOWEST) * (score - low) / (high - low)
