"""What Burnish adds to the network calls of one GRPO step, and where the time of the step goes.

    python benchmarks/overhead.py [--family stable_diffusion3 qwen_image ...] [--repeats 5] [--json]

A step draws groups with guidance, decodes them, turns scores into advantages, and makes one
optimizer step on the kept states. *bare* makes the same calls again, recorded from a step of
Burnish's: every forward pass of the transformer with the same inputs, a backward pass where there
was one, the decoder, the optimizer. It is the least that the step could take. Both alternate, and
time is that of the process on the processor, so that other work on the machine counts little.

Pictures and sources have 128 x 128 pixels. Every step has prompts of its own, so that reading them
is in it; in a run that comes once for a prompt.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from grpo_step import Step, make_policy, shrink_sources

from burnish.shelves import families, policy_class
from burnish.types import Task

PARTS = ("encode", "rollout", "forward", "backward", "decode", "optimizer")
"""What is not Burnish's own; the rest of a step is."""
IN_TRANSFORMER = ("rollout", "forward", "backward")


class Recorder:
    """The calls of the networks in one step, and the seconds in each part."""

    def __init__(self, step: Step) -> None:
        self._policy: Any = step.policy
        self._optimizer = step.state.optimizer
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        network, vae, backward = self._policy.transformer, self._policy.vae, torch.Tensor.backward
        plain = [
            (network, "forward", "network"),
            (vae, "decode", "decode"),
            (self._policy._reader, "embed", "encode"),
            (self._optimizer, "step", "optimizer"),
        ]
        for owner, name, part in plain:
            setattr(owner, name, self._timed(part, getattr(owner, name)))
        torch.Tensor.backward = self._timed("backward", backward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            for owner, name, _ in plain:
                delattr(owner, name)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            name = part
            if part == "network":
                name = "forward" if torch.is_grad_enabled() else "rollout"
            if part in ("network", "decode"):
                self.calls.append((name, args, kwargs))
            start = time.process_time()
            found = call(*args, **kwargs)
            self.seconds[name] += time.process_time() - start
            return found

        return timed


def bare(step: Step, calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
    """The recorded calls and nothing else."""
    policy: Any = step.policy
    for name, args, kwargs in calls:
        with torch.set_grad_enabled(name == "forward"):
            if name == "decode":
                policy.vae.decode(*args, **kwargs)
                continue
            found = policy.transformer(*args, **kwargs)[0]
        if name == "forward":
            found.square().mean().backward()
    step.state.optimizer.step()
    step.state.optimizer.zero_grad(set_to_none=True)


def measure(family: str, task: Task, arguments: argparse.Namespace) -> dict[str, Any]:
    policy = make_policy(family, arguments.resolution)
    step = Step(policy, task, arguments.prompts)
    step.run()
    recorder = Recorder(step)
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
    parts = {name: seconds / whole for name, seconds in recorder.seconds.items()}
    # No call of the text encoder or of the VAE's encoder is among the bare ones.
    own = [seconds * (1 - parts["encode"]) for seconds in times["burnish"]]
    ratios = [ours / least for ours, least in zip(own, times["bare"], strict=True)]
    return {
        "family": family,
        "task": task,
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
        "| family | task | parameters | step s | bare s | overhead | in the transformer: rollout "
        "| forward | backward | all | decode | optimizer | encode | the rest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        inside = sum(row[part] for part in IN_TRANSFORMER)
        lines.append(
            f"| {row['family']} | {row['task']} | {row['parameters'] / 1e6:.1f} M | "
            f"{row['burnish_s']:.2f} | {row['bare_s']:.2f} | {row['overhead']:+.1%} "
            f"({row['least']:+.1%} to {row['most']:+.1%}) | {row['rollout']:.1%} | "
            f"{row['forward']:.1%} | {row['backward']:.1%} | {inside:.1%} | {row['decode']:.1%} | "
            f"{row['optimizer']:.1%} | {row['encode']:.1%} | {row['rest']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step costs beyond its network calls.")
    # A shared prefix has a graph of its own, which no single call has.
    plain = [name for name in families() if not policy_class(name).has_shared_prefix]
    parser.add_argument("--family", nargs="+", choices=plain, default=plain)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shrink_sources(arguments.resolution)
    rows = [
        measure(family, task, arguments)
        for family in arguments.family
        for task in policy_class(family).tasks
    ]
    print(table(rows))
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
