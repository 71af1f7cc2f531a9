"""What an annotation is, and the checks that everything which comes in goes through.

Files of the schema, public sets and annotations made in memory pass the same function: types,
ranges, what belongs together, whether each image decodes. A fault is one line that names the file,
the row and the field.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from burnish import images, records
from burnish.config import ConfigError
from burnish.types import MAX_SOURCES, Task
from burnish.wording import nearest

LOWEST, HIGHEST = 1.0, 5.0
"""The scale of every score, whatever the scale of the set it came from."""
Author = Literal["raters", "judge"]
"""Who wrote a chain of thought."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One opinion on one image in one dimension; it has a score, or a group and a rank."""

    id: str
    """Unique in its file."""
    task: Task = "t2i"
    prompt: str
    """The text the image was made from, or the instruction of the edit."""
    sources: tuple[bytes, ...] = ()
    """Encoded source images of an edit (PNG, JPEG or WebP), in order; none for `t2i`."""
    output: bytes
    """The encoded image that was judged."""
    dimension: str
    """What was judged, e.g. alignment, aesthetic, portrait, instruction, consistency."""
    score_mean: float | None = None
    """Mean over the raters, from 1 to 5; None where images were only compared."""
    score_std: float | None = None
    """Spread over the raters, in units of the score; None where it is not known."""
    num_raters: int = 1
    """How many people; 1 where the set does not say."""
    reasoning: str = ""
    """The chain of thought that leads to the score; may be empty."""
    reasoned_by: Author = "raters"
    """A judge learns to write what raters write, and from another judge's words only the score."""
    pair_group: str | None = None
    """Annotations with the same name compare images of one prompt."""
    rank: int | None = None
    """Place in the group, 1 is best; equal ranks are a tie."""
    category: str = "general"
    licence: str
    """Of the data, as its owner states it."""
    origin: str
    """The data set, with its owner."""


KINDS: Mapping[str, str] = {
    "id": "text",
    "task": "text",
    "prompt": "text",
    "sources": "images",
    "output": "image",
    "dimension": "text",
    "score_mean": "number",
    "score_std": "number",
    "num_raters": "whole",
    "reasoning": "text",
    "reasoned_by": "text",
    "pair_group": "text",
    "rank": "whole",
    "category": "text",
    "licence": "text",
    "origin": "text",
}
"""The columns of a file, in order, and what `records` calls the kind of each."""


def annotation_digest(annotation: Annotation) -> str:
    """What was judged in which dimension, whatever was said of it, in sixteen characters."""
    parts = (annotation.prompt.encode(), annotation.dimension.encode(), *annotation.sources)
    digests = [hashlib.sha256(part).digest() for part in (*parts, annotation.output)]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def row_of(annotation: Annotation) -> dict[str, Any]:
    """The annotation as a row: a value for every column."""
    return {key: getattr(annotation, key) for key in KINDS}


def checked(path: Path, rows: Iterable[tuple[str, records.Row]]) -> list[Annotation]:
    """The annotations of rows; equal images share their bytes and are decoded once.

    Args:
        path: the file, for messages.
        rows: each with its place for messages; images as bytes; defaults may be left out.

    Raises:
        ConfigError: an unknown key; a field that is missing, of the wrong type or out of range; no
            score and no rank; a rank without a group; sources that do not fit the task, or too
            many; a broken image; an id that stands twice; a group of several prompts; or no row at
            all.
    """
    known: dict[bytes, bytes] = {}
    seen: set[str] = set()
    found: list[Annotation] = []
    for where, row in rows:
        annotation = _annotation(row, where, known)
        if annotation.id in seen:
            needed = "an id that no other row has"
            raise records.wrong(where, "id", needed, annotation.id, "rename one of the two")
        seen.add(annotation.id)
        found.append(annotation)
    if not found:
        raise ConfigError(f"{path}: need at least one annotation, got none; write some")
    check_groups(str(path), found)
    return found


def _annotation(row: records.Row, where: str, known: dict[bytes, bytes]) -> Annotation:
    check_keys(row, where)
    task = row.get("task", "t2i")
    if task not in ("t2i", "edit"):
        raise records.wrong(where, "task", "t2i or edit", task, "write one of them")
    given = () if row.get("sources") is None else row["sources"]
    if not isinstance(given, list | tuple):
        raise records.wrong(where, "sources", "a list of images", given, "write []")
    if bool(given) != (task == "edit"):
        needed = "source images for an edit only"
        raise records.wrong(where, "sources", needed, f"{len(given)} for {task}", "fix the task")
    if len(given) > MAX_SOURCES:
        needed = f"at most {MAX_SOURCES} images"
        raise records.wrong(where, "sources", needed, f"{len(given)} images", "leave some out")
    score = records.number(row, "score_mean", where, low=LOWEST, high=HIGHEST)
    rank = records.whole(row, "rank", where, low=1)
    group = row.get("pair_group")
    group = None if group is None else records.text(row, "pair_group", where)
    if rank is not None and group is None:
        raise records.wrong(where, "pair_group", "a group for the rank", None, "name the group")
    if score is None and rank is None:
        needed = "a score, or a pair_group and a rank"
        raise records.wrong(where, "score_mean", needed, None, "write either")
    author = row.get("reasoned_by", "raters")
    if author not in get_args(Author):
        raise records.wrong(where, "reasoned_by", "raters or judge", author, "write one of them")
    raters = records.whole({"num_raters": 1, **row}, "num_raters", where, low=1)
    if raters is None:
        raise records.wrong(where, "num_raters", "a whole number of at least 1", None, "write it")
    return Annotation(
        id=records.text(row, "id", where),
        task=task,
        prompt=records.text(row, "prompt", where),
        sources=tuple(_picture(data, "sources", where, known) for data in given),
        output=_picture(row.get("output"), "output", where, known),
        dimension=records.text(row, "dimension", where),
        score_mean=score,
        score_std=records.number(row, "score_std", where, low=0.0),
        num_raters=raters,
        reasoning=records.text(row, "reasoning", where, default="", may_be_empty=True),
        reasoned_by=author,
        pair_group=group,
        rank=rank,
        category=records.text(row, "category", where, default="general"),
        licence=records.text(row, "licence", where),
        origin=records.text(row, "origin", where),
    )


def check_keys(row: records.Row, where: str) -> None:
    """Refuse a key that is not of the schema, and name the nearest.

    Raises:
        ConfigError: such a key.
    """
    for key in row:
        if key not in KINDS:
            near = nearest(key, tuple(KINDS))
            advice = f"did you mean {near!r}?" if near else "leave it out"
            raise ConfigError(f"{where}: need keys of {', '.join(KINDS)}, got {key!r}; {advice}")


def _picture(data: object, key: str, where: str, known: dict[bytes, bytes]) -> bytes:
    if not isinstance(data, bytes):
        raise records.wrong(where, key, "an encoded image", data, "write it")
    digest = hashlib.sha256(data).digest()
    if digest not in known:
        try:
            images.decode(data, where=f"{where}: {key}")
        except images.ImageError as error:
            raise ConfigError(str(error)) from None
        known[digest] = data
    return known[digest]


def check_groups(where: str, annotations: Sequence[Annotation]) -> None:
    """Refuse a pair group of several prompts or sources: a split would tear it apart.

    Raises:
        ConfigError: such a group.
    """
    first: dict[str, Annotation] = {}
    for annotation in annotations:
        if annotation.pair_group is None:
            continue
        one = first.setdefault(annotation.pair_group, annotation)
        for key in ("prompt", "sources"):
            if getattr(one, key) != getattr(annotation, key):
                raise ConfigError(
                    f"{where}: {key}: need one {key} in pair_group {one.pair_group!r}, got others"
                    f" in {one.id!r} and {annotation.id!r}; name another group"
                )
