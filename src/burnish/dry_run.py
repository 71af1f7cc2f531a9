"""A policy asked as training asks it, with what its calls would hold counted.

The policy itself reads a prompt, draws a micro-batch, and is asked for velocities with and without
gradient, so whatever a family or a setting does to memory is in the figures, without a formula of
its own here. A hollow policy (`burnish.activations`) holds none of it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.activations import GpuPrecision, Live, Saved, emptied, like, on_meta, weights
from burnish.adapters import LoraConfig, attach
from burnish.policies.base import Policy
from burnish.rollout import branches
from burnish.runtime import Runtime
from burnish.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much a stage has on a device at once."""

    pictures: int
    """Drawn together."""
    picture_prompts: int
    """Different prompts of these."""
    credited: int
    """States that are asked for velocities without gradient."""
    credited_prompts: int
    states: int
    """With gradient."""
    state_prompts: int
    draw_scale: float
    credit_scale: float
    trains_null: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes that a policy's own calls would hold, beside its weights."""

    reading: int
    """While one prompt is read."""
    row: int
    """What one prompt becomes."""
    prefix: int
    """Of the prompts that are drawn together: keys and values, or what the encoders said."""
    drawing: int
    decoding: int
    crediting: int
    """Prefix included, as in `updating`."""
    updating: int
    """Forward and backward pass, without the copies and the gradients themselves."""
    copies: int
    """Weights in the type of the matrix products, from the forward to the backward pass."""
    saved: int
    """Of `updating` and `copies`, what waits for the backward pass."""
    latents: int
    """Of one picture."""


def measure(
    policy: Policy[Any, Any], prompt: Prompt, negative_prompt: str, counts: Counts, rt: Runtime
) -> Measured:
    """Ask a policy as training does, and count; hollow or real, the answer is the same.

    Args:
        policy: ready for training; its gradients are made and taken away again.
        prompt: that all are like.
        negative_prompt: what guidance leads away from.
        counts: how much at once.
        rt: precision, of a GPU or a CPU, wherever the policy is.
    """
    networks = policy.networks().values()
    own = list(weights(*networks))
    trained = [parameter for _, parameter in policy.trainable()]
    one = policy.noise([torch.Generator().manual_seed(0)])
    with torch.no_grad(), _precision(rt), Live(ignored=own) as live:
        condition = policy.encode([prompt])
        away = policy.encode_null([prompt], negative_prompt)
        reading, before = live.peak, live.now
        many = condition.repeated(counts.picture_prompts)
        guided_away = away.repeated(counts.picture_prompts) if counts.draw_scale != 1 else None
        prefix, null = branches(policy, many, guided_away)
        held = live.now
        live.peak = held
        latents = _latents(policy, one, counts.pictures)
        _ask(policy, latents, prefix, null, counts.draw_scale)
        drawing = live.peak - held
        live.peak = live.now
        # On the CPU, as the pictures go there.
        _ = policy.decode(latents).cpu()
        decoding = live.peak - held
        del prefix, null, latents
        live.peak = start = live.now
        many = condition.repeated(counts.credited_prompts)
        guided_away = away.repeated(counts.credited_prompts) if counts.credit_scale != 1 else None
        latents = _latents(policy, one, counts.credited)
        _ask(policy, latents, *branches(policy, many, guided_away), counts.credit_scale)
        crediting = live.peak - start
        del latents
    many = condition.repeated(counts.state_prompts)
    guided_away = away.repeated(counts.state_prompts) if counts.trains_null else None
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*own, *(p.grad for p in trained if p.grad is not None)]
    with Live(ignored=known) as live, Saved(ignored=own) as saved:
        latents = _latents(policy, one, counts.states)
        with _precision(rt):
            prefixes = branches(policy, many, guided_away)
            scale = counts.draw_scale if counts.trains_null else 1.0
            velocity = _ask(policy, latents, *prefixes, scale)
            loss = velocity.square().mean()
        del prefixes, velocity
        kept = saved.num_bytes
        loss.backward()
    for parameter in trained:
        parameter.grad = None
    return Measured(
        reading=reading,
        row=condition.num_bytes,
        prefix=held - before,
        drawing=drawing,
        decoding=decoding,
        crediting=crediting,
        updating=live.peak - live.copies,
        copies=live.copies,
        saved=kept,
        latents=one.nbytes,
    )


def _latents(policy: Policy[Any, Any], one: Tensor, count: int) -> Tensor:
    """So many states; hollow where the policy is, as a step makes them of what came before."""
    is_hollow = any(type(p.data) is not Tensor for p in policy.transformer.parameters())
    return (like(one) if is_hollow else one).repeat(count, 1, 1)


def _ask(
    policy: Policy[Any, Any], latents: Tensor, prefix: Any, null: Any, scale: float
) -> Tensor:
    """The (guided) velocity at as many states, dealt out to the prompts."""
    count, prompts = len(latents), prefix.num_rows
    rows = sorted(row % prompts for row in range(count))
    sigmas = torch.linspace(0.9, 0.3, count)
    if null is None:
        return policy.velocity(latents, sigmas, prefix.take(rows))
    return policy.guided(latents, sigmas, prefix.take(rows), null.take(rows), scale)[0]


@contextlib.contextmanager
def _precision(rt: Runtime) -> Iterator[None]:
    """As `Runtime.autocast`, on the CPU: there hollow tensors are, also in the plan of a GPU."""
    if rt.device.type == "cpu":
        with rt.autocast():
            yield
        return
    is_narrow = rt.dtype != torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow), GpuPrecision():
        yield


def ready(policy: Policy[Any, Any], lora: LoraConfig | None) -> Policy[Any, Any]:
    """A hollow policy as a stage trains it."""
    policy.transformer.requires_grad_(True)
    if lora is not None:
        with on_meta():
            attach(policy.transformer, lora, policy.lora_targets)
        emptied(policy.transformer)
    return policy
