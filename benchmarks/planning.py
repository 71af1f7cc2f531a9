"""The memory that a stage was planned to need, and what its process came to.

    python benchmarks/planning.py [--recipe miniature] [--stage NAME ...] [--steps 2]
        [--drawn TEACHERS] [KEY=VALUE ...] [--json]

Each stage of a recipe is trained for a few steps in a process of its own, from the base; where it
has teachers, the base stands for them. The evaluation draws one micro-batch of each set and task.

`--drawn` is for the recipes of real models: it writes a model of the published sizes with random
weights and prompts, and so many teachers alike, up to four. A stage with rewards needs another
judge than these recipes name.

`held` is the peak of the process's resident memory, `planned` what `burnish doctor --recipe` says
that it needs, allowance included. On a GPU both are without the context that a process has there.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from real_memory import CATEGORIES, draw_weights, write_inputs

from burnish import runtime
from burnish.algorithms.distill import DistillConfig
from burnish.cli.recipes import recipe_path
from burnish.config import load, located
from burnish.evaluation import measure
from burnish.planning.forecast import forecast
from burnish.planning.plan import PROCESS_BYTES
from burnish.policies.base import Policy
from burnish.policy_config import load_policy
from burnish.prompts import read_prompts
from burnish.run_config import BASE, RunConfig
from burnish.run_folder import with_folders
from burnish.runtime import Runtime
from burnish.tracking import Run
from burnish.training import StageConfig, train


def shortened(config: RunConfig, name: str, steps: int) -> StageConfig:
    """A stage of a few steps that waits for no other one."""
    stage = with_folders(config, config.stages[name], Path())
    changes: dict[str, Any] = {"steps": steps, "curation": None}
    if isinstance(stage.algorithm, DistillConfig):
        base = str(located(config.policy.path))
        teachers = {
            label: teacher.model_copy(update={"path": base})
            if teacher.path.startswith("stage:")
            else teacher
            for label, teacher in stage.algorithm.teachers.items()
        }
        # Guided teachers, from whom the unguided student has something to learn.
        changes["algorithm"] = stage.algorithm.model_copy(update={"teachers": teachers})
    return stage.model_copy(update=changes)


def held(config: RunConfig, name: str, steps: int) -> int:
    """Peak of the memory that this process had from its device, in bytes, after it has trained."""
    rt = config.runtime.build()
    policy = load_policy(config.policy, located(config.policy.path), rt)
    if name == "evaluation":
        draw_once(config, policy, rt)
        return peak(rt)
    stage = shortened(config, name, steps)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / name, stage, environment=rt.describe())
        train(stage, lambda: policy, run, rt, seed=config.seed, label=name)
    return peak(rt)


def peak(rt: Runtime) -> int:
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw_once(config: RunConfig, policy: Policy[Any, Any], rt: Runtime) -> None:
    """Measure a policy on as many prompts of each task as are drawn together."""
    plan = config.evaluation
    for path, count in ((plan.prompts, plan.num_prompts), (plan.knowledge, plan.num_knowledge)):
        for task in config.tasks(BASE) if path else ():
            asked = read_prompts(located(path or "")).select(lambda p, task=task: p.task == task)
            measure(
                policy,
                asked[: min(plan.micro_batch, count)],
                config.judge.build(),
                rt,
                name="base",
                config=plan,
                guidance=config.deployed(BASE),
                num_seeds=1,
            )


def drawn(recipe: str, folder: Path, count: int) -> list[str]:
    """Write a model with random weights and its teachers; the settings that name them."""
    given = write_inputs(recipe, folder)
    config = load(RunConfig, recipe_path(recipe), given)
    draw_weights(config.policy.family, folder / "model", runtime.choose_device("auto"))
    for number in range(count):
        # The same bytes on the disk under another name.
        shutil.copytree(folder / "model", folder / f"teacher{number}", copy_function=os.link)
    labels = [f"{task}/{category}" for category in CATEGORIES for task in ("edit", "t2i")]
    teachers = [
        f"{label}: {{path: {folder / f'teacher{place % count}'}, guidance_scale: 4.0}}"
        for place, label in enumerate(labels)
    ]
    return [*given, f"stages.student.algorithm.teachers={{{', '.join(teachers)}}}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--recipe", default="miniature")
    parser.add_argument("--stage", nargs="+", help="instead of all, and `evaluation`")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--drawn", type=int, choices=range(1, 5), help="teachers of a model of random weights"
    )
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--one", metavar="STAGE", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.one:
        config = load(RunConfig, recipe_path(arguments.recipe), arguments.overrides)
        print(json.dumps({"held": held(config, arguments.one, arguments.steps)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.drawn:
            given = drawn(arguments.recipe, Path(folder), arguments.drawn)
            arguments.overrides = [*given, *arguments.overrides]
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Plan and train every stage, and print both."""
    config = load(RunConfig, recipe_path(arguments.recipe), arguments.overrides)
    device = runtime.choose_device(config.runtime.device).type
    print("| stage | planned MiB | held MiB | planned / held |\n|---|---|---|---|")
    rows = []
    for plan in forecast(config, device):
        if arguments.stage and plan.stage not in arguments.stage:
            continue
        command = [sys.executable, __file__, "--recipe", arguments.recipe, "--one", plan.stage]
        command += ["--steps", str(arguments.steps), *arguments.overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        context = PROCESS_BYTES[device] if device == "cuda" else 0
        row = {"stage": plan.stage, "planned": plan.needed - context}
        row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        cells = [f"{row[key] / 2**20:.0f}" for key in ("planned", "held")]
        cells.append(f"{row['planned'] / row['held']:.2f}")
        print(f"| {plan.stage} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
