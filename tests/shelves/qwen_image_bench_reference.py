"""Record what the official code of Qwen-Image-Bench makes of random replies.

    cd tests/shelves
    python qwen_image_bench_reference.py CHECKOUT > qwen_image_bench_reference.json

The replies have all that its parser repairs: thoughts before the JSON, words around it, flat and
misplaced facets, a renamed one, grades as text, what does not apply, and what cannot be read. The
file holds the names of the tree, the replies, and the scores; no words of the bench.
"""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

MODELS = ("one", "two")


def reply(rng: random.Random, tree: dict[str, list[str]]) -> str:
    """One reply, in one of the forms that judges find."""

    def grade() -> Any:
        return {"score": rng.choice([0, 1, 2, 1, 2, "N/A", "1", 3])}

    found = {ability: {facet: grade() for facet in facets} for ability, facets in tree.items()}
    form = rng.randrange(8)
    if form == 0:
        return "I would rather not say."
    if form == 1:
        found = {facet: one for own in found.values() for facet, one in own.items()}
    if form == 2:
        first, *rest = found
        found[first] = {facet: one for own in found.values() for facet, one in own.items()}
        for ability in rest:
            del found[ability]
    if form == 3:
        found = {a: {f: one["score"] for f, one in own.items()} for a, own in found.items()}
    name = rng.choice(["Feature Matching", "Feature Mapping"])
    text = json.dumps(found).replace("Feature Matching", name)
    if form == 4:
        text = f"Here it is: {text} as asked."
    return f"<think>{{not yet}}</think>{text}" if rng.random() < 0.5 else text


def main(checkout: Path) -> None:
    """Write the record."""
    sys.path.insert(0, str(checkout))
    words, scores, compute = (
        importlib.import_module(name) for name in ("checklists", "score_utils", "compute_scores")
    )
    trees: dict[str, dict[str, list[str]]] = {}
    for pillar, own in scores.CHECKLIST_L3_TO_L2.items():
        for facet, ability in own.items():
            trees.setdefault(pillar, {}).setdefault(ability, []).append(facet)
    assert list(trees) == list(words.DIM_TO_CHECKLIST)
    rng = random.Random(0)
    leaves = [
        " / ".join((p, a, f)) for p, own in trees.items() for a, fs in own.items() for f in fs
    ]
    columns = {dim: prefix for prefix, dim in compute.RESPONSE_PREFIX_TO_DIM.items()}
    records = []
    for number in range(1, 25):
        tags = "; ".join(rng.sample(leaves, rng.randint(3, 10)))
        record = {"ID": number, "dims_en": tags}
        for model in MODELS:
            for pillar in words.parse_dims_by_level1(tags):
                record[columns[pillar] + model] = reply(rng, trees[pillar])
        records.append(record)
    found = compute.aggregate_model_scores(compute.compute_all_scores(records, list(MODELS)))
    print(json.dumps({"tree": trees, "records": records, "scores": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
