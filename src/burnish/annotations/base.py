"""Annotations: one schema for what people said about images, read, written, split and paired.

An annotation is one opinion on one image in one dimension: a mean score, a place in a comparison,
or both. A file holds one a row, as JSONL with the images beside it or as Parquet with the images
inside; its columns are the fields of `Annotation`. Annotations of a public set come from `reader`,
which finds the file of the shelf that bears its name.
"""

import hashlib
import importlib
import json
import pkgutil
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Protocol, runtime_checkable

from burnish import images, records
from burnish.annotations.schema import KINDS, Annotation, check_groups, check_keys, checked, row_of
from burnish.config import ConfigError
from burnish.wording import nearest

_PACKAGE = "burnish.annotations"
_EXTENSIONS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@runtime_checkable
class Reader(Protocol):
    """What every file of the shelf offers as `read`."""

    def __call__(self, path: Path, *, limit: int | None = None) -> list[Annotation]:
        """The annotations of one file on the user's disk; nothing is ever downloaded.

        Args:
            path: a file in the format that the shelf file describes.
            limit: read only the first so many comparisons.

        Raises:
            ConfigError: an entry that is not in that format, named by file, entry and field.
        """
        ...


def read_annotations(path: Path) -> list[Annotation]:
    """Read a file of this schema.

    In JSONL, `output` and `sources` are paths relative to the file; in Parquet they are the bytes.
    Fields with a default may be left out.

    Args:
        path: a `.jsonl` or `.parquet` file.

    Raises:
        ConfigError: another suffix; no readable file; a key that is not of the schema; a field that
            is missing, of the wrong type or out of range; no score and no rank; a rank without a
            group; sources that do not fit the task; a broken image; an id that stands twice; a
            group of several prompts; no annotation at all; or, for Parquet, no `pyarrow`.
    """
    rows = records.parquet_rows(path) if is_parquet(path) else _rows_with_images(path)
    return checked(path, rows)


def write_annotations(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write a file that `read_annotations` reads back equal.

    JSONL keeps each distinct image once, as given, in a folder beside the file that has its stem as
    name; the image's name is the SHA-256 of its bytes. Nothing is written unless all is valid.

    Args:
        path: a `.jsonl` or `.parquet` file; it is replaced, and its folder is made.
        annotations: at least one.

    Raises:
        ConfigError: what `read_annotations` would refuse.
    """
    rows = [row_of(annotation) for annotation in annotations]
    as_parquet = is_parquet(path)
    checked(path, ((f"{path}, annotation {n}", row) for n, row in enumerate(rows, start=1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_parquet:
        records.write_parquet(path, KINDS, rows)
        return
    written: set[Path] = set()
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            named = {
                **row,
                "sources": [_beside(path, data, written) for data in row["sources"]],
                "output": _beside(path, row["output"], written),
            }
            kept = {key: value for key, value in named.items() if value not in (None, "", [])}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    partial.replace(path)


def split(
    annotations: Sequence[Annotation], *, held_out: float = 0.1, seed: int = 0
) -> tuple[list[Annotation], list[Annotation]]:
    """Split into training and held-out annotations by their prompts, in the order given.

    The side is a hash of seed and `normal_prompt`, and of nothing else: a prompt, and with it a
    whole pair group, is never on both sides; the order, the other annotations and the machine do
    not matter; and an annotation that is added later moves no other. The price is that the share
    is met only on average, so one side may be empty where prompts are few. Edits of one source
    image by different instructions may stand on both sides.

    Args:
        annotations: from any number of records.
        held_out: expected share of the prompts that is held out, in [0, 1).
        seed: another seed, another split.

    Returns:
        The training annotations and the held-out ones.

    Raises:
        ConfigError: a share outside [0, 1), or a pair group of several prompts.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(
            f"held_out: need a share of at least 0 and below 1, got {held_out}; pass 0.1"
        )
    check_groups("the annotations", annotations)
    sides: tuple[list[Annotation], list[Annotation]] = ([], [])
    for annotation in annotations:
        name = f"{seed}\n{normal_prompt(annotation.prompt)}"
        draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        sides[draw < held_out].append(annotation)
    return sides


def normal_prompt(text: str) -> str:
    """The prompt without what makes no other prompt of it: case, spacing, forms of characters.

    >>> normal_prompt("  A red\\n Fox ") == normal_prompt("a red fox")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def pairs(annotations: Sequence[Annotation]) -> list[tuple[Annotation, Annotation]]:
    """Every two annotations of one pair group and dimension, the better one first.

    Ranks decide where both have one, and score means otherwise. Ties are left out, and so are two
    that have neither ranks nor scores in common. The better one is always first: who shows a pair
    to a judge must shuffle it.

    Raises:
        ConfigError: a pair group of several prompts.
    """
    check_groups("the annotations", annotations)
    groups: dict[tuple[str, str], list[Annotation]] = {}
    for annotation in annotations:
        if annotation.pair_group is not None:
            key = (annotation.pair_group, annotation.dimension)
            groups.setdefault(key, []).append(annotation)
    found = []
    for group in groups.values():
        for one, other in combinations(group, 2):
            lead = _lead(one, other)
            if lead:
                found.append((one, other) if lead > 0 else (other, one))
    return found


def reader(key: str) -> Reader:
    """The reader of a public set, by the name of its file on this shelf.

    Raises:
        ConfigError: no such set; the nearest is named.
    """
    keys = public_sets()
    if key not in keys:
        near = nearest(key, keys)
        advice = f"did you mean {near!r}?" if near else "choose one of them"
        raise ConfigError(f"need a public set of {', '.join(keys)}, got {key!r}; {advice}")
    return importlib.import_module(f"{_PACKAGE}.{key}").read


def public_sets() -> tuple[str, ...]:
    """The keys of all public sets: the names of the files here that state an `ORIGIN`."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return tuple(
        name for name in names if hasattr(importlib.import_module(f"{_PACKAGE}.{name}"), "ORIGIN")
    )


def is_parquet(path: Path) -> bool:
    """Whether a file of annotations is Parquet and not JSONL, by its suffix.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"need a .jsonl or .parquet file, got {path}; give it that suffix")
    return path.suffix == ".parquet"


def check_writable(path: Path) -> None:
    """Refuse, before the work, a file that `write_annotations` could not write.

    Raises:
        ConfigError: another suffix, or, for Parquet, no `pyarrow`.
    """
    if is_parquet(path):
        records.parquet_modules()


def _rows_with_images(path: Path) -> Iterator[tuple[str, records.Row]]:
    """The rows of a JSONL file, with the bytes of the images in the place of their paths."""
    for where, row in records.json_lines(path):
        check_keys(row, where)
        loaded = dict(row)
        if "output" in row:
            loaded["output"] = records.image_file(path.parent, row, "output", where)
        if isinstance(row.get("sources"), list):
            loaded["sources"] = [
                records.image_file(path.parent, {"sources": given}, "sources", where)
                for given in row["sources"]
            ]
        yield where, loaded


def _beside(path: Path, data: bytes, written: set[Path]) -> str:
    """Write an image to the folder of a JSONL file, once; its path relative to that file."""
    name = hashlib.sha256(data).hexdigest() + _EXTENSIONS[images.media_type(data)]
    place = path.parent / path.stem / name
    if place not in written:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
        written.add(place)
    return f"{path.stem}/{name}"


def _lead(one: Annotation, other: Annotation) -> float:
    """By how much the first is better; 0 is a tie, or nothing to compare."""
    if one.rank is not None and other.rank is not None:
        return float(other.rank - one.rank)
    if one.score_mean is not None and other.score_mean is not None:
        return one.score_mean - other.score_mean
    return 0.0
