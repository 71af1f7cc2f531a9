"""The memory that a stage was planned to need, and what its process came to.

    python benchmarks/planning.py [--recipe miniature] [--steps 2] [KEY=VALUE ...] [--json]

Each stage of a recipe is trained for a few steps in a process of its own, from the base; where it
has teachers, the base stands for them. The evaluation draws one micro-batch of each set and task.
`held` is the peak of the process's resident memory, `planned` what `burnish doctor --recipe` says
that it needs, allowance included. On a GPU both are without the context that a process has there.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from burnish import runtime
from burnish.algorithms.distill import DistillConfig
from burnish.cli.recipes import recipe_path
from burnish.config import load, located
from burnish.evaluation import measure
from burnish.forecast import forecast
from burnish.planning import PROCESS_BYTES
from burnish.policies.base import Policy
from burnish.prompts import read_prompts
from burnish.run_config import BASE, RunConfig
from burnish.runtime import Runtime
from burnish.shelves import load_policy
from burnish.stages import with_folders
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--recipe", default="miniature")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument("--one", metavar="STAGE", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = load(RunConfig, recipe_path(arguments.recipe), arguments.overrides)
    if arguments.one:
        print(json.dumps({"held": held(config, arguments.one, arguments.steps)}))
        return
    device = runtime.choose_device(config.runtime.device).type
    print("| stage | planned MiB | held MiB | planned / held |\n|---|---|---|---|")
    rows = []
    for plan in forecast(config, device):
        command = [sys.executable, __file__, "--recipe", arguments.recipe, "--one", plan.stage]
        command += ["--steps", str(arguments.steps), *arguments.overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        context = PROCESS_BYTES[device] if device == "cuda" else 0
        row = {"stage": plan.stage, "planned": plan.needed - context}
        row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        cells = [f"{row[key] / 2**20:.0f}" for key in ("planned", "held")]
        print(f"| {plan.stage} | {' | '.join(cells)} | {row['planned'] / row['held']:.2f} |")
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
