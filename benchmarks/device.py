"""How much of a device the networks of real models use: drawing, training, edits with references.

    python benchmarks/device.py [--model qwen_image21 flux2_klein] [--work editing] [--json]

On a GPU: the 7.1 B transformer of Qwen-Image 2.1 and the 3.9 B one of FLUX.2 [klein] 4B Base, with
random weights, in bfloat16. On a CPU: both much smaller, in float32, which shows how the figures
are made. The frozen parts are tiny: what is timed is the work of the transformer as Burnish asks
for it, prefix included.

*Of peak* compares with a large matrix product on the same device, in the same precision. The
floating-point operations are counted on the same calls with hollow weights, and never those of
blocks that are computed again.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from grpo_step import make_prompts, shrink_sources
from torch.utils.flop_counter import FlopCounterMode

from burnish.activations import hollow, like
from burnish.adapters import LoraConfig, attach
from burnish.optimization import OptimizerConfig
from burnish.policies.base import Policy
from burnish.rollout import branches
from burnish.runtime import Runtime, choose_device, choose_dtype
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


@dataclass(frozen=True)
class Plan:
    """What is asked of the networks, and where."""

    rt: Runtime
    resolution: int
    batch: int
    steps: int
    repeats: int
    sizes: dict[str, Changes]


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


def rollout(policy: Policy[Any, Any], both: tuple[Any, Any], plan: Plan, scale: float) -> None:
    """One micro-batch of pictures of one prompt, without its decoding."""
    noise = policy.noise([torch.Generator().manual_seed(row) for row in range(plan.batch)])
    latents, rows = _as_weights(policy, noise), [0] * plan.batch
    with torch.no_grad(), plan.rt.autocast():
        prefix, null = branches(policy, both[0], None if scale == 1 else both[1])
        for sigma in torch.linspace(0.9, 0.1, plan.steps):
            sigmas = sigma.expand(plan.batch).to(noise.device)
            if null is None:
                policy.velocity(latents, sigmas, prefix.take(rows))
            else:
                policy.guided(latents, sigmas, prefix.take(rows), null.take(rows), scale)


def update(policy: Policy[Any, Any], both: tuple[Any, Any], plan: Plan) -> None:
    """Forward and backward pass of one micro-batch of states of one prompt."""
    noise = policy.noise([torch.Generator().manual_seed(row) for row in range(plan.batch)])
    sigmas = torch.linspace(0.9, 0.5, plan.batch).to(noise.device)
    with plan.rt.autocast():
        prefix, _ = branches(policy, both[0], None)
        latents = _as_weights(policy, noise)
        velocity = policy.velocity(latents, sigmas, prefix.take([0] * plan.batch))
        loss = velocity.square().mean()
    with plan.rt.attention():
        loss.backward()


def _as_weights(policy: Policy[Any, Any], tensor: torch.Tensor) -> torch.Tensor:
    own = next(policy.transformer.parameters())
    return like(tensor) if hasattr(own, "described") else tensor


def operations(work: Callable[[], None]) -> float:
    """Floating-point operations of work on a hollow policy."""
    with FlopCounterMode(display=False) as counted:
        work()
    return float(counted.get_total_flops())


def timed(work: Callable[[], None], plan: Plan) -> tuple[float, float]:
    """Median seconds after a first call, and GiB on the device at the peak; no number where a GPU
    has not so much memory, and of memory none on a CPU."""
    try:
        return _timed(work, plan)
    except torch.OutOfMemoryError:
        return float("nan"), float("nan")


def _timed(work: Callable[[], None], plan: Plan) -> tuple[float, float]:
    is_gpu = plan.rt.device.type == "cuda"
    wait = torch.cuda.synchronize if is_gpu else (lambda: None)
    # On a CPU that of the process, so that other work on the machine counts little.
    clock = time.perf_counter if is_gpu else time.process_time
    work()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(plan.repeats):
        wait()
        start = clock()
        work()
        wait()
        seconds.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() / (1 << 30) if is_gpu else float("nan")
    return statistics.median(seconds), peak


def peak_rate(plan: Plan) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if plan.rt.device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=plan.rt.device) for _ in range(2))
    left, right = left.to(plan.rt.dtype), right.to(plan.rt.dtype)

    def work() -> None:
        for _ in range(10):
            left @ right

    return 10 * 2 * side**3 / timed(work, plan)[0]


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
        seconds, memory = timed(lambda: rollout(policy, asked, plan, scale), plan)
        yield _row(family, f"rollout, guidance {scale:g}", way, seconds, count, peak, memory)


def training(family: str, plan: Plan, peak: float) -> Iterator[dict[str, Any]]:
    """Updates of a LoRA beside weights of the device's precision, and of float32 weights."""
    for lora, way in ((LORA, "LoRA"), (None, "all weights, 8-bit AdamW")):
        dtype = plan.rt.dtype if lora else torch.float32
        twin = _trainable(make_policy(family, plan, dtype, is_hollow=True), None)
        asked = conditions(twin, "t2i", plan, 0)
        twin.transformer.requires_grad_(lora is None)
        if lora:
            # Its own products are a hundredth; what matters is that frozen weights need none.
            for name, parameter in twin.transformer.named_parameters():
                parameter.requires_grad_("norm" in name)
        count = operations(lambda twin=twin, asked=asked: update(twin, asked, plan))
        policy = _trainable(make_policy(family, plan, dtype), lora)
        policy.transformer.enable_gradient_checkpointing()
        kind = "adamw" if lora else "adamw_8bit"
        parameters = [parameter for _, parameter in policy.trainable()]
        optimizer = OptimizerConfig(kind=kind).build(parameters)

        def work(policy: Any = policy, asked: Any = asked, optimizer: Any = optimizer) -> None:
            update(policy, asked, plan)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds, memory = timed(work, plan)
        yield _row(family, "update, checkpointing", way, seconds, count, peak, memory)
        del policy, optimizer, parameters, work
        gc.collect()


def _trainable(policy: Any, lora: LoraConfig | None) -> Any:
    policy.transformer.train().requires_grad_(True)
    if lora is not None:
        attach(policy.transformer, lora, policy.lora_targets)
    return policy


def editing(plan: Plan, peak: float) -> Iterator[dict[str, Any]]:
    """Edits of `qwen_image21`, whose prefix holds the references, or is none."""
    shared = make_policy("qwen_image21", plan, plan.rt.dtype)
    full = type(shared)(shared.pipeline, resolution=plan.resolution)
    full.share_prefix = False
    twin = make_policy("qwen_image21", plan, plan.rt.dtype, is_hollow=True)
    for references in (1, 4):
        asked = conditions(twin, "edit", plan, references)
        for name in ("rollout", "update"):
            found = {}
            for way, policy in (("shared prefix", shared), ("no prefix", full)):
                policy.transformer.requires_grad_(name == "update").train(name == "update")
                work: Callable[[], None] = partial(update, policy, asked, plan)
                if name == "rollout":
                    work = partial(rollout, policy, asked, plan, 1.0)
                found[way] = timed(work, plan)
                policy.transformer.zero_grad(set_to_none=True)
            ratio = found["no prefix"][0] / found["shared prefix"][0]
            for way, (seconds, memory) in found.items():
                work_name = f"edit {name}, {references} references"
                row = _row("qwen_image21", work_name, way, seconds, float("nan"), peak, memory)
                yield row | {"ratio": ratio if way == "shared prefix" else 1.0}


def _row(
    family: str, work: str, way: str, seconds: float, count: float, peak: float, memory: float
) -> dict[str, Any]:
    rate = count / seconds
    return {
        "family": family,
        "work": work,
        "way": way,
        "seconds": seconds,
        "teraflops": rate / 1e12,
        "of_peak": rate / peak,
        "memory": memory,
        "ratio": float("nan"),
    }


HEAD = """\
| model | work | way | s | TFLOP/s | of peak | GiB at the peak | faster |
|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    def shown(value: float, text: str) -> str:
        return "" if value != value else text.format(value)

    cells = [row["family"], row["work"], row["way"]]
    cells += [shown(row["seconds"], "{:.2f}") or "does not fit"]
    cells += [shown(row["teraflops"], "{:.2f}"), shown(row["of_peak"], "{:.0%}")]
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
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resolution", type=int, help="1024 on a GPU, 256 on a CPU")
    parser.add_argument("--batch", type=int, default=8, help="pictures or states at once")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
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
    )
    shrink_sources(plan.resolution)
    peak = peak_rate(plan)
    name = torch.cuda.get_device_name(device) if is_gpu else "one thread of a CPU"
    print(f"{name}: a large matrix product in {plan.rt.dtype} has {peak / 1e12:.2f} TFLOP/s\n")
    print(HEAD)
    rows = []
    for row in measured(arguments.model, arguments.work, plan, peak):
        rows.append(row)
        # At once, as a machine may be gone before the last one.
        print(line(row), flush=True)
    if arguments.json:
        settings = vars(arguments) | {"resolution": plan.resolution}
        print(json.dumps({"device": name, "settings": settings, "peak": peak, "rows": rows}))


if __name__ == "__main__":
    main()
