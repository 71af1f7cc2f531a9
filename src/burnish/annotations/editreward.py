"""EditReward-Data: two edits of one source image by one instruction, scored by trained people.

Reads the JSON that the authors train from: one list of objects

    {"prompt": "Make the donut an apple.", "path_src": "ab/source.png",
     "path1": "ab/one.png", "path2": "ab/two.png", "model1": "...", "model2": "...",
     "model1_dim1_score": 4, "model1_dim2_score": 3, "model1_overall_score": 7,
     "model2_dim1_score": 3, "model2_dim2_score": 3, "model2_overall_score": 6, "tie_case": false}

with the images beside the file. **`path1` is always the preferred image** where `tie_case` is not
true: its place is the label, so `comparison` takes the place away. Each image becomes up to three
annotations: `preference` (the rank, and the overall score), `instruction` (`dim1`) and `aesthetic`
(`dim2`, the visual quality). `dim1` and `dim2` go from 1 to 4 and the overall score, their sum,
from 2 to 8; all are put on the scale from 1 to 5. A score may be null or absent; without it,
`preference` has the rank alone and the other two are not there. What else stands in an object is
not used.

Read from the user's disk and never downloaded. Licence: that of the authors' code repository; the
licence of the dataset card was not seen. Paper: arXiv 2509.26346. Field names were checked against
the training guide of TIGER-AI-Lab/EditReward; the meaning and the ranges of `dim1` and `dim2` come
from a public subset's guide (AgPerry/EditReward-Data-100). Not seen are the Parquet files under
`data/` of the download: write the JSON above from them. `valid_dataset_1.json` of the authors is
not in this format: its overall scores are not on that scale.
"""

from collections.abc import Iterator
from pathlib import Path

from burnish import records
from burnish.annotations.comparisons import Candidate, collect, comparison, rescaled
from burnish.annotations.schema import Annotation

LICENCE = "MIT"
ORIGIN = "TIGER-Lab/EditReward-Data"

_SCORES = {
    "preference": ("overall", 2.0, 8.0),
    "instruction": ("dim1", 1.0, 4.0),
    "aesthetic": ("dim2", 1.0, 4.0),
}


def read(path: Path, *, limit: int | None = None) -> list[Annotation]:
    """The annotations of one JSON file, in up to three dimensions.

    Args:
        path: the JSON file; the paths in it are relative to its folder.
        limit: read only the first so many comparisons.

    Raises:
        ConfigError: an entry that is not in this format, named by file, entry and field.
    """
    return collect(path, _comparisons(path), limit)


def _comparisons(path: Path) -> Iterator[tuple[str, list[Annotation]]]:
    for number, (where, entry) in enumerate(records.json_entries(path), start=1):
        is_tie = entry.get("tie_case", False)
        if not isinstance(is_tie, bool):
            raise records.wrong(where, "tie_case", "true or false", is_tie, "fix it")
        candidates = [
            Candidate(
                output=records.image_file(path.parent, entry, f"path{place}", where),
                judged=_judged(entry, where, place, 1 if is_tie else place),
            )
            for place in (1, 2)
        ]
        yield (
            where,
            comparison(
                f"editreward-{path.stem}-{number}",
                candidates,
                task="edit",
                prompt=records.text(entry, "prompt", where),
                sources=(records.image_file(path.parent, entry, "path_src", where),),
                licence=LICENCE,
                origin=ORIGIN,
            ),
        )


def _judged(
    entry: records.Row, where: str, place: int, rank: int
) -> dict[str, tuple[float | None, int | None]]:
    """Score and rank of one image in each dimension; a dimension needs one of them."""
    judged: dict[str, tuple[float | None, int | None]] = {}
    for dimension, (name, low, high) in _SCORES.items():
        key = f"model{place}_{name}_score"
        score = records.number(entry, key, where, low=low, high=high)
        score = None if score is None else rescaled(score, low, high)
        if dimension == "preference":
            judged[dimension] = (score, rank)
        elif score is not None:
            judged[dimension] = (score, None)
    return judged
