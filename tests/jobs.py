"""A training stage as a run starts it, in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from burnish import launcher, revision
from burnish.jobs import run_job
from burnish.run_config import RunConfig
from burnish.tracking import Run

JOB = "train/stage"
"""Of the recipes that these start, whose stage is called so."""


def begin(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    """The stage's job, as a run starts it."""
    revision.take_up(config, folder)
    Run.create(folder, config)
    command = launcher.command(config.runtime, folder, JOB)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def finish(config: RunConfig, folder: Path) -> Path:
    """The stage's folder, once it is trained: by processes of its own, or by this one if it needs
    one alone, as starting it takes longer than its work."""
    if config.runtime.processes == 1:
        revision.take_up(config, folder)
        Run.create(folder, config)
        run_job(config, folder, JOB, config.runtime.build())
    else:
        assert begin(config, folder).wait(timeout=600) == 0
    return folder / "stages" / "stage"


def run_together(program: str, processes: int, *arguments: str) -> None:
    """Run a program of the tests in several processes that talk to each other."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*start, "--standalone", program, *arguments], env=env, check=True, timeout=300)


def distance(one: Path, other: Path) -> float:
    """Largest difference of the transformers of two pipelines."""
    file = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(one / file), load_file(other / file)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
