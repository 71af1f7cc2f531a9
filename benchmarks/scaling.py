"""Weak scaling: a stage on 1, 2 and 4 processes with as many groups for each.

    python benchmarks/scaling.py [--family qwen_image21] [--sharding none full] [--json]

Every process has three groups of eight pictures a step, real processes started by torchrun, which
talk over gloo. Told for each number of them: seconds of a step, the processor's seconds of each
process (the slowest and the fastest), and the share of the time that they wait in collective calls.
With more processes than cores they also wait for a core, so the processor's seconds are the
measure: perfect scaling keeps them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from burnish.config import parse
from burnish.policy_config import load_policy
from burnish.run_config import RunConfig
from burnish.runtime import RuntimeConfig
from burnish.shelves import families, policy_class
from burnish.tracking import Run
from burnish.training import train

STEPS = 3
GROUPS = 3


def recipe(family: str, model: str, processes: int) -> RunConfig:
    """A stage by the forward process, rewarded by the oracle."""
    task = policy_class(family).tasks[0]
    stage = {
        "steps": STEPS,
        "prompts_per_step": GROUPS * processes,
        "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": [task]},
        "rollout": {"num_steps": 6, "group_size": 8, "window": 0, "keep": "none"},
        "rewards": {"truth": {"kind": "oracle", "floor": 0.01}},
        "algorithm": {"kind": "nft"},
        "optimizer": {"num_updates": 1, "micro_batch": 32},
    }
    return parse(
        RunConfig,
        {
            "name": "scaling",
            "policy": {"family": family, "path": model, "resolution": 64},
            "stages": {"stage": stage},
            "judge": {"kind": "oracle"},
        },
    )


class Waiting:
    """Seconds inside the collective calls of this process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("all_reduce", "all_gather", "barrier", "broadcast"):
            setattr(torch.distributed, name, self._timed(getattr(torch.distributed, name)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return found

        return timed


def work(family: str, model: str, sharding: Any, out: Path) -> None:
    """One process of the stage; leaves its times in a file."""
    rt = RuntimeConfig(device="cpu", threads=1, sharding=sharding).build()
    config = recipe(family, model, rt.world_size)
    policy = load_policy(config.policy, Path(model), rt)
    stage = config.stages["stage"]
    with rt.main_first():
        run = Run.create(out / "run", stage) if rt.is_main else Run.open(out / "run")
    rt.barrier()
    waiting = Waiting()
    wall, processor = time.perf_counter(), time.process_time()
    train(stage, lambda: policy, run, rt, seed=0, label="stage")
    facts = {
        "seconds": (time.perf_counter() - wall) / STEPS,
        "processor": (time.process_time() - processor) / STEPS,
        "waited": waiting.seconds / STEPS,
    }
    (out / f"rank-{rt.rank}.json").write_text(json.dumps(facts))
    rt.close()


def measure(family: str, processes: int, sharding: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, model = Path(folder), Path(folder) / "model"
        policy_class(family).tiny().save(model)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), __file__, "--worker", str(out)]
        command += ["--family", family, "--sharding", sharding]
        subprocess.run(command, check=True, capture_output=True)
        ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
    return {
        "sharding": sharding,
        "processes": processes,
        "seconds": max(rank["seconds"] for rank in ranks),
        "processor": [rank["processor"] for rank in ranks],
        "waiting": [rank["waited"] / rank["seconds"] for rank in ranks],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| weights | processes | step s | processor s, slowest and fastest | to one process | "
        "waiting share, least and most |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, waits = row["processor"], row["waiting"]
        lines.append(
            f"| {'spread' if row['sharding'] == 'full' else 'whole'} | {row['processes']} | "
            f"{row['seconds']:.2f} | {max(own):.2f}, {min(own):.2f} | "
            f"{max(own) / max(rows[0]['processor']):.2f}x | {min(waits):.0%}, {max(waits):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="As many groups for each of several processes.")
    parser.add_argument("--family", choices=families(), default="stable_diffusion3")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--sharding", nargs="+", choices=("none", "full"), default=["none", "full"])
    parser.add_argument(
        "--worker", type=Path, help="what the processes themselves are started with"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        model = str(arguments.worker / "model")
        work(arguments.family, model, arguments.sharding[0], arguments.worker)
        return
    rows = [
        measure(arguments.family, count, sharding)
        for sharding in arguments.sharding
        for count in arguments.processes
        if sharding == "none" or count > 1
    ]
    print(table(rows))
    if arguments.json:
        print(json.dumps({"family": arguments.family, "rows": rows}))


if __name__ == "__main__":
    main()
