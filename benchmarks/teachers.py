"""Memory of a distillation by the number of its teachers.

    python benchmarks/teachers.py [--model FOLDER] [--steps 16] [--json]

One teacher computes at a time, and only that one is on the device; the others are on disk. So the
peak must not grow with their number. On a GPU `device` is what its allocator held at the peak; on a
CPU it is what all tensors held that operations made or modules hold, counted by operation, which
simulates a device beside the host. `host` is the peak of the process's resident memory, where
the next teacher is read while the current one computes. Every number of teachers is measured in a
process of its own; the teachers take turns on the same prompts.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from burnish import runtime
from burnish.activations import Live, weights
from burnish.algorithms.base import StageContext
from burnish.algorithms.distill import Distill, DistillConfig, TeacherConfig
from burnish.batches import stack
from burnish.config import located
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompts import read_prompts
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.types import Guidance, Prompt

COUNTS = (1, 2, 4, 8)
CATEGORIES = ("general", "landscape", "portrait", "typography")
# Edits first, whose states need the most memory, so that the work has one peak for every number.
LABELS = tuple(f"{task}/{category}" for task in ("edit", "t2i") for category in CATEGORIES)
ROLLOUT = RolloutConfig(num_steps=4, guidance_scale=1.0, group_size=2, window=0, keep=2)


def write_teachers(model: Path, folder: Path) -> None:
    """Eight models of one base."""
    policy = QwenImage21Policy.load(model, resolution=64)
    for number in range(max(COUNTS)):
        with torch.no_grad():
            for parameter in policy.transformer.parameters():
                draws = torch.Generator().manual_seed(number)
                parameter += 0.01 * torch.randn(parameter.shape, generator=draws)
        policy.save(folder / str(number))


def prompts_of(label: str, count: int) -> list[Prompt]:
    """The same prompts of a task for each of its labels, so that only teachers differ."""
    task, _, category = label.partition("/")
    every = read_prompts(located("embedded:prompts/train.jsonl"))
    found = [prompt for prompt in every if prompt.task == task][:count]
    return [dataclasses.replace(prompt, category=category) for prompt in found]


def measure(model: Path, folder: Path, count: int, steps: int) -> dict[str, Any]:
    """Peaks of a distillation with so many teachers, in bytes."""
    rt = runtime.start()
    policy = QwenImage21Policy.load(model, resolution=64, device=rt.device)
    policy.transformer.requires_grad_(True)
    labels = LABELS[:count]
    teachers = {
        label: TeacherConfig(path=str(folder / str(place)), guidance_scale=2.0)
        for place, label in enumerate(labels)
    }
    context = StageContext(
        policy=policy, guidance=Guidance(), num_steps=ROLLOUT.num_steps, steps=steps,
        kernel="ode", noise_level=0.0, num_updates=1, micro_batch=32, seed=0, rewards={},
    )  # fmt: skip
    algorithm = Distill(DistillConfig(teachers=teachers), context)
    optimizer = torch.optim.AdamW(policy.transformer.parameters(), lr=1e-4)
    components = [m for m in policy.pipeline.components.values() if isinstance(m, nn.Module)]
    networks = [*components, algorithm._teachers._resident.transformer]
    with Live(held=weights(*networks)) as held:
        for step in range(steps):
            asked = prompts_of(labels[step % count], 4)
            drawn = sample(policy, asked, ROLLOUT, seed=0, step=step)
            batch = stack(algorithm.credit(drawn, step)[0], policy.device)
            algorithm.loss(policy, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    on_gpu = policy.device.type == "cuda"
    return {
        "teachers": count,
        "device": torch.cuda.max_memory_allocated() if on_gpu else held.peak,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "teacher": sum(p.nbytes for p in policy.transformer.parameters()),
        "is_simulated": not on_gpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=located("embedded:weights/base"))
    parser.add_argument("--steps", type=int, default=16, help="of each number of teachers")
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, count = arguments.one
        print(json.dumps(measure(arguments.model, Path(folder), int(count), arguments.steps)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_teachers(arguments.model, Path(folder))
        for count in COUNTS:
            command = [sys.executable, __file__, "--one", folder, str(count)]
            command += ["--model", str(arguments.model), "--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    kind = "simulated device" if rows[0]["is_simulated"] else torch.cuda.get_device_name()
    size = rows[0]["teacher"] / 2**20
    print(f"{kind}; {arguments.steps} steps; one teacher has {size:.1f} MiB\n")
    print("| teachers | device MiB | to one teacher | host MiB | to one teacher |")
    print("|---|---|---|---|---|")
    for row in rows:
        cells = [str(row["teachers"])]
        for place in ("device", "host"):
            share = row[place] / rows[0][place] - 1
            cells += [f"{row[place] / 2**20:.1f}", f"{100 * share:+.1f} %"]
        print(f"| {' | '.join(cells)} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
