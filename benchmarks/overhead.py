"""What Burnish adds to the network calls of one GRPO step, and where the time of the step goes.

    python benchmarks/overhead.py [--family stable_diffusion3 qwen_image] [--repeats 5] [--json]

A step draws groups with guidance, decodes them, turns scores into advantages, and makes one
optimizer step on the kept states. *bare* makes the same calls again, recorded from a step of
Burnish's: every forward pass of the transformer with the same inputs, a backward pass where there
was one, the decoder, the optimizer. It is the least that the step could take. Both alternate, and
time is that of the process on the processor, so that other work on the machine counts little.

The pipelines have random weights at sizes that two cores can train: 6 layers, 128 wide or more,
pictures of 128 x 128 pixels. Scores are given, as a judge is nobody's overhead, and prompts are
read once in a run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from burnish import images
from burnish.algorithms.base import Setting
from burnish.algorithms.grpo import GrpoConfig
from burnish.optimization import OptimizerConfig, State
from burnish.policies.base import Policy
from burnish.rewards.oracle import OracleConfig
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import ALONE
from burnish.shelves import families, policy_class
from burnish.types import Prompt, Scored
from burnish.updates import update

LAYERS = 6
HEADS = 8
PARTS = ("encode", "network", "backward", "decode")
"""What is not Burnish's own; the rest of a step is."""
ROLLOUT = RolloutConfig(num_steps=6, guidance_scale=3.0, group_size=8, window=2, micro_batch=16)
OPTIMIZER = OptimizerConfig(num_updates=1, micro_batch=16)
REWARDS = {"given": OracleConfig()}


def make_policy(family: str, resolution: int) -> Policy[Any, Any]:
    """A family's tiny pipeline with a larger transformer of random weights."""
    kind = policy_class(family)
    pipeline: Any = kind.tiny().pipeline
    old = pipeline.transformer
    changes = {"num_layers": LAYERS, "num_attention_heads": HEADS}
    if "caption_projection_dim" in old.config:
        changes["caption_projection_dim"] = HEADS * old.config.attention_head_dim
    torch.manual_seed(0)
    pipeline.transformer = type(old).from_config({**old.config, **changes})
    policy: Any = kind(pipeline, resolution=resolution)
    return policy


def make_prompts(policy: Policy[Any, Any], count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    task = policy.tasks[0]
    found = []
    for row in range(count):
        picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
        source = images.encode_png(picture) if task == "edit" else None
        found.append(Prompt(id=str(row), text=f"{row} red cats", task=task, source=source))
    return found


class Step:
    """One step after another of one policy."""

    def __init__(self, policy: Policy[Any, Any], prompts: Sequence[Prompt]) -> None:
        self.policy, self.prompts = policy, prompts
        policy.transformer.requires_grad_(True)
        self.state = State.start(policy, OPTIMIZER)
        self.algorithm = GrpoConfig().build(
            Setting(
                policy=policy,
                guidance=ROLLOUT.guidance,
                sampler_steps=ROLLOUT.num_steps,
                num_steps=100,
                kernel=ROLLOUT.kernel,
                noise_level=ROLLOUT.noise_level,
                num_updates=OPTIMIZER.num_updates,
                micro_batch=OPTIMIZER.micro_batch,
                seed=0,
                rewards=REWARDS,
            )
        )
        # The first step also proves that sampler and trainer agree; the others are what costs.
        self.state.step = 1

    def run(self) -> None:
        groups = sample(self.policy, self.prompts, ROLLOUT, seed=0, step=self.state.step)
        given = tuple(Scored(value=place / ROLLOUT.group_size) for place in range(8))
        scored = [replace(group, scores={"given": given}) for group in groups]
        signals, _ = self.algorithm.credit(scored, self.state.step)
        update(
            OPTIMIZER,
            self.algorithm,
            self.state,
            ALONE,
            self.prompts,
            signals,
            seed=0,
            total=100,
        )
        self.state.step += 1


class Recorder:
    """The calls of the networks in one step, and the seconds in each part."""

    def __init__(self, policy: Policy[Any, Any]) -> None:
        self._policy: Any = policy
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        network, vae, backward = self._policy.transformer, self._policy.vae, torch.Tensor.backward
        plain = [(network, "forward"), (vae, "decode"), (self._policy, "encode")]
        before = [getattr(owner, name) for owner, name in plain]
        names = ("network", "decode", "encode")
        for (owner, name), part, call in zip(plain, names, before, strict=True):
            setattr(owner, name, self._timed(part, call))
        torch.Tensor.backward = self._timed("backward", backward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            for owner, name in plain:
                delattr(owner, name)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part in ("network", "decode"):
                name = "trained" if part == "network" and torch.is_grad_enabled() else part
                self.calls.append((name, args, kwargs))
            start = time.process_time()
            found = call(*args, **kwargs)
            self.seconds[part] += time.process_time() - start
            return found

        return timed


def bare(step: Step, calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
    """The recorded calls and nothing else."""
    policy: Any = step.policy
    for name, args, kwargs in calls:
        with torch.set_grad_enabled(name == "trained"):
            if name == "decode":
                policy.vae.decode(*args, **kwargs)
                continue
            found = policy.transformer(*args, **kwargs)[0]
        if name == "trained":
            found.square().mean().backward()
    step.state.optimizer.step()
    step.state.optimizer.zero_grad(set_to_none=True)


def measure(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    policy = make_policy(family, arguments.resolution)
    step = Step(policy, make_prompts(policy, arguments.prompts))
    step.run()
    recorder = Recorder(policy)
    with recorder.recording():
        start = time.process_time()
        step.run()
        whole = time.process_time() - start
    bare(step, recorder.calls)
    times: dict[str, list[float]] = {"burnish": [], "bare": []}
    for repeat in range(arguments.repeats):
        ways = {"burnish": step.run, "bare": lambda: bare(step, recorder.calls)}
        for way in sorted(ways, reverse=bool(repeat % 2)):
            start = time.process_time()
            ways[way]()
            times[way].append(time.process_time() - start)
    ratios = [ours / least for ours, least in zip(times["burnish"], times["bare"], strict=True)]
    parts = {name: seconds / whole for name, seconds in recorder.seconds.items()}
    return {
        "family": family,
        "task": policy.tasks[0],
        "parameters": sum(p.numel() for p in policy.transformer.parameters()),
        "burnish_s": statistics.median(times["burnish"]),
        "bare_s": statistics.median(times["bare"]),
        "overhead": statistics.median(ratios) - 1,
        "least": min(ratios) - 1,
        "most": max(ratios) - 1,
        **parts,
        "rest": 1 - sum(parts.values()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| family | task | parameters | step s | bare s | overhead | transformer | decode | "
        "encode | the rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        inside = row["network"] + row["backward"]
        lines.append(
            f"| {row['family']} | {row['task']} | {row['parameters'] / 1e6:.1f} M | "
            f"{row['burnish_s']:.2f} | {row['bare_s']:.2f} | {row['overhead']:+.1%} "
            f"({row['least']:+.1%} to {row['most']:+.1%}) | {inside:.1%} | {row['decode']:.1%} | "
            f"{row['encode']:.1%} | {row['rest']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step costs beyond its network calls.")
    # A shared prefix has a graph of its own, which no single call has.
    plain = [name for name in families() if not policy_class(name).has_shared_prefix]
    default = ["stable_diffusion3", "qwen_image"]
    parser.add_argument("--family", nargs="+", choices=plain, default=default)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(family, arguments) for family in arguments.family]
    print(table(rows))
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
