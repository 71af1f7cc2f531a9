"""Train the miniature's base model by flow matching: transformer and text encoder together.

One model draws and edits. Each step sees a batch of either task; every example's prefix is computed
once and shared by several noise levels, which is where most of a step's cost goes. The prompt is
dropped with probability 0.1 (source images stay), so that classifier-free guidance works and
matters. The weights kept are an exponential moving average.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.flow import shift_sigmas
from burnish.miniature.pictures import Example
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.runtime import Runtime

SIZES = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32}
"""The transformer: 3.2 million parameters."""
ENCODER_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@dataclass(frozen=True, kw_only=True)
class BasePlan:
    """How long and how fast the base model is trained."""

    steps: int = 5000
    batch_size: int = 24
    """Examples of each process and step."""
    noise_levels: int = 3
    """Noise levels per example and step, sharing one prefix."""
    learning_rate: float = 1.2e-3
    drop_prompt: float = 0.1
    edit_share: float = 0.4
    ema: float = 0.998
    seed: int = 0


@torch.no_grad()
def encode_pool(policy: QwenImage21Policy, pixels: np.ndarray, chunk: int = 64) -> Tensor:
    """Clean latents of uint8 pictures `picture 64 64 3`."""
    parts = []
    for start in range(0, len(pixels), chunk):
        images = torch.from_numpy(pixels[start : start + chunk]).permute(0, 3, 1, 2).float() / 255
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts.append(policy.encode_images(images).float())
    return torch.cat(parts)


@dataclass(frozen=True)
class Pool:
    """Examples of one task with their latents."""

    examples: Sequence[Example]
    latents: Tensor
    source_latents: Tensor | None


def make_pool(policy: QwenImage21Policy, examples: Sequence[Example]) -> Pool:
    """Encode the pictures of the examples, and the sources of edits."""
    latents = encode_pool(policy, np.stack([example.pixels for example in examples]))
    sources = [e.source_pixels for e in examples if e.source_pixels is not None]
    return Pool(examples, latents, encode_pool(policy, np.stack(sources)) if sources else None)


def flow_matching_loss(
    policy: QwenImage21Policy, pool: Pool, rows: Sequence[int], dropped: Sequence[bool], levels: int
) -> Tensor:
    """Mean squared error of the velocity at `levels` noise levels of each example."""
    prompts = [
        replace(pool.examples[row].prompt, text=" ") if drop else pool.examples[row].prompt
        for row, drop in zip(rows, dropped, strict=True)
    ]
    sources = None if pool.source_latents is None else list(pool.source_latents[list(rows)])
    prefix = policy.prefix(policy.embed(prompts, sources=sources))
    clean = pool.latents[list(rows)].repeat(levels, 1, 1)
    # Stratified over the batch: every step sees the whole range of noise levels.
    count = len(clean)
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    sigmas = shift_sigmas(uniform.clamp(1e-3, 1 - 1e-3), 0.5)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None])
    velocity = policy.velocity(noisy, sigmas, prefix.take([*range(len(rows))] * levels))
    return ((velocity - (noise - clean)) ** 2).mean()


def train_base(
    policy: QwenImage21Policy,
    text_pool: Pool,
    edit_pool: Pool,
    plan: BasePlan,
    runtime: Runtime,
    *,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Train `policy.transformer` and `policy.text_encoder` in place; they end as their averages."""
    torch.manual_seed(plan.seed * runtime.world_size + runtime.rank)
    rng = np.random.default_rng([plan.seed, runtime.rank])
    tasks = np.random.default_rng(plan.seed)
    modules = torch.nn.ModuleList([policy.transformer, policy.text_encoder])
    modules.requires_grad_(True).train()
    parameters = list(modules.parameters())
    runtime.broadcast(parameters)
    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=0.05
    )
    average = [p.detach().clone() for p in parameters]
    for step in range(plan.steps):
        is_edit = tasks.random() < plan.edit_share
        pool = edit_pool if is_edit else text_pool
        rows = rng.integers(len(pool.examples), size=plan.batch_size).tolist()
        dropped = (rng.random(plan.batch_size) < plan.drop_prompt).tolist()
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = flow_matching_loss(policy, pool, rows, dropped, plan.noise_levels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        runtime.all_reduce_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(plan.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        on_step(step, {"edit" if is_edit else "t2i": float(loss.detach())})
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    modules.requires_grad_(False).eval()


def examples(
    make: Callable[[np.random.Generator, str], Example], count: int, seed: int
) -> Iterator[Example]:
    """`count` examples, a pure function of the seed."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield make(rng, f"{seed}-{number}")
