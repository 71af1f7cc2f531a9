"""What an algorithm must offer. The loop does not know which one runs.

`credit` reads rewards or teachers and never gradients: it turns groups into signals, one per
trajectory, that say where the policy's velocity is wanted and what to make of it. `loss` is the
only method that sees gradients. Distillation is an algorithm like any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from burnish.advantages import (
    Advantages,
    Combination,
    MissingMode,
    StdMode,
    composite,
    group_advantages,
)
from burnish.config import Config
from burnish.objectives import velocity_kl
from burnish.policies.base import Policy
from burnish.rewards.base import RewardConfig, tabulated
from burnish.types import Group, LossOutput, Prompt, Signal, Task, Trajectory


class SelfCheckError(RuntimeError):
    """The program found itself wrong; nothing in the user's input would mend it."""


LearnsFrom = Literal["transitions", "samples", "path"]
"""Stochastic steps of the window, finished samples, or the states along an unguided path."""


class AlgorithmConfig(Config, ABC):
    """Base of the one config of each file on the shelf; its `kind` is the file's name."""

    needs_rewards: ClassVar[bool] = True
    """Whether groups must be scored before `credit`."""
    learns_from: ClassVar[LearnsFrom]
    """What of a rollout it reads, so that a rollout without it can be refused early."""

    def covers(self, task: Task) -> bool:
        """Whether it can train on prompts of this task."""
        return True

    def pool(self, prompt: Prompt) -> str:
        """Prompts of one step share this label; a single one lets all mix.

        Raises:
            ConfigError: it cannot train on the prompt.
        """
        return ""

    def check_guidance(self, scale: float) -> None:
        """Refuse rollouts that it cannot learn from.

        Args:
            scale: their guidance scale.

        Raises:
            ValueError: needs another scale.
        """

    @abstractmethod
    def build(self, setting: "Setting") -> "Algorithm":
        """The algorithm for one run."""


class AnchoredConfig(AlgorithmConfig, ABC):
    """Of an algorithm that can be held near the policy it started from."""

    kl_weight: float = Field(default=0.0, ge=0)
    """Of the mean squared distance to the start's conditional velocity (`velocity_kl`); 0 keeps no
    copy of the start."""


class AdvantagesConfig(Config):
    """From scores to advantages; the defaults are the paper's, the rest are controls."""

    spread: StdMode = "group"
    """What divides a centred reward: the spread of its group, that of the batch, or nothing."""
    combination: Combination = "each"
    """`each` normalises every reward, then adds; `sum` adds raw rewards, then normalises."""
    missing: MissingMode = "sample"
    """What a missing score takes out: the whole sample, or its place in that one reward."""
    rescale_batch: bool = False
    """Divide by the spread of the advantages of the whole batch, too."""
    clamp: float = Field(default=5.0, gt=0)
    """Largest absolute advantage."""

    @model_validator(mode="after")
    def _a_sum_has_all_its_terms(self) -> "AdvantagesConfig":
        if self.combination == "sum" and self.missing == "reward":
            raise ValueError(
                "need missing=sample for combination=sum, got missing=reward; a sum needs all its "
                "terms"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an algorithm is told about the run it works in."""

    policy: Policy[Any, Any]
    guidance_scale: float
    """Of the rollouts."""
    sampler_steps: int
    """Of the rollouts."""
    num_steps: int
    """Of the stage."""
    kernel: str
    noise_level: float
    num_updates: int
    """Optimizer steps on the groups of one rollout."""
    micro_batch: int
    """States at once."""
    seed: int
    rewards: Mapping[str, RewardConfig]
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)


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

    def guided(
        self, policy: Policy[Any, Any], scale: float
    ) -> tuple[Float[Tensor, " state *latent"], Float[Tensor, " state *latent"]]:
        """The policy's (guided, conditional) velocity at every state."""
        null = policy.prefix(policy.encode_null(self.prompts)).take(self.rows)
        return policy.guided(self.latents, self.sigmas, self.prefix(policy), null, scale)

    def prefix(self, policy: Policy[Any, Any]) -> Any:
        """One prefix row per state."""
        return policy.prefix(policy.encode(self.prompts)).take(self.rows)


def stack(signals: Sequence[Signal], device: torch.device | str = "cpu") -> Batch:
    """One batch of all states of all signals, which must share a task."""
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
    """Consecutive signals of one task, about `states` states at once."""
    start = 0
    for end in range(1, len(signals) + 1):
        count = sum(len(signal.sigmas) for signal in signals[start:end])
        is_last = end == len(signals) or signals[end].prompt.task != signals[start].prompt.task
        if is_last or count >= states:
            yield signals[start:end]
            start = end


def _split(values: Tensor, signals: Sequence[Signal]) -> list[Tensor]:
    return list(values.cpu().split([len(signal.sigmas) for signal in signals]))


@torch.no_grad()
def evaluate(
    policy: Policy[Any, Any], signals: Sequence[Signal], micro_batch: int
) -> list[Float[Tensor, " step *latent"]]:
    """Conditional velocity at the states of every signal."""
    found: list[Tensor] = []
    for chunk in chunks(signals, micro_batch):
        batch = stack(chunk, policy.device)
        found += _split(batch.velocity(policy), chunk)
    return found


@torch.no_grad()
def evaluate_guided(
    policy: Policy[Any, Any], signals: Sequence[Signal], micro_batch: int, scale: float
) -> list[tuple[Float[Tensor, " step *latent"], Float[Tensor, " step *latent"]]]:
    """(guided, conditional) velocity at the states of every signal."""
    found: list[tuple[Tensor, Tensor]] = []
    for chunk in chunks(signals, micro_batch):
        batch = stack(chunk, policy.device)
        guided, conditional = batch.guided(policy, scale)
        found += zip(_split(guided, chunk), _split(conditional, chunk), strict=True)
    return found


class Anchor:
    """A frozen copy of the policy at the start, and the price of leaving it."""

    def __init__(self, config: AnchoredConfig, setting: Setting) -> None:
        self._weight, self._micro_batch = config.kl_weight, setting.micro_batch
        self._start = setting.policy.sibling() if config.kl_weight else None

    def mark(self, signals: Sequence[Signal]) -> list[Signal]:
        """The signals with the start's conditional velocity as the field `reference`."""
        if self._start is None:
            return list(signals)
        found = evaluate(self._start, signals, self._micro_batch)
        return [
            s.with_fields(reference=velocity) for s, velocity in zip(signals, found, strict=True)
        ]

    def hold(
        self, output: LossOutput, conditional: Float[Tensor, " state *latent"], batch: Batch
    ) -> LossOutput:
        """The loss with the distance of `conditional` to the start added to it."""
        if self._start is None:
            return output
        distance = velocity_kl(conditional, batch.fields["reference"]).mean()
        metrics = {**output.metrics, "policy/velocity_kl": float(distance.detach())}
        return LossOutput(loss=output.loss + self._weight * distance, metrics=metrics)


class Algorithm(ABC):
    """Turns groups into signals, and signals into a loss."""

    @abstractmethod
    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        """Signals of all trajectories worth training on, and metrics; without gradient."""

    @abstractmethod
    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        """Mean loss over the states of one micro-batch."""


def credited(
    groups: Sequence[Group], advantages: Advantages
) -> Iterator[tuple[Group, int, Trajectory, float]]:
    """Group, place in it, trajectory and advantage of every sample of the groups worth training
    on."""
    for g, group in enumerate(groups):
        if bool(advantages.keep[g]):
            for place, trajectory in enumerate(group.trajectories):
                yield group, place, trajectory, float(advantages.advantages[g, place])


def reward_advantages(
    groups: Sequence[Group],
    configs: Mapping[str, RewardConfig],
    plan: AdvantagesConfig,
) -> tuple[Advantages, dict[str, float]]:
    """Group-normalised, category-weighted advantages of scored groups, and what to log.

    Raises:
        ValueError: groups of different sizes.
    """
    table = tabulated(groups, configs)
    values, present, weights = table.values, table.present, table.weights
    advantages = group_advantages(
        values,
        present,
        weights,
        table.floors,
        std_mode=plan.spread,
        combination=plan.combination,
        missing=plan.missing,
        rescale_batch=plan.rescale_batch,
        clamp=plan.clamp,
    )
    asked = torch.tensor([[name in group.scores for group in groups] for name in configs])
    metrics = {"reward/missing": 1.0 - float(present[asked].float().mean()) if asked.any() else 0.0}
    metrics["data/dropped_groups"] = float((~advantages.keep).sum())
    for r, name in enumerate(configs):
        if present[r].any():
            metrics[f"reward/{name}"] = float(values[r][present[r]].mean())
            metrics[f"advantage/share_{name}"] = float(advantages.share[r])
    return advantages, metrics | _composite(values, present, weights)


def _composite(values: Tensor, present: Tensor, weights: Tensor) -> dict[str, float]:
    """Mean weighted reward, and its mean spread within a group, of the samples with all scores."""
    values, counted = composite(values, present, weights)
    spreads = [
        float(row[kept].std(correction=0))
        for row, kept in zip(values, counted, strict=True)
        if bool(kept.any())
    ]
    if not spreads:
        return {}
    return {
        "reward/mean": float(values[counted].mean()),
        "reward/group_std": sum(spreads) / len(spreads),
    }
