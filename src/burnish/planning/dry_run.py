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

from burnish.activations import GpuPrecision, Hollow, Live, Saved, emptied, like, on_meta, weights
from burnish.adapters import LoraConfig, attach
from burnish.batches import branches
from burnish.policies.base import Policy
from burnish.runtime import Runtime
from burnish.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How much is drawn on a device at once."""

    pictures: int
    """Drawn together."""
    picture_prompts: int
    """Different prompts of these."""
    draw_scale: float
    """Of guidance."""


@dataclass(frozen=True, kw_only=True)
class Counts(Pictures):
    """How much a stage has on a device at once."""

    credited: int
    """States that are asked for velocities without gradient."""
    credited_prompts: int
    states: int
    """With gradient."""
    state_prompts: int
    credit_scale: float
    trains_null: bool


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Bytes that a policy's own calls would hold, beside its weights, where it draws."""

    reading: int
    """While one prompt is read."""
    row: int
    """What one prompt becomes."""
    prefix: int
    """Of the prompts that are drawn together: keys and values, or what the encoders said."""
    drawing: int
    decoding: int
    latents: int
    """Of one picture."""


@dataclass(frozen=True, kw_only=True)
class Measured(Drawn):
    """Likewise where it is trained."""

    crediting: int
    """Prefix included, as in `updating`."""
    updating: int
    """Forward and backward pass, without the copies and the gradients themselves."""
    copies: int
    """Weights in the type of the matrix products, from the forward to the backward pass."""
    saved: int
    """Of `updating` and `copies`, what waits for the backward pass."""


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
    with _asked(policy, rt) as (one, live):
        both = policy.encode([prompt]), policy.encode_null([prompt], negative_prompt)
        found = _drawn(policy, both, one, counts, live)
        live.peak = start = live.now
        prefixes = _branches(policy, both, counts.credited_prompts, counts.credit_scale)
        _ask(policy, one.repeat(counts.credited, 1, 1, 1), prefixes, counts.credit_scale)
        found["crediting"] = live.peak - start
    return Measured(**found, **_trained(policy, both, one, counts, rt))


def measure_drawing(
    policy: Policy[Any, Any], prompt: Prompt, negative_prompt: str, counts: Pictures, rt: Runtime
) -> Drawn:
    """Likewise of a policy that only draws."""
    with _asked(policy, rt) as (one, live):
        both = policy.encode([prompt]), policy.encode_null([prompt], negative_prompt)
        return Drawn(**_drawn(policy, both, one, counts, live))


@contextlib.contextmanager
def _asked(policy: Policy[Any, Any], rt: Runtime) -> Iterator[tuple[Tensor, Live]]:
    """Latents of one picture, and what counts, for calls of a policy without gradient."""
    policy.forget()
    own = list(weights(*policy.networks().values()))
    is_hollow = isinstance(own[0], Hollow)
    drawn = policy.noise([torch.Generator().manual_seed(0)], policy.buckets.largest)
    # A step makes its states of what came before, which is hollow if the weights are.
    one = like(drawn) if is_hollow else drawn
    with torch.no_grad(), precision(rt), Live(ignored=own, is_hollow=is_hollow) as live:
        yield one, live


def _drawn(
    policy: Policy[Any, Any], both: tuple[Any, Any], one: Tensor, counts: Pictures, live: Live
) -> dict[str, int]:
    """Of prompts that were just read: one step of a micro-batch of pictures, and their decoding."""
    found = {"reading": live.peak, "row": both[0].num_bytes, "latents": one.nbytes}
    start = live.now
    prefixes = _branches(policy, both, counts.picture_prompts, counts.draw_scale)
    live.peak = held = live.now
    latents = one.repeat(counts.pictures, 1, 1, 1)
    _ask(policy, latents, prefixes, counts.draw_scale)
    drawing, live.peak = live.peak - held, live.now
    policy.decode(latents)
    return found | {"prefix": held - start, "drawing": drawing, "decoding": live.peak - held}


def _trained(
    policy: Policy[Any, Any], both: tuple[Any, Any], one: Tensor, counts: Counts, rt: Runtime
) -> dict[str, int]:
    """Forward and backward pass of a micro-batch of states, onto gradients that are there."""
    own = list(weights(*policy.networks().values()))
    trained = [parameter for _, parameter in policy.trainable()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    known = [*own, *(p.grad for p in trained if p.grad is not None)]
    scale = counts.draw_scale if counts.trains_null else 1.0
    with Live(ignored=known, is_hollow=isinstance(one, Hollow)) as live:
        with Saved(ignored=own) as saved, precision(rt):
            prefixes = _branches(policy, both, counts.state_prompts, scale)
            velocity = _ask(policy, one.repeat(counts.states, 1, 1, 1), prefixes, scale)
            loss = velocity.square().mean()
        del prefixes, velocity
        # Blocks that are computed again are computed as they were.
        with rt.attention():
            loss.backward()
    for parameter in trained:
        parameter.grad = None
    # Blocks that are computed again have theirs made again: no weight has two at once.
    most = sum(weight.numel() for weight in own) * rt.dtype.itemsize
    copies = min(live.copies, most, live.peak)
    return {
        "updating": live.peak - copies,
        "copies": copies,
        "saved": saved.num_bytes,
    }


def _branches(policy: Policy[Any, Any], both: tuple[Any, Any], count: int, scale: float) -> Any:
    """Prefix, and null prefix where there is guidance, of so many prompts."""
    condition, away = (conditions.repeated(count) for conditions in both)
    return branches(policy, condition, None if scale == 1 else away)


def _ask(policy: Policy[Any, Any], latents: Tensor, prefixes: Any, scale: float) -> Tensor:
    """The (guided) velocity at as many states, dealt out to the prompts."""
    prefix, null = prefixes
    count, prompts = len(latents), prefix.num_rows
    rows = sorted(row % prompts for row in range(count))
    sigmas = torch.linspace(0.9, 0.3, count)
    if null is None:
        return policy.velocity(latents, sigmas, prefix.take(rows))
    return policy.guided(latents, sigmas, prefix.take(rows), null.take(rows), scale)[0]


@contextlib.contextmanager
def precision(rt: Runtime) -> Iterator[None]:
    """As `Runtime.autocast`, on the CPU: there hollow tensors are, also in the plan of a GPU."""
    if rt.device.type == "cpu":
        with rt.autocast():
            yield
        return
    is_narrow = rt.dtype != torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow), GpuPrecision():
        yield


def ready(
    policy: Policy[Any, Any], lora: LoraConfig | None, *, is_autocast: bool = False
) -> Policy[Any, Any]:
    """A hollow policy as a stage trains it."""
    policy.transformer.requires_grad_(True)
    if lora is not None:
        with on_meta():
            attach(policy.transformer, lora, policy.lora_targets, is_autocast=is_autocast)
        emptied(policy.transformer)
    return policy
