"""What a GRPO step costs as it grows: time and memory over each of its sizes.

    python benchmarks/cost.py [--family qwen_image21 stable_diffusion3] [--repeats 3] [--json]

One size changes at a time: members of a group, sampler steps, prompts, side of the picture, and
source images of an edit. Time is that of the process on the processor. Memory is the peak of all
tensors that the step makes, with the micro-batches that stay as they are: what grows with members,
prompts and steps is what a step keeps of its pictures.

*Straight* is the largest distance of a time from the line through all of them, as a share of that
time. *Doubling* is by what factor time grows when the size doubles at the large end, which is less
than two as far as a part of the step does not grow, and more where attention does.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from grpo_step import ROLLOUT, Step, make_policy, shrink_sources

from burnish.activations import Live, weights
from burnish.shelves import families, policy_class

LAYERS = 4
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Size:
    """All that makes a step large."""

    members: int = 8
    steps: int = 6
    prompts: int = 2
    side: int = 64
    references: int = 0


VALUES: dict[str, tuple[int, ...]] = {
    "members": (4, 8, 16, 32),
    "steps": (4, 8, 12, 16),
    "prompts": (2, 4, 8, 16),
    "side": (64, 96, 128, 192),
    "references": (1, 2, 3, 4),
}


def make_step(family: str, size: Size) -> Step:
    rollout = ROLLOUT.model_copy(update={"group_size": size.members, "num_steps": size.steps})
    return Step(
        make_policy(family, size.side, LAYERS),
        "edit" if size.references else "t2i",
        size.prompts,
        rollout,
        size.references,
    )


def measure(family: str, size: Size, repeats: int) -> tuple[float, float]:
    """Seconds of a step, and MiB of its tensors at their peak."""
    step = make_step(family, size)
    step.run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step.run()
        seconds.append(time.process_time() - start)
    with Live(ignored=list(weights(*step.policy.networks().values()))) as live:
        step.run()
    return statistics.median(seconds), live.peak / _MEBIBYTE


def sweep(family: str, name: str, repeats: int) -> dict[str, Any]:
    """One size at several values, the others as they are."""
    values = [value for value in VALUES[name] if name != "references" or value <= _most(family)]
    found = [
        measure(family, Size(**{name: value}), repeats)  # pyright: ignore[reportArgumentType]
        for value in values
    ]
    seconds, memory = zip(*found, strict=True)
    # Work is by places of the picture, not by its side.
    sizes = [value**2 if name == "side" else value for value in values]
    slope, start = np.polyfit(sizes, seconds, 1)
    fitted = [start + slope * size for size in sizes]
    return {
        "family": family,
        "size": name,
        "values": values,
        "seconds": seconds,
        "memory": memory,
        "straight": max(abs(a - b) / a for a, b in zip(seconds, fitted, strict=True)),
        "doubling": 2 ** _exponent(sizes[-2:], seconds[-2:]),
    }


def _exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    return float(np.log(seconds[1] / seconds[0]) / np.log(sizes[1] / sizes[0]))


def _most(family: str) -> int:
    return policy_class(family).max_sources


HEADER = """\
| family | size | values | seconds | MiB | straight to | doubling |
|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    size = "places (side²)" if row["size"] == "side" else row["size"]
    return (
        f"| {row['family']} | {size} | {', '.join(map(str, row['values']))} | "
        f"{', '.join(f'{value:.2f}' for value in row['seconds'])} | "
        f"{', '.join(f'{value:.0f}' for value in row['memory'])} | "
        f"{row['straight']:.0%} | {row['doubling']:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a step over its sizes.")
    default = ["qwen_image21", "stable_diffusion3"]
    drawing = [name for name in families() if "t2i" in policy_class(name).tasks]
    parser.add_argument("--family", nargs="+", choices=drawing, default=default)
    parser.add_argument("--size", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shrink_sources(Size.side)
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for family, name in itertools.product(arguments.family, arguments.size):
        if name != "references" or _most(family):
            rows.append(sweep(family, name, arguments.repeats))
            # As it is measured: all of them take a quarter of an hour.
            print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
