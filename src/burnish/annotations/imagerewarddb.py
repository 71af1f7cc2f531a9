"""ImageRewardDB: several drawn images a prompt, rated in three dimensions and ranked by experts.

Reads one shard as unpacked, e.g. `images/train/train_1/train_1.json`: one JSON list of objects

    {"image_path": "images/train/train_1/0280.webp", "prompt_id": "000864-0061", "prompt": "...",
     "classification": "People", "rank": 5, "overall_rating": 4,
     "image_text_alignment_rating": 3, "fidelity_rating": 4}

with the images beside it: of `image_path` only the name counts, so the shard may lie anywhere.
Images with one `prompt_id` are one comparison. Each becomes three annotations: `preference` (the
rank, 1 is best, and the overall rating), `alignment` and `fidelity`. Ratings go from 1 to 7 and are
put on the scale from 1 to 5. `classification` in small letters is the category, `general` where it
is absent. What else stands in an object is not used.

Read from the user's disk and never downloaded. Licence: Apache-2.0 by the dataset card. Paper:
arXiv 2304.05977. Field names were checked against the dataset card and its loading script; that
rank 1 is best against code that reads the set; the range of the ratings is the paper's, and no file
was seen. How many people rated an image is not in the files, so `num_raters` is 1.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from burnish import records
from burnish.annotations.comparisons import Candidate, collect, comparison, rescaled
from burnish.annotations.schema import Annotation

LICENCE = "Apache-2.0"
ORIGIN = "THUDM/ImageRewardDB"

_RATINGS = {
    "preference": "overall_rating",
    "alignment": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
}
_LOWEST, _HIGHEST = 1.0, 7.0


def read(path: Path, *, limit: int | None = None) -> list[Annotation]:
    """The annotations of one shard, in three dimensions.

    Args:
        path: the JSON file of the shard; its images are in the same folder.
        limit: read only the first so many comparisons.

    Raises:
        ConfigError: an entry that is not in this format, named by file, entry and field.
    """
    return collect(path, _comparisons(path), limit)


def _comparisons(path: Path) -> Iterator[tuple[str, list[Annotation]]]:
    groups: dict[str, list[tuple[str, records.Row]]] = {}
    for where, entry in records.json_entries(path):
        groups.setdefault(records.text(entry, "prompt_id", where), []).append((where, entry))
    for name, entries in groups.items():
        where, first = entries[0]
        prompt = records.text(first, "prompt", where)
        for other, entry in entries:
            if entry.get("prompt") != prompt:
                needed = f"the prompt of the others with prompt_id {name!r}"
                raise records.wrong(other, "prompt", needed, entry.get("prompt"), "fix it")
        yield (
            where,
            comparison(
                f"imagerewarddb-{name}",
                [_candidate(path.parent, entry, place) for place, entry in entries],
                prompt=prompt,
                category=records.text(first, "classification", where, default="general").lower(),
                licence=LICENCE,
                origin=ORIGIN,
            ),
        )


def _candidate(folder: Path, entry: records.Row, where: str) -> Candidate:
    rank = records.whole(entry, "rank", where, low=1)
    if rank is None:
        raise records.wrong(where, "rank", "a whole number of at least 1", None, "write it")
    judged: dict[str, tuple[float | None, int | None]] = {}
    for dimension, key in _RATINGS.items():
        rating = records.number(entry, key, where, low=_LOWEST, high=_HIGHEST)
        if rating is None:
            raise records.wrong(where, key, "a number from 1 to 7", None, "write it")
        score = rescaled(rating, _LOWEST, _HIGHEST)
        judged[dimension] = (score, rank if dimension == "preference" else None)
    name = PurePosixPath(records.text(entry, "image_path", where)).name
    output = records.image_file(folder, {"image_path": name}, "image_path", where)
    return Candidate(output=output, judged=judged)
