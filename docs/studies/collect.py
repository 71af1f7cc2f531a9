"""Raw rows of a study from its run folders, in the form of every `docs/studies/*.jsonl`.

python docs/studies/collect.py whole-run runs/miniature > docs/studies/whole-run.jsonl
"""

import json
import sys
from pathlib import Path

METRICS = ("composite", "likeness", "style")


def main(study: str, *folders: str) -> None:
    for folder in map(Path, folders):
        for scores in sorted(folder.glob("evaluation/*/scores.jsonl")):
            for line in scores.read_text().splitlines():
                row = json.loads(line)
                if row["metric"] in METRICS:
                    print(
                        json.dumps(
                            {
                                "study": study,
                                "arm": row["policy"],
                                "seed": row["seed"],
                                "prompt": row["prompt"],
                                "task": row["task"],
                                "category": row["category"],
                                "metric": row["metric"],
                                "value": row["value"] and round(row["value"], 6),
                            }
                        )
                    )


if __name__ == "__main__":
    main(*sys.argv[1:])
