"""The tables of `bench-and-arena.md`, and its numbers, from the folder of a run.

python docs/studies/everybody.py runs/distillation > tables.md

`bench-and-arena.json` beside this file gets all numbers. A bench or arena of a run is written by
`burnish report`, which `burnish run` ends with.
"""

import json
import sys
from pathlib import Path
from typing import Any

NUMBERS = Path(__file__).with_name("bench-and-arena.json")
TITLES = {"t2i": "Text to image", "edit": "Editing"}


def signed(value: float) -> str:
    """With a minus that is as wide as a plus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def cell(row: dict[str, Any], model: str) -> str:
    """Mean; gain over the base with its interval, where there are prompts enough for one."""
    found, gain = row["models"][model], row["gains"].get(model)
    if gain is None:
        return f"{found['mean']:.1f}"
    ends = [gain.get(end) for end in ("low", "high")]
    span = "" if None in ends else f" [{', '.join(signed(e).lstrip('+') for e in ends)}]"
    return f"{found['mean']:.1f}; {signed(gain['mean'])}{span}"


def bench_table(found: dict[str, Any]) -> str:
    """The overall mean and those of the pillars."""
    rows = [row for row in found["rows"] if len(row["node"]) < 2]
    heads = [
        f"{(row['node'] or ['overall'])[0]} ({row['models'][found['base']]['num_prompts']})"
        for row in rows
    ]
    lines = [[model, *(cell(row, model) for row in rows)] for model in found["models"]]
    head, *body = (f"| {' | '.join(line)} |" for line in (["model", *heads], *lines))
    return "\n".join([head, "|" + "---|" * (1 + len(rows)), *body])


def arena_table(found: dict[str, Any]) -> str:
    """Votes, and the board."""
    lines = [
        f"{found['votes']:,} votes of {len(found['voters'])} simulated raters on "
        f"{found['prompts']} prompts; {100 * found['ties']:.0f} % ties, "
        f"{100 * found['both_bad']:.0f} % both bad.",
        "",
        "| model | Elo | 95 % interval | share of points |",
        "|---|---|---|---|",
    ]
    for row in found["board"]["rows"]:
        span = "anchor" if row["is_anchor"] else f"{row['low']:.0f} to {row['high']:.0f}"
        lines.append(f"| {row['model']} | {row['elo']:.0f} | {span} | {row['score']:.3f} |")
    return "\n".join(lines)


def clear(found: dict[str, Any]) -> str:
    """Every pillar of a model whose p-value, corrected for its criteria, is below 5 %."""
    return "\n".join(
        f"{row['node'][0]} of {model}: {signed(gain['mean'])}, p = {gain['p']:.4f}"
        for row in found["rows"]
        if len(row["node"]) == 1
        for model, gain in row["gains"].items()
        if gain.get("p") is not None and gain["p"] < 0.05
    )


def main(folder: str) -> None:
    place = Path(folder)
    found: dict[str, dict[str, Any]] = {"benches": {}, "arenas": {}}
    for task in TITLES:
        for path in sorted((place / "benches").glob("*.json")):
            bench = json.loads(path.read_text())
            if path.stem.endswith(task):
                found["benches"][task] = bench
        found["arenas"][task] = json.loads((place / "arena" / task / "board.json").read_text())
    NUMBERS.write_text(json.dumps(found) + "\n")
    for task, title in TITLES.items():
        print(f"## {title}: bench\n\n{bench_table(found['benches'][task])}\n")
        print(f"## {title}: arena\n\n{arena_table(found['arenas'][task])}\n")
        print(f"<!-- clear by Holm's p-values:\n{clear(found['benches'][task])}\n-->\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
