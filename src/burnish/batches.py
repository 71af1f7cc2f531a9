"""Signals as batches of states, and what a policy says there.

A signal is one sample's path; a batch is all states of some signals, each of which knows its prompt
by row, so that a prompt is read once however many states it has.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.policies.base import Guided, Policy, Prefix
from burnish.types import Guidance, Prompt, Signal


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Signals stacked state by state; a state knows its prompt by row."""

    prompts: tuple[Prompt, ...]
    """The distinct prompts."""
    rows: tuple[int, ...]
    """Prompt of each state."""
    latents: Float[Tensor, " state *latent"]
    sigmas: Float[Tensor, " state"]
    fields: Mapping[str, Tensor]
    advantages: Float[Tensor, " state"]

    def velocity(self, policy: Policy[Any, Any]) -> Float[Tensor, " state *latent"]:
        """The policy's conditional velocity at every state; the prefix is computed once per
        prompt."""
        return policy.velocity(self.latents, self.sigmas, self.prefix(policy))

    def guided(self, policy: Policy[Any, Any], guidance: Guidance) -> Guided:
        """Both branches of the policy, and their composition, at every state; without guidance the
        conditional one is all of them."""
        if guidance.scale == 1:
            return Guided(*[self.velocity(policy)] * 3)
        away = policy.encode_null(self.prompts, guidance.negative_prompt)
        prefix, null = branches(policy, policy.encode(self.prompts), away)
        assert null is not None
        rows = prefix.take(self.rows), null.take(self.rows)
        return policy.guided(self.latents, self.sigmas, *rows, guidance.scale)

    def prefix(self, policy: Policy[Any, Any]) -> Any:
        """One prefix row per state."""
        return policy.prefix(policy.encode(self.prompts)).take(self.rows)


def branches(policy: Policy[Any, Any], condition: Any, away: Any) -> tuple[Prefix, Prefix | None]:
    """Prefix of some prompts, and of what guidance leads away from, so that rows of both join again
    for free; None where `away` is None, which is without guidance."""
    prefix = policy.prefix(condition)
    if away is None:
        return prefix, None
    both = policy.join([prefix, policy.prefix(away)])
    count = prefix.num_rows
    return both.take(range(count)), both.take(range(count, 2 * count))


def stack(signals: Sequence[Signal], device: torch.device | str = "cpu") -> Batch:
    """One batch of all states of all signals, which must share task and size."""
    prompts = {signal.prompt.id: signal.prompt for signal in signals}
    row = {name: place for place, name in enumerate(prompts)}
    counts = [len(signal.sigmas) for signal in signals]
    return Batch(
        prompts=tuple(prompts.values()),
        rows=tuple(
            row[s.prompt.id] for s, count in zip(signals, counts, strict=True) for _ in range(count)
        ),
        latents=torch.cat([signal.latents for signal in signals]).to(device),
        sigmas=torch.cat([signal.sigmas for signal in signals]).to(device),
        fields={
            name: torch.cat([signal.fields[name] for signal in signals]).to(device)
            for name in signals[0].fields
        },
        advantages=torch.tensor(
            [s.advantage for s, count in zip(signals, counts, strict=True) for _ in range(count)]
        ).to(device),
    )


def chunks(signals: Sequence[Signal], states: int) -> Iterator[Sequence[Signal]]:
    """Consecutive signals of one task and size, about `states` states at once."""
    start = 0
    for end in range(1, len(signals) + 1):
        count = sum(len(signal.sigmas) for signal in signals[start:end])
        is_last = end == len(signals) or _kind(signals[end]) != _kind(signals[start])
        if is_last or count >= states:
            yield signals[start:end]
            start = end


def by_kind(signals: Sequence[Signal]) -> list[Signal]:
    """The same signals with those of one task and size together, each in its order: then chunks are
    as full as they can be."""
    kinds: dict[Hashable, list[Signal]] = {}
    for signal in signals:
        kinds.setdefault(_kind(signal), []).append(signal)
    return [signal for own in kinds.values() for signal in own]


def _kind(signal: Signal) -> Hashable:
    return signal.prompt.task, signal.latents.shape[1:]


def _split(values: Tensor, signals: Sequence[Signal]) -> list[Tensor]:
    return list(values.cpu().split([len(signal.sigmas) for signal in signals]))


@torch.no_grad()
def velocities(
    policy: Policy[Any, Any], signals: Sequence[Signal], micro_batch: int
) -> list[Float[Tensor, " step *latent"]]:
    """Conditional velocity at the states of every signal."""
    found: dict[int, Tensor] = {}
    for chunk in chunks(by_kind(signals), micro_batch):
        velocity = stack(chunk, policy.device).velocity(policy)
        found |= zip(map(id, chunk), _split(velocity, chunk), strict=True)
    return [found[id(signal)] for signal in signals]


@torch.no_grad()
def guided_velocities(
    policy: Policy[Any, Any],
    signals: Sequence[Signal],
    micro_batch: int,
    guidance: Guidance,
) -> list[tuple[Float[Tensor, " step *latent"], Float[Tensor, " step *latent"]]]:
    """(guided, conditional) velocity at the states of every signal."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for chunk in chunks(by_kind(signals), micro_batch):
        guided, conditional, _ = stack(chunk, policy.device).guided(policy, guidance)
        both = zip(_split(guided, chunk), _split(conditional, chunk), strict=True)
        found |= zip(map(id, chunk), both, strict=True)
    return [found[id(signal)] for signal in signals]
