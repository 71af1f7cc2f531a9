"""Train the miniature's base model by flow matching: transformer and text encoder together.

One model draws and edits. Each step sees a batch of either task; every example's prefix is computed
once and shared by several noise levels, which is where most of a step's cost goes. The prompt is
dropped with probability 0.1 (source images stay), so that classifier-free guidance works and
matters. The weights kept are an exponential moving average.

First the model sees good pictures alone, then the mixture of good and flawed: words are learnt
faster where every picture honours its prompt, and the flaws are then added as modes of their own.
The matrices of the transformer's blocks are trained by Muon, the rest by AdamW: from random weights
Muon needed about two thirds of AdamW's steps for the same loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from burnish.miniature.fitting import FittingPlan, fit
from burnish.miniature.pictures import Example, to_bytes
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.runtime import Runtime, derived_seed, generator, quick

SIZES = {"num_layers": 6, "num_attention_heads": 6, "attention_head_dim": 32}
"""The transformer: 3.2 million parameters."""
ENCODER_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


@dataclass(frozen=True, kw_only=True)
class BasePlan(FittingPlan):
    """How long and how fast the base model is trained."""

    steps: int = 6000
    clean_steps: int = 3600
    """The first steps, which see no flawed picture."""
    batch_size: int = 24
    noise_levels: int = 4
    """Noise levels per example and step, sharing one prefix."""
    learning_rate: float = 1.2e-3
    drop_prompt: float = 0.1
    edit_share: float = 0.4
    ema: float = 0.998


@torch.no_grad()
def encode_pool(policy: QwenImage21Policy, pixels: np.ndarray, chunk: int = 64) -> Tensor:
    """Clean latents of uint8 pictures `picture 64 64 3`."""
    parts = []
    for start in range(0, len(pixels), chunk):
        images = torch.from_numpy(pixels[start : start + chunk]).permute(0, 3, 1, 2).float() / 255
        with quick().autocast():
            parts.append(policy.encode_images(images).float())
    return torch.cat(parts)


@torch.no_grad()
def reconstructed(policy: QwenImage21Policy, pixels: np.ndarray, chunk: int = 64) -> np.ndarray:
    """What the policy's autoencoder makes of uint8 pictures `picture 64 64 3`."""
    parts = []
    for latents in encode_pool(policy, pixels, chunk).split(chunk):
        with quick().autocast():
            decoded = policy.decode(latents)
        parts.append(to_bytes(decoded.float().clamp(0, 1).permute(0, 2, 3, 1).numpy()))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Pool:
    """Examples of one task with their latents."""

    examples: Sequence[Example]
    latents: Tensor
    source_latents: Tensor | None

    @cached_property
    def clean(self) -> list[int]:
        """Rows of the examples without a flaw."""
        return [row for row, example in enumerate(self.examples) if not example.is_flawed]


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
    sources = (
        None if pool.source_latents is None else list(pool.source_latents[list(rows)].flatten(1, 2))
    )
    prefix = policy.prefix(policy.embed(prompts, sources=sources))
    clean = pool.latents[list(rows)].repeat(levels, 1, 1, 1)
    # Stratified over the batch: every step sees the whole range of noise levels.
    count = len(clean)
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    sigmas = uniform.clamp(1e-3, 1 - 1e-3)
    noise = torch.randn_like(clean)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None, None])
    velocity = policy.velocity(noisy, sigmas, prefix.take([*range(len(rows))] * levels))
    return ((velocity - (noise - clean)) ** 2).mean()


def train_base(
    policy: QwenImage21Policy,
    text_pool: Pool,
    edit_pool: Pool,
    plan: BasePlan,
    runtime: Runtime,
    *,
    folder: Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda losses: None,
) -> list[dict[str, float]]:
    """Train `policy.transformer` and `policy.text_encoder` in place; they end as their averages.

    Args:
        policy: of random weights.
        text_pool: examples of drawing.
        edit_pool: examples of editing.
        plan: how long and how fast.
        runtime: ranks that share each step.
        folder: checkpoints go here, and a training that was cut off goes on from the newest.
        on_step: called with the losses of each step done now.

    Returns:
        The losses of every step by task, those before a training was cut off included.
    """

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(derived_seed(plan.seed, "base model", step, runtime.rank))
        is_edit = (
            float(torch.rand(1, generator=generator(plan.seed, "task", step))) < plan.edit_share
        )
        loss = _loss(policy, edit_pool if is_edit else text_pool, plan, step)
        return loss, {"edit" if is_edit else "t2i": float(loss.detach())}

    modules = torch.nn.ModuleList([policy.transformer, policy.text_encoder])
    blocks = policy.transformer.transformer_blocks
    return fit(modules, blocks, plan, runtime, losses, folder=folder, on_step=on_step)


def _loss(policy: QwenImage21Policy, pool: Pool, plan: BasePlan, step: int) -> Tensor:
    """Of a random batch of a pool, drawn from torch's global generator."""
    choice = pool.clean if step < plan.clean_steps else range(len(pool.examples))
    rows = [choice[n] for n in torch.randint(len(choice), (plan.batch_size,)).tolist()]
    dropped = (torch.rand(plan.batch_size) < plan.drop_prompt).tolist()
    with quick().autocast():
        return flow_matching_loss(policy, pool, rows, dropped, plan.noise_levels)


def examples(
    make: Callable[[np.random.Generator, str], Example], count: int, seed: int
) -> Iterator[Example]:
    """`count` examples, a pure function of the seed."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield make(rng, f"{seed}-{number}")
