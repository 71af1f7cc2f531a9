"""How much of a device the networks of real models use: drawing, training, edits with references.

    python benchmarks/device.py [--model qwen_image21 flux2_klein] [--work editing] [--out FILE]
        [--train "all weights"] [--references 4]

On a GPU: the 7.1 B transformer of Qwen-Image 2.1 and the 3.9 B one of FLUX.2 [klein] 4B Base, with
random weights, in bfloat16. On a CPU: both much smaller, in float32, which shows how the figures
are made. The frozen parts are tiny: what is timed is the work of the transformer as Burnish asks
for it, prefix included.

*Of peak* compares with a large matrix product on the same device, in the same precision. The
floating-point operations are counted on the same calls with hollow weights, without those of
blocks that are computed again; *with these* counts them, too: what the device did.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grpo_step import make_prompts, shrink_sources
from timing import Timed, peak_rate, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from burnish.activations import hollow, like
from burnish.adapters import LoraConfig, attach
from burnish.batches import branches
from burnish.optimization import OptimizerConfig
from burnish.planning.dry_run import ready
from burnish.policies.base import Policy
from burnish.policies.parts.execution import checkpoint_blocks
from burnish.precision import choose_dtype
from burnish.runtime import Runtime, choose_device
from burnish.shelves import policy_class
from burnish.types import Task

Changes = dict[str, Any]
REAL: dict[str, Changes] = {
    "qwen_image21": {},
    "flux2_klein": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
}
"""Changes to the settings that diffusers' classes have by default."""
SMALL: dict[str, Changes] = {
    "qwen_image21": {"num_layers": 4, "num_attention_heads": 6, "context_in_dim": 512},
    "flux2_klein": {
        **REAL["flux2_klein"],
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 6,
        "joint_attention_dim": 512,
    },
}
GUIDANCE = {"qwen_image21": 1.0, "flux2_klein": 4.0}
TEXT = "a portrait of a person with long brown hair in front of a lake at night " * 3
LORA = LoraConfig(rank=32)
WAYS: tuple[tuple[LoraConfig | None, tuple[tuple[bool, float], ...]], ...] = (
    (LORA, ((False, 1.0), (True, 1.0))),
    (None, ((True, 1.0),)),
    (LORA, ((True, 0.5), (True, 0.0))),
)
"""What is trained; whether blocks are compiled, and the share of them that is computed again."""


@dataclass(frozen=True)
class Plan:
    """What is asked of the networks, and where."""

    rt: Runtime
    resolution: int
    batch: int
    steps: int
    repeats: int
    sizes: dict[str, Changes]
    trained: tuple[str, ...] = ("LoRA", "all weights")
    references: tuple[int, ...] = (1, 4)

    def timed(self, work: Callable[[], None], warm_up: Callable[[], None] | None = None) -> Timed:
        return timed(work, self.rt.device, self.repeats, warm_up)

    @property
    def alone(self) -> "Plan":
        """One picture in one step."""
        return replace(self, batch=1, steps=1)


def make_policy(family: str, plan: Plan, dtype: torch.dtype, *, is_hollow: bool = False) -> Any:
    """A family's tiny pipeline around a large transformer."""
    kind: Any = policy_class(family)
    pipeline = kind.tiny().pipeline
    network = type(pipeline.transformer)
    build = partial(network, **plan.sizes[family])
    if is_hollow:
        pipeline.transformer = hollow(build, dtype)
    else:
        with torch.device(plan.rt.device):
            pipeline.transformer = build().to(dtype)
    return kind(pipeline, resolution=plan.resolution)


def conditions(policy: Any, task: Task, plan: Plan, references: int) -> tuple[Any, Any]:
    """Prompt and null prompt as the large transformer reads them, from what the tiny parts say."""
    (prompt,) = make_prompts(task, 1, 0, plan.resolution, references)
    prompt = replace(prompt, text=TEXT)
    config = policy.transformer.config
    width = getattr(config, "context_in_dim", None) or config.joint_attention_dim
    found = []
    for condition in (policy._reader.encode([prompt]), policy.encode_null([prompt])):
        (row,) = condition.prompts
        own = {
            "embedding": torch.randn(len(row.embedding), width),
            "source": torch.randn(len(row.source), config.in_channels),
        }
        found.append(type(condition)((replace(row, **own),)))
    return found[0], found[1]


def states(policy: Policy[Any, Any], plan: Plan) -> torch.Tensor:
    """A micro-batch of noise."""
    noise = policy.noise([torch.Generator().manual_seed(row) for row in range(plan.batch)])
    return _as_weights(policy, noise)


def rollout(policy: Policy[Any, Any], both: tuple[Any, Any], plan: Plan, scale: float) -> None:
    """One micro-batch of pictures of one prompt, without its decoding."""
    latents, rows = states(policy, plan), [0] * plan.batch
    with torch.no_grad(), plan.rt.autocast():
        prefix, null = branches(policy, both[0], None if scale == 1 else both[1])
        for sigma in torch.linspace(0.9, 0.1, plan.steps):
            sigmas = sigma.expand(plan.batch).to(latents.device)
            if null is None:
                policy.velocity(latents, sigmas, prefix.take(rows))
            else:
                policy.guided(latents, sigmas, prefix.take(rows), null.take(rows), scale)


def update(
    policy: Policy[Any, Any], both: tuple[Any, Any], plan: Plan, latents: torch.Tensor
) -> None:
    """Forward and backward pass of one micro-batch of states of one prompt."""
    sigmas = torch.linspace(0.9, 0.5, plan.batch).to(latents.device)
    with plan.rt.autocast():
        prefix, _ = branches(policy, both[0], None)
        velocity = policy.velocity(latents, sigmas, prefix.take([0] * plan.batch))
        loss = velocity.square().mean()
    with plan.rt.attention():
        loss.backward()


def _as_weights(policy: Policy[Any, Any], tensor: torch.Tensor) -> torch.Tensor:
    own = next(policy.transformer.parameters())
    return like(tensor) if hasattr(own, "described") else tensor


def operations(work: Callable[[], None]) -> float:
    """Floating-point operations of work on a hollow policy."""
    # Of attention in one kernel of a CPU, where hollow tensors stand, nothing would be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        work()
    return float(counted.get_total_flops())


def drawing(family: str, plan: Plan, peak: float) -> Iterator[dict[str, Any]]:
    """Text to image, as it is and compiled."""
    scale, dtype = GUIDANCE[family], plan.rt.dtype
    twin = make_policy(family, plan, dtype, is_hollow=True)
    asked = conditions(twin, "t2i", plan, 0)
    count = operations(lambda: rollout(twin, asked, plan, scale))
    policy = make_policy(family, plan, dtype)
    for way in ("as it is", "compiled"):
        if way == "compiled":
            policy.compile_blocks()
        for policy.batch_guidance in (True, False) if scale != 1 else (True,):
            found = plan.timed(lambda: rollout(policy, asked, plan, scale))
            done = way if policy.batch_guidance else f"{way}, guidance in two calls"
            yield _row(family, f"rollout, guidance {scale:g}", done, found, peak, count)


def training(family: str, plan: Plan, peak: float) -> Iterator[dict[str, Any]]:
    """Updates of a LoRA beside weights of the device's precision, and of float32 weights."""
    for lora, ways in WAYS:
        trained = "LoRA" if lora else "all weights"
        if trained not in plan.trained:
            continue
        name = trained if lora else f"{trained}, 8-bit AdamW"
        dtype = plan.rt.dtype if lora else torch.float32
        twin = ready(make_policy(family, plan, dtype, is_hollow=True), lora)
        asked = conditions(twin, "t2i", plan, 0)
        counted = partial(update, twin, asked, plan, states(twin, plan))
        twin.transformer.train()
        count = operations(counted)
        policy = make_policy(family, plan, dtype)
        policy.transformer.train().requires_grad_(True)
        if lora is not None:
            is_narrow = plan.rt.dtype != torch.float32
            attach(policy.transformer, lora, policy.lora_targets, is_autocast=is_narrow)
        work = _step(policy, asked, plan, "adamw" if lora else "adamw_8bit")
        for is_compiled, share in ways:
            if is_compiled:
                policy.compile_blocks()
            for one in (twin, policy):
                checkpoint_blocks(one.transformer, one.block_classes, share)
            way = name + (", compiled" if is_compiled else "")
            found = plan.timed(work)
            task = f"update, {share:.0%} of blocks again"
            yield _row(family, task, way, found, peak, count, operations(counted))
        del policy, work
        gc.collect()


def _step(policy: Any, asked: Any, plan: Plan, kind: Any) -> Callable[[], None]:
    """An update and the optimizer's step."""
    parameters = [parameter for _, parameter in policy.trainable()]
    optimizer = OptimizerConfig(kind=kind).build(parameters)
    latents = states(policy, plan)

    def work() -> None:
        update(policy, asked, plan, latents)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def editing(plan: Plan, peak: float) -> Iterator[dict[str, Any]]:
    """Edits of `qwen_image21`, whose prefix holds the references, or is none."""
    shared = make_policy("qwen_image21", plan, plan.rt.dtype)
    checkpoint_blocks(shared.transformer, shared.block_classes, True)
    full = type(shared)(shared.pipeline, resolution=plan.resolution)
    full.share_prefix = False
    twin = make_policy("qwen_image21", plan, plan.rt.dtype, is_hollow=True)
    for references in plan.references:
        asked = conditions(twin, "edit", plan, references)
        for name in ("rollout", "update"):
            found = {}
            for way, policy in (("shared prefix", shared), ("no prefix", full)):
                policy.transformer.requires_grad_(name == "update").train(name == "update")
                work, warm_up = (_edit(name, policy, asked, one) for one in (plan, plan.alone))
                # With one picture: with all of them a call takes half a minute.
                found[way] = plan.timed(work, warm_up)
            ratio = found["no prefix"].seconds / found["shared prefix"].seconds
            for way, one in found.items():
                row = _row("qwen_image21", f"edit {name}, {references} references", way, one, peak)
                yield row | {"ratio": ratio if way == "shared prefix" else 1.0}


def _edit(name: str, policy: Any, asked: Any, plan: Plan) -> Callable[[], None]:
    if name == "rollout":
        return partial(rollout, policy, asked, plan, 1.0)
    latents = states(policy, plan)

    def work() -> None:
        update(policy, asked, plan, latents)
        policy.transformer.zero_grad(set_to_none=True)

    return work


def _row(
    family: str, work: str, way: str, found: Timed, peak: float, count: float = math.nan,
    done: float = math.nan,
) -> dict[str, Any]:  # fmt: skip
    rate = count / found.seconds
    return {
        "family": family,
        "work": work,
        "way": way,
        **found._asdict(),
        "teraflops": rate / 1e12,
        "of_peak": rate / peak,
        "done_of_peak": done / found.seconds / peak,
        "ratio": math.nan,
    }


HEAD = """\
| model | work | way | first s | s | TFLOP/s | of peak | with these | GiB at the peak | faster |
|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    def shown(value: float, text: str) -> str:
        return "" if math.isnan(value) else text.format(value)

    cells = [row["family"], row["work"], row["way"], shown(row["first"], "{:.1f}")]
    cells += [shown(row["seconds"], "{:.2f}") or "does not fit"]
    cells += [shown(row["teraflops"], "{:.2f}"), shown(row["of_peak"], "{:.0%}")]
    cells.append(shown(row["done_of_peak"], "{:.0%}"))
    cells += [shown(row["memory"], "{:.1f}"), shown(row["ratio"], "{:.2f}x")]
    return f"| {' | '.join(cells)} |"


WORK = {"drawing": drawing, "training": training}


def measured(
    families: Sequence[str], work: Sequence[str], plan: Plan, peak: float
) -> Iterator[dict[str, Any]]:
    for family in families:
        for name, part in WORK.items():
            if name in work:
                yield from part(family, plan, peak)
                gc.collect()
    if "editing" in work:
        yield from editing(plan, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description="Use of a device by the networks of real models.")
    parser.add_argument("--model", nargs="+", choices=list(REAL), default=list(REAL))
    kinds = [*WORK, "editing"]
    parser.add_argument("--work", nargs="+", choices=kinds, default=kinds)
    trained = list(Plan.trained)
    parser.add_argument("--train", nargs="+", choices=trained, default=trained, help="what is")
    parser.add_argument(
        "--references",
        nargs="+",
        type=int,
        default=list(Plan.references),
        help="sources of an edit",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resolution", type=int, help="1024 on a GPU, 256 on a CPU")
    parser.add_argument("--batch", type=int, default=8, help="pictures or states at once")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file, written again after every row")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    is_gpu = device.type == "cuda"
    if not is_gpu:
        torch.set_num_threads(1)
    plan = Plan(
        rt=Runtime(device=device, dtype=choose_dtype("auto", device)),
        resolution=arguments.resolution or (1024 if is_gpu else 256),
        batch=arguments.batch,
        steps=arguments.steps,
        repeats=arguments.repeats,
        sizes=REAL if is_gpu else SMALL,
        trained=tuple(arguments.train),
        references=tuple(arguments.references),
    )
    shrink_sources(plan.resolution)
    peak = peak_rate(plan.rt.device, plan.rt.dtype, plan.repeats)
    name = torch.cuda.get_device_name(device) if is_gpu else "one thread of a CPU"
    print(f"{name}: a large matrix product in {plan.rt.dtype} has {peak / 1e12:.2f} TFLOP/s\n")
    print(HEAD)
    rows: list[dict[str, Any]] = []
    found = {"device": name, "resolution": plan.resolution, "batch": plan.batch}
    found |= {"steps": plan.steps, "peak": peak, "rows": rows}
    for row in measured(arguments.model, arguments.work, plan, peak):
        rows.append(row)
        # At once, as a machine may be gone before the last one.
        print(line(row), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
