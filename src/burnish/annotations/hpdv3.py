"""HPDv3, the preferences behind HPSv3: two drawn images or photographs a prompt.

Reads `all.json`, `train.json` or `test.json` as the authors describe them: one JSON list of objects

    {"prompt": "...", "choice_dist": [12, 7], "confidence": 0.99,
     "path1": "images/a.jpg", "path2": "images/b.jpg", "model1": "flux", "model2": "infinity"}

with the unpacked `images/` beside the file. **`path1` is always the preferred image**: its place is
the label, so `comparison` takes the place away. `choice_dist`, the votes of each image, may be null
or absent; their sum is the number of raters. What else stands in an object is not used.

Read from the user's disk and never downloaded. Licence: MIT by the dataset card; some images are of
other sets. Paper: arXiv 2508.03789. Field names were checked against the README of MizzenAI/HPSv3
and the reader of opendilab/LightRFT, not against the files themselves. The images of
`pickapic.json` and `imagereward.json`, which the set adds, have to come from those sets.
"""

from collections.abc import Iterator
from pathlib import Path

from burnish import records
from burnish.annotations.comparisons import Candidate, collect, comparison
from burnish.annotations.schema import Annotation

LICENCE = "MIT"
ORIGIN = "MizzenAI/HPDv3"


def read(path: Path, *, limit: int | None = None) -> list[Annotation]:
    """The annotations of one JSON file: rank 1 and rank 2 in the dimension `preference`.

    Args:
        path: the JSON file; the paths in it are relative to its folder.
        limit: read only the first so many comparisons.

    Raises:
        ConfigError: an entry that is not in this format, named by file, entry and field.
    """
    return collect(path, _comparisons(path), limit)


def _comparisons(path: Path) -> Iterator[tuple[str, list[Annotation]]]:
    for number, (where, entry) in enumerate(records.json_entries(path), start=1):
        candidates = [
            Candidate(
                output=records.image_file(path.parent, entry, key, where),
                judged={"preference": (None, rank)},
            )
            for key, rank in (("path1", 1), ("path2", 2))
        ]
        yield (
            where,
            comparison(
                f"hpdv3-{path.stem}-{number}",
                candidates,
                prompt=records.text(entry, "prompt", where),
                num_raters=_num_raters(entry, where),
                licence=LICENCE,
                origin=ORIGIN,
            ),
        )


def _num_raters(entry: records.Row, where: str) -> int:
    votes = entry.get("choice_dist")
    if votes is None:
        return 1
    if not isinstance(votes, list) or len(votes) != 2:
        raise records.wrong(where, "choice_dist", "two numbers of votes", votes, "write null")
    counts = [records.whole({"choice_dist": vote}, "choice_dist", where, low=0) for vote in votes]
    return max(1, sum(count or 0 for count in counts))
