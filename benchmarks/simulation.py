"""A step on 8 to 1,024 GPUs, simulated from its parts: compute, waiting, messages, judges.

    python benchmarks/simulation.py [--figures FILE] [--groups 3] [--judges 0.5] [--json]

Each GPU draws its groups micro-batch by micro-batch and hands every one to a pool of judges as soon
as it is drawn; a judge takes one at a time. When all scores are back, which every process waits
for, each trains on its groups, and all wait for each other once more and average their gradients,
as often as there are optimizer steps. What is told is where the time of the slowest goes.

Left out, as small beside the passes: decoding, reading prompts, velocities without gradient that an
algorithm asks for, and that processes meet at every optimizer step and not only at the last.

The parts are measured here or counted here:

* times of micro-batches scatter as those of a real step on this machine do;
* a pass over FLUX.2 [klein] 4B Base has the operations that hollow weights count, and takes what
  `device.py --out FILE` measured on a GPU (`--figures FILE`), or else what a share of a GPU's peak
  gives, which is an assumption and printed as one;
* the same simulation, fed with the processor's seconds of one process here, is held against those
  of two real processes, which is a check of how work is dealt out, and not of messages.
"""

import argparse
import heapq
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpo_step
import numpy as np
import scaling
import torch
from device import REAL, Plan, conditions, make_policy, operations, rollout, states, update

from burnish.runtime import Runtime, choose_device

COUNTS = (8, 16, 64, 256, 1024)
_MESSAGE = 1 << 25
"""Numbers in one of Burnish's messages."""
ROUNDS = 20
"""Steps that are simulated."""


@dataclass(frozen=True)
class Parts:
    """Of a step, on one process."""

    draw: float
    """Seconds of a micro-batch of pictures, without decoding."""
    train: float
    """Seconds of the states of one micro-batch of pictures."""
    scatter: float
    """Standard deviation of these, as a share."""
    gradient_bytes: float
    """In all messages of one optimizer step."""


@dataclass(frozen=True)
class Assumed:
    """What was measured on other machines or not at all."""

    peak_teraflops: float = 789.0
    """Of a large matrix product in bfloat16 on an H200, as `device.py` measured it."""
    drawing_share: float = 0.68
    """Of the peak, measured likewise, with compiled blocks."""
    training_share: float = 0.45
    """Not measured: of the 60 % that the device does in a LoRA's update three quarters are counted
    where all weights are trained and blocks are computed again."""
    gigabytes_in_node: float = 300.0
    gigabytes_between_nodes: float = 40.0
    """A second, each way, of each GPU."""
    node: int = 8
    latency: float = 20e-6
    """Seconds of a message between two."""
    persistent: float = 0.02
    """Standard deviation of how fast GPUs are, as a share."""
    score: float = 0.25
    """Seconds of a judge for one picture, on a GPU of its own."""


def simulate(
    parts: Parts, assumed: Assumed, *, count: int, groups: int, members: int, judges: int,
    updates: int, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Mean seconds of a step and its shares, on `count` processes with so many groups each."""
    rng = np.random.default_rng(seed)
    speed = 1 + assumed.persistent * np.abs(rng.standard_normal(count))
    rows = []
    for _ in range(ROUNDS):
        noise = 1 + parts.scatter * rng.standard_normal((2, count, groups))
        draws, trains = np.maximum(noise, 0.1) * np.array([[[parts.draw]], [[parts.train]]])
        drawn = np.cumsum(draws * speed[:, None], axis=1)
        judged = _last_score(np.sort(drawn, axis=None), judges, members * assumed.score)
        slowest = float(drawn[:, -1].max())
        trained = (trains * speed[:, None]).sum(axis=1)
        message = updates * all_reduce(parts.gradient_bytes, count, assumed)
        rows.append(
            {
                "seconds": max(slowest, judged) + float(trained.max()) + message,
                "compute": float(drawn[:, -1].mean() + trained.mean()),
                "waiting": slowest
                - float(drawn[:, -1].mean())
                + float(trained.max() - trained.mean()),
                "judges": max(0.0, judged - slowest),
                "messages": message,
            }
        )
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def _last_score(arrivals: Sequence[float], judges: int, seconds: float) -> float:
    """When the last of some micro-batches is scored, first come, first served."""
    if not judges:
        return 0.0
    free = [0.0] * judges
    for arrival in arrivals:
        heapq.heapreplace(free, max(free[0], float(arrival)) + seconds)
    return max(free)


def all_reduce(num_bytes: float, count: int, assumed: Assumed) -> float:
    """Seconds to average over all: the slowest link carries everything twice, and each message goes
    up and down a tree, as libraries do it on many GPUs."""
    if count == 1:
        return 0.0
    messages = math.ceil(num_bytes / (4 * _MESSAGE))
    is_one_node = count <= assumed.node
    rate = assumed.gigabytes_in_node if is_one_node else assumed.gigabytes_between_nodes
    carried = 2 * (count - 1) / count * num_bytes / (rate * 1e9)
    return carried + messages * 2 * math.log2(count) * assumed.latency


def counted(sizes: dict[str, int], assumed: Assumed) -> tuple[float, float, float]:
    """Seconds of a micro-batch of pictures and of its states, and weights, of [klein] 4B."""
    rt = Runtime(device=choose_device("cpu"), dtype=torch.bfloat16)
    plan = Plan(rt, 1024, sizes["members"], sizes["steps"], 1, REAL)
    policy = make_policy("flux2_klein", plan, torch.bfloat16, is_hollow=True)
    asked = conditions(policy, "t2i", plan, 0)
    drawing = operations(lambda: rollout(policy, asked, plan, 4.0))
    policy.transformer.train().requires_grad_(True)
    latents = states(policy, plan)
    training = sizes["states"] * operations(lambda: update(policy, asked, plan, latents))
    peak = 1e12 * assumed.peak_teraflops
    weights = sum(parameter.numel() for parameter in policy.transformer.parameters())
    return (
        drawing / (peak * assumed.drawing_share),
        training / (peak * assumed.training_share),
        weights,
    )


def scatter(repeats: int = 12) -> float:
    """Standard deviation of the time of equal steps, as a share of their mean."""
    step = grpo_step.Step(grpo_step.make_policy("stable_diffusion3", 64, 2), "t2i", 1)
    step.run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step.run()
        seconds.append(time.process_time() - start)
    return statistics.stdev(seconds) / statistics.fmean(seconds)


def held_against_reality(spread: float) -> tuple[float, float]:
    """The processor's seconds of a step on two processes: simulated from one, and measured."""
    one, two = (scaling.measure("stable_diffusion3", count, "none") for count in (1, 2))
    share = one["processor"][0] / scaling.GROUPS
    parts = Parts(draw=share / 2, train=share / 2, scatter=spread, gradient_bytes=0)
    found = simulate(
        parts, Assumed(persistent=0), count=2, groups=scaling.GROUPS, members=8, judges=0, updates=1
    )
    return found["seconds"], max(two["processor"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| GPUs | step s | pictures/s | of perfect scaling | compute | waiting for the slowest | "
        "judges | messages |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = [row[name] / row["seconds"] for name in ("compute", "waiting", "judges")]
        shares.append(row["messages"] / row["seconds"])
        cells = [str(row["count"]), f"{row['seconds']:.1f}", f"{row['rate']:.1f}"]
        cells += [f"{row['of_perfect']:.1%}", *(f"{share:.1%}" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(path: Path, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds of a micro-batch of pictures and of its states, from what `device.py` measured, with
    an optimizer step for every micro-batch."""
    found = json.loads(path.read_text())
    rows = {(row["family"], row["work"], row["way"]): row["seconds"] for row in found["rows"]}
    drawing = rows.get(("flux2_klein", "rollout, guidance 4", "compiled"), math.nan)
    way = "all weights, 8-bit AdamW, compiled"
    training = rows.get(("flux2_klein", "update, 100% of blocks again", way), math.nan)
    if math.isnan(drawing + training) or found["resolution"] != 1024:
        raise SystemExit(
            f"need flux2_klein drawn and trained at 1024 pixels in {path}, got no such rows; run "
            "device.py --model flux2_klein --out FILE on a GPU"
        )
    share = sizes["members"] / found["batch"]
    return (
        drawing * share * sizes["steps"] / found["steps"],
        training * share * sizes["states"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A step on many GPUs, simulated from its parts.")
    parser.add_argument("--figures", type=Path, help="what `device.py --out` wrote on a GPU")
    parser.add_argument("--groups", type=int, default=3, help="of each GPU in a step")
    parser.add_argument("--members", type=int, default=16, help="of a group, one micro-batch")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--states", type=int, default=4, help="that a picture is trained on")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of a step")
    parser.add_argument("--judges", type=float, default=0.5, help="GPUs that judge, for each GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    assumed, spread = Assumed(), scatter()
    simulated, measured = held_against_reality(spread)
    sizes = {key: getattr(arguments, key) for key in ("members", "steps", "states")}
    draw, train, weights = counted(sizes, assumed)
    if arguments.figures is not None:
        draw, train = figures(arguments.figures, sizes)
    parts = Parts(draw=draw, train=train, scatter=spread, gradient_bytes=4 * weights)
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        judges = max(1, round(count * arguments.judges))
        found: dict[str, Any] = simulate(
            parts, assumed, count=count, groups=arguments.groups, members=arguments.members,
            judges=judges, updates=arguments.updates,
        )  # fmt: skip
        rate = count * arguments.groups * arguments.members / found["seconds"]
        base = rows[0]["rate"] / rows[0]["count"] if rows else rate / count
        rows.append({"count": count, "rate": rate, "of_perfect": rate / count / base, **found})
    print(f"A step on two real processes: {measured:.2f} s of the processor", end="; ")
    print(f"simulated from one: {simulated:.2f} s.")
    print(f"Parts: {asdict(parts)}\nAssumed: {asdict(assumed)}\n")
    print(table(rows))
    if arguments.json:
        print(json.dumps({"parts": asdict(parts), "assumed": asdict(assumed), "rows": rows}))


if __name__ == "__main__":
    main()
