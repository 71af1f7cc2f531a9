"""What a slow judge costs a step whose scoring overlaps with its sampling.

    python benchmarks/asynchronous.py [--micro-batch 8] [--repeats 6] [--json]

The loop of a real stage of the miniature (`burnish.training.train`, forward-process loss, two
updates) runs with a judge that waits: each picture takes it as long as is needed for all pictures
of a step to take a given share of the time that drawing them takes. The wait stands for a server,
which works on another machine; it takes no time of this one. Shares alternate from step to step, so
that other work on the machine slows all of them. `bound` is the least that any overlap can leave,
the judging of the last micro-batch, as a share of the step. `one after the other` is what the step
would cost if scoring began when all pictures were there: the step without delay and the judge's
time.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from burnish import runtime
from burnish.config import located
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.rewards.base import Reward, RewardSet
from burnish.rewards.oracle import OracleConfig
from burnish.tracking import Run, read_rows
from burnish.training import StageConfig, train
from burnish.types import Score, Scored, ScoreRequest

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of a rollout's length, for the judging of all its pictures."""
WARM_UP = 3
"""Steps without delay, from which a rollout's length is taken."""


class SlowJudge(Reward):
    """One picture after the other, each as late as the step wants it; scores its brightness, which
    costs nothing here."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._turn, self._seen = threading.Lock(), 0
        self.rollout_seconds: list[float] = []
        """Of the steps so far; filled by the caller's clock."""

    def share(self, step: int) -> float:
        return 0.0 if step < WARM_UP else SHARES[(step - WARM_UP) % len(SHARES)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores: list[Score] = [Scored(value=float(r.image.mean())) for r in requests]
        with self._turn:
            step = self._seen // self._images
            self._seen += len(requests)
            if share := self.share(step):
                length = statistics.median(self.rollout_seconds[1:WARM_UP])
                time.sleep(share * length * len(requests) / self._images)
        return scores


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """One row for each share: seconds of a step, and what the delay added to it."""
    rt = runtime.start(runtime.RuntimeConfig(threads=arguments.threads))
    images = arguments.prompts * arguments.group_size
    judge = SlowJudge(images)
    stage = StageConfig.model_validate(
        {
            "steps": WARM_UP + len(SHARES) * arguments.repeats,
            "save_every": 10**6,
            "prompts_per_step": arguments.prompts,
            "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"]},
            "rollout": {
                "num_steps": 6,
                "guidance_scale": 2.0,
                "group_size": arguments.group_size,
                "window": 0,
                "keep": "none",
                "micro_batch": arguments.micro_batch,
            },
            "rewards": {"quality": {"kind": "oracle", "dimension": "quality"}},
            "algorithm": {"kind": "nft", "anchor": "guided", "noise_range": [0.05, 1.0]},
            "optimizer": {"learning_rate": 1e-6, "num_updates": 2},
        }
    )
    policy = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    slow = RewardSet({"quality": OracleConfig(dimension="quality")}, {"quality": judge})
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", stage, environment={})
        log = run.log

        def logged(step: int, row: dict[str, float]) -> None:
            log(step, row)
            judge.rollout_seconds.append(
                read_rows(run.folder / "timings.jsonl")[-1]["time/rollout"]
            )

        with (
            mock.patch.object(RewardSet, "build", return_value=slow),
            mock.patch.object(run, "log", logged),
        ):
            train(stage, lambda: policy, run, rt, seed=0, label="steps")
        times = read_rows(run.folder / "timings.jsonl")
    return _rows(judge, times, micro_batches=-(-images // arguments.micro_batch))


def _rows(
    judge: SlowJudge, times: Sequence[dict[str, float]], micro_batches: int
) -> list[dict[str, float]]:
    steps = [sum(row[f"time/{part}"] for part in ("rollout", "credit", "update")) for row in times]
    length = statistics.median(judge.rollout_seconds[1:WARM_UP])
    first = range(WARM_UP, len(steps), len(SHARES))
    rows = []
    for place, share in enumerate(SHARES):
        # Each delayed step beside the step without delay of its own round.
        added = [(steps[start + place] - steps[start]) / steps[start] for start in first]
        plain = statistics.median(steps[start] for start in first)
        rows.append(
            {
                "share": share,
                "judge_seconds": share * length,
                "step_seconds": statistics.median(steps[start + place] for start in first),
                "added": statistics.median(added),
                "added_low": min(added),
                "added_high": max(added),
                "bound": share * length / micro_batches / plain,
                "one_after_the_other": share * length / plain,
            }
        )
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    lines = [
        "| judge's time, of a rollout | judge s | step s | added to the step | bound | "
        "one after the other |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['share']:.0%} | {row['judge_seconds']:.2f} | {row['step_seconds']:.2f} | "
            f"{row['added']:+.1%} ({row['added_low']:+.1%} to {row['added_high']:+.1%}) | "
            f"{row['bound']:.1%} | {row['one_after_the_other']:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a slow judge costs a training step.")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8, help="pictures drawn at once")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    arguments = parser.parse_args()
    rows = measure(arguments)
    print(table(rows))
    if arguments.json:
        print(json.dumps({"arguments": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
