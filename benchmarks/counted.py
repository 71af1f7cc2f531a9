"""Bytes and operations counted without a device for the calls that `device.py` times on one.

    python benchmarks/counted.py [--model qwen_image21 flux2_klein] [--batch 8] [--steps 10]

The networks of real models have hollow weights here and run as under a GPU's autocast, which is
how `burnish doctor --recipe` plans a run. What is counted is to be held against the peaks that
`device.py` measures with blocks as they are; compiled ones hold less. A row has GiB of weights,
moments of what is trained, and what else lives at the peak, and 10^15 floating-point operations,
those of blocks that are computed again among them.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from device import (
    GUIDANCE,
    LORA,
    REAL,
    Plan,
    conditions,
    make_policy,
    operations,
    rollout,
    states,
    update,
)
from grpo_step import shrink_sources

from burnish.activations import GpuPrecision, Live, num_bytes, weights
from burnish.optimization import state_bytes
from burnish.planning.dry_run import precision, ready
from burnish.policies.parts.execution import checkpoint_blocks
from burnish.runtime import Runtime

GIBIBYTE = 1 << 30


class Planned(Runtime):
    """A GPU as plans see it: hollow tensors stand on the CPU."""

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return precision(self)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def counted(policy: Any, work: Callable[[], None]) -> dict[str, float]:
    """Of a call on a hollow policy, in GiB."""
    own = list(weights(policy.transformer))
    trained = [parameter for _, parameter in policy.trainable()]
    with Live(ignored=own, is_hollow=True) as live:
        work()
    found = {
        "weights": num_bytes(own),
        # Of `device.py`, which lets gradients go between two steps, so that they are live below.
        "moments": state_bytes(trained, "adamw") if trained else 0,
        "live": live.peak,
    }
    sizes = {name: value / GIBIBYTE for name, value in found.items()}
    return sizes | {"all": sum(sizes.values()), "operations": operations(work) / 1e15}


def rows(family: str, plan: Plan) -> Iterator[tuple[str, dict[str, float]]]:
    dtype, scale = plan.rt.dtype, GUIDANCE[family]
    policy = make_policy(family, plan, dtype, is_hollow=True)
    policy.transformer.requires_grad_(False)
    asked = conditions(policy, "t2i", plan, 0)
    for policy.batch_guidance in (True, False) if scale != 1 else (True,):
        name = f"rollout, guidance {scale:g}" + (", in two calls" * (not policy.batch_guidance))
        yield name, counted(policy, partial(rollout, policy, asked, plan, scale))
    policy = make_policy(family, plan, dtype, is_hollow=True)
    ready(policy, LORA, is_autocast=True).transformer.train()
    latents = states(policy, plan)
    for share in (1.0, 0.5, 0.0):
        checkpoint_blocks(policy.transformer, policy.block_classes, share, again=GpuPrecision)
        work = partial(update, policy, asked, plan, latents)
        yield f"update of a LoRA, {share:.0%} of blocks again", counted(policy, work)


def edit_rows(plan: Plan, references: Sequence[int]) -> Iterator[tuple[str, dict[str, float]]]:
    """Of `qwen_image21`, with one prefix for a prompt or none."""
    for count in references:
        for is_shared in (True, False):
            policy = make_policy("qwen_image21", plan, plan.rt.dtype, is_hollow=True)
            policy.transformer.requires_grad_(False)
            policy.share_prefix = is_shared
            asked = conditions(policy, "edit", plan, count)
            name = f"{count} references, {'shared prefix' if is_shared else 'no prefix'}"
            work = partial(rollout, policy, asked, plan, 1.0)
            yield f"edit rollout, {name}", counted(policy, work)
            ready(policy, LORA, is_autocast=True).transformer.train()
            network, classes = policy.transformer, policy.block_classes
            checkpoint_blocks(network, classes, True, again=GpuPrecision)
            work = partial(update, policy, asked, plan, states(policy, plan))
            yield f"edit update of a LoRA, {name}", counted(policy, work)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes counted for the calls of device.py.")
    parser.add_argument("--model", nargs="+", choices=list(REAL), default=list(REAL))
    parser.add_argument("--batch", type=int, default=8, help="pictures or states at once")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rt = Planned(device=torch.device("cuda"), dtype=torch.bfloat16)
    plan = Plan(rt, 1024, arguments.batch, arguments.steps, 1, REAL)
    shrink_sources(plan.resolution)
    print("| model | work | weights | moments | live | all GiB | operations |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for family in arguments.model:
        every = [rows(family, plan)]
        if family == "qwen_image21":
            every.append(edit_rows(plan, (1, 4)))
        for work, sizes in (row for part in every for row in part):
            found.append({"family": family, "work": work, **sizes})
            cells = [f"{sizes[name]:.1f}" for name in ("weights", "moments", "live", "all")]
            cells.append(f"{sizes['operations']:.2f}")
            print(f"| {family} | {work} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
