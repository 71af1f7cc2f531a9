"""Time of one training step of `qwen_image21`: drawing groups and updating on kept states.

    python benchmarks/step.py [--task t2i edit] [--group-size 16] [--bfloat16] [--json]

Two ways of doing the same work are compared. *shared*: keys and values of text and source image are
computed once per prompt and used by the whole group and all its steps, as Burnish does. *full*:
each call runs every sample's whole sequence (`policy.share_prefix=false`). Repetitions of
the two alternate, medians are shown, and a ratio is the median over pairs of neighbours, so that
other work on the machine slows both. Encoding the prompts is not part of a step: it is cached.

`network` is the share of time inside the transformer, forward and backward, `decoder` that of the
VAE's decoder; what is left is Burnish. `memory` is what the work adds to the process at its peak,
measured in a fork of its own.

Without `--model` the weights are random at the miniature's size: 6 layers of 6 heads of 32, images
of 64 x 64 pixels, about 35 text tokens and, for edits, 16 source tokens.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.types import Prompt, Task, Trajectory

# A token per byte: about as many tokens as a long prompt of the miniature has.
TEXTS = ("two red cats", "a house at night", "the word SUN", "a smiling woman", "three stars")


@dataclass
class Clock:
    """Seconds inside the transformer."""

    inside: float = 0.0
    entered: float = 0.0

    def enter(self, *_: object) -> None:
        self.entered = now()

    def leave(self, *_: object) -> None:
        self.inside += now() - self.entered


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_prompts(task: Task, count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    prompts = []
    for row in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        sources = (buffer.getvalue(),) if task == "edit" else ()
        text = TEXTS[row % len(TEXTS)]
        prompts.append(Prompt(id=str(row), text=text, task=task, sources=sources))
    return prompts


def update(
    policy: QwenImage21Policy,
    prompts: Sequence[Prompt],
    paths: Sequence[Sequence[Trajectory]],
    optimizer: torch.optim.Optimizer,
    clock: Clock,
) -> None:
    """One optimizer step on all kept states; a micro-batch is a group."""
    for prompt, group in zip(prompts, paths, strict=True):
        latents = torch.cat([path.latents for path in group])
        sigmas = torch.cat([path.sigmas for path in group])
        target = torch.cat([path.guided for path in group])
        prefix = policy.prefix(policy.encode([prompt])).take([0] * len(latents))
        velocity = policy.velocity(latents, sigmas, prefix)
        loss = (velocity - target.to(velocity)).square().mean()
        clock.enter()
        loss.backward()
        clock.leave()
    optimizer.step()
    optimizer.zero_grad()


def added_memory(work: Callable[[], object]) -> float:
    """MiB at the peak of `work`, above what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    # What earlier work freed goes back to the system, or the fork would use it unseen.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Thread pools do not survive a fork.
        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, str(after - before).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        kibibytes = int(pipe.read())
    os.waitpid(child, 0)
    return kibibytes / 1024


@dataclass
class Stage:
    """Drawing or updating, one way of doing it."""

    name: str
    work: Callable[[], object]
    clock: Clock
    decoder: Clock
    seconds: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    """Share of each run inside the transformer."""
    decoding: list[float] = field(default_factory=list)

    def run(self) -> None:
        self.clock.inside = self.decoder.inside = 0.0
        start = now()
        self.work()
        seconds = now() - start
        self.seconds.append(seconds)
        self.network.append(self.clock.inside / seconds)
        self.decoding.append(self.decoder.inside / seconds)


def make_stages(arguments: argparse.Namespace, task: Task) -> dict[str, dict[str, Stage]]:
    """Stage -> way -> what to time; both ways share weights, prompts and kept states."""
    torch.manual_seed(0)
    if arguments.model:
        pipeline = QwenImage21Policy.load(arguments.model, device=arguments.device).pipeline
    else:
        pipeline = assemble(byte_tokenizer()).to(arguments.device)
    clock, decoder = Clock(), Clock()
    for module, watch in ((pipeline.transformer, clock), (pipeline.vae.decoder, decoder)):
        module.register_forward_pre_hook(watch.enter)
        module.register_forward_hook(watch.leave)
    ways = {
        way: QwenImage21Policy(pipeline, resolution=arguments.resolution)
        for way in ("shared", "full")
    }
    ways["full"].share_prefix = False
    prompts = make_prompts(task, arguments.prompts)
    settings = RolloutConfig(
        num_steps=arguments.steps,
        group_size=arguments.group_size,
        guidance_scale=arguments.guidance_scale,
        keep=arguments.trained_steps,
        micro_batch=arguments.group_size,
    )
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), lr=1e-6)
    stages: dict[str, dict[str, Stage]] = {"rollout": {}, "update": {}}
    for way, policy in ways.items():
        groups = sample(policy, prompts, settings, seed=0, step=0)
        paths = [group.trajectories for group in groups]

        def rollout(policy=policy) -> None:
            sample(policy, prompts, settings, seed=0, step=1)

        def train(policy=policy, paths=paths) -> None:
            update(policy, prompts, paths, optimizer, clock)

        train()
        stages["rollout"][way] = Stage(f"{task} rollout", rollout, clock, decoder)
        stages["update"][way] = Stage(f"{task} update", train, clock, decoder)
    return stages


def measure(stage: dict[str, Stage], repeats: int, images: int) -> dict[str, float | str]:
    """Alternate the two ways; their medians and the median ratio of neighbours."""
    for repeat in range(repeats):
        order = ("shared", "full") if repeat % 2 == 0 else ("full", "shared")
        for way in order:
            stage[way].run()
    ratios = [
        full / shared
        for shared, full in zip(stage["shared"].seconds, stage["full"].seconds, strict=True)
    ]
    row: dict[str, float | str] = {"stage": stage["shared"].name}
    for way in ("shared", "full"):
        row[f"{way}_ms_per_image"] = 1000 * statistics.median(stage[way].seconds) / images
        row[f"{way}_network"] = statistics.median(stage[way].network)
        row[f"{way}_decoder"] = statistics.median(stage[way].decoding)
        row[f"{way}_memory_mib"] = added_memory(stage[way].work)
    row["ratio"] = statistics.median(ratios)
    row["ratio_low"], row["ratio_high"] = min(ratios), max(ratios)
    return row


def table(rows: Sequence[dict[str, float | str]]) -> str:
    lines = [
        f"{'':14}{'ms per image':>18}{'full / shared':>24}{'network':>16}{'decoder':>16}"
        f"{'memory MiB':>18}",
        f"{'':14}{'shared':>9}{'full':>9}{'median':>9}{'min':>7}{'max':>8}"
        f"{'shared':>9}{'full':>7}{'shared':>9}{'full':>7}{'shared':>9}{'full':>9}",
    ]
    for row in rows:
        lines.append(
            f"{row['stage']:14}{row['shared_ms_per_image']:9.2f}{row['full_ms_per_image']:9.2f}"
            f"{row['ratio']:8.2f}x{row['ratio_low']:6.2f}x{row['ratio_high']:7.2f}x"
            f"{row['shared_network']:9.0%}{row['full_network']:7.0%}"
            f"{row['shared_decoder']:9.0%}{row['full_decoder']:7.0%}"
            f"{row['shared_memory_mib']:9.0f}{row['full_memory_mib']:9.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time rollout and update, prefix shared or not.")
    parser.add_argument("--task", nargs="+", choices=("t2i", "edit"), default=["t2i", "edit"])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="sampler steps")
    parser.add_argument(
        "--trained-steps", type=int, default=4, help="states a sample is trained on"
    )
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="pipeline folder instead of random weights")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--bfloat16", action="store_true", help="run under autocast")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = arguments.prompts * arguments.group_size
    rows = []
    with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bfloat16):
        for task in arguments.task:
            for stage in make_stages(arguments, task).values():
                rows.append(measure(stage, arguments.repeats, images))
    print(
        f"{arguments.prompts} prompts x {arguments.group_size} samples, {arguments.steps} steps at "
        f"guidance {arguments.guidance_scale:g}, {arguments.trained_steps} trained states each, "
        f"{'bfloat16 autocast' if arguments.bfloat16 else 'float32'}, {arguments.device}, "
        f"{arguments.threads} thread(s), medians of {arguments.repeats}"
    )
    print(table(rows))
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
