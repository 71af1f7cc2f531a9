"""Pick-a-Pic v2: two drawn images a prompt, and which of them the user of a web page preferred.

Reads one Parquet file of the set, images inside, with the columns

    caption (text), jpg_0 and jpg_1 (image bytes), label_0 and label_1 (1 for the preferred image,
    0 for the other, 0.5 each for a tie), has_label (whether there was a choice at all)

Rows whose `has_label` is false are left out, which is what the column is for; the other columns of
the set are not read. The train split is 335 GB of images: read file by file, and with a `limit`.

Read from the user's disk and never downloaded. Licence: the dataset card states none. Paper: arXiv
2305.01569. Column names and types were checked against the dataset card, and the labels against the
code of yuvalkirstain/PickScore, not against the files themselves.
"""

from collections.abc import Iterator
from pathlib import Path

from burnish import records
from burnish.annotations.comparisons import Candidate, collect, comparison
from burnish.annotations.schema import Annotation

LICENCE = "not stated"
ORIGIN = "yuvalkirstain/pickapic_v2"

_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label")


def read(path: Path, *, limit: int | None = None) -> list[Annotation]:
    """The annotations of one Parquet file: ranks in the dimension `preference`.

    Args:
        path: the Parquet file.
        limit: read only the first so many comparisons.

    Raises:
        ConfigError: a row that is not in this format, named by file, row and column; no `pyarrow`.
    """
    return collect(path, _comparisons(path), limit)


def _comparisons(path: Path) -> Iterator[tuple[str, list[Annotation]]]:
    for number, (where, row) in enumerate(records.parquet_rows(path, _COLUMNS), start=1):
        if row.get("has_label") is False:
            continue
        labels = [_label(row, key, where) for key in ("label_0", "label_1")]
        candidates = [
            Candidate(
                output=_image(row, f"jpg_{place}", where),
                judged={"preference": (None, 1 if label == max(labels) else 2)},
            )
            for place, label in enumerate(labels)
        ]
        yield (
            where,
            comparison(
                f"pickapic-{path.stem}-{number}",
                candidates,
                prompt=records.text(row, "caption", where),
                licence=LICENCE,
                origin=ORIGIN,
            ),
        )


def _label(row: records.Row, key: str, where: str) -> float:
    label = records.number(row, key, where, low=0.0, high=1.0)
    if label is None:
        raise records.wrong(where, key, "a number from 0 to 1", None, "set has_label to false")
    return label


def _image(row: records.Row, key: str, where: str) -> bytes:
    data = row.get(key)
    if not isinstance(data, bytes):
        raise records.wrong(where, key, "an encoded image", data, "take the set with its images")
    return data
