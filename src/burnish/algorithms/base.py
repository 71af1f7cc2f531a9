"""What an algorithm must offer. The loop does not know which one runs.

`credit` reads rewards or teachers and never gradients: it turns groups into signals, one per
trajectory, that say where the policy's velocity is wanted and what to make of it. `loss` is the
only method that sees gradients. Distillation is an algorithm like any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
from burnish.batches import Batch, guided_velocities, velocities
from burnish.borrowing import borrowed
from burnish.config import Config
from burnish.looks import Watch
from burnish.objectives import velocity_kl
from burnish.policies.base import Policy
from burnish.rewards.base import RewardConfig, tabulated
from burnish.rollout_config import RolloutConfig
from burnish.runtime import ALONE, Runtime
from burnish.sharding import frozen, whole
from burnish.types import Group, Guidance, Labelled, LossOutput, Prompt, Signal, Task, Trajectory


class SelfCheckError(RuntimeError):
    """The program found itself wrong; nothing in the user's input would correct it."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What an algorithm asks of a device beside the policy, for a plan of its memory."""

    copies: tuple[str, ...] = ()
    """Further transformers that stay on the device."""
    copies_read_ahead: int = 0
    """Transformers that wait in the memory of the host."""
    states: int
    """Of each sample that is trained on."""
    credit_scale: float = 1.0
    """Largest guidance scale at which it asks for velocities without gradient."""
    draw_scale: float = 1.0
    """Likewise, at which pictures are drawn."""
    draws: int = 0
    """Pictures of different prompts that it draws at once to look at the policy."""


class AlgorithmConfig(Config, ABC):
    """Base of the one config of each file on the shelf; its `kind` is the file's name."""

    needs_rewards: ClassVar[bool] = True
    """Whether groups must be scored before `credit`."""

    @property
    def trains_null(self) -> bool:
        """Whether the unconditional branch is run with gradient."""
        return False

    def pool(self, prompt: Labelled) -> str:
        """Prompts of one step share this label; a single one lets all mix.

        Raises:
            ConfigError: it cannot train on the prompt.
        """
        return ""

    @abstractmethod
    def check_rollout(
        self, rollout: RolloutConfig, tasks: Sequence[Task], *, draws_average: bool
    ) -> None:
        """Refuse, with the settings, a stage that draws what it cannot learn from.

        Args:
            rollout: how the stage draws.
            tasks: of its prompts.
            draws_average: not the policy draws but the average of its weights.

        Raises:
            ValueError: another rollout is needed, or more is for a task.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Look, before anything is trained, whether its own sets of prompts serve.

        Args:
            prompts: of the stage.

        Raises:
            ConfigError: they do not.
        """

    def sets(self) -> Mapping[str, str]:
        """Paths of its own sets of prompts, by the key that names each."""
        return {}

    @abstractmethod
    def footprint(self, rollout: RolloutConfig, micro_batch: int, *, may_borrow: bool) -> Footprint:
        """What it will ask of a device.

        Args:
            rollout: how the stage draws.
            micro_batch: states at once.
            may_borrow: see `StageContext`.
        """

    @abstractmethod
    def build(self, context: "StageContext") -> "Algorithm":
        """The algorithm for one run."""


def refuse_average(name: str, draws_average: bool) -> None:
    """Of an algorithm that compares the policy with what it drew itself."""
    if draws_average:
        raise ValueError(
            f"need rollouts of the policy itself for {name}, got draw_average=true; leave "
            "optimizer.draw_average out"
        )


class KlConfig(AlgorithmConfig, ABC):
    """Of an algorithm that can be held near the policy it started from."""

    kl_weight: float = Field(default=0.0, ge=0)
    """Of the mean squared distance to the start's conditional velocity (`velocity_kl`); 0 keeps no
    copy of the start."""

    def copies(self, *, may_borrow: bool) -> tuple[str, ...]:
        """Transformers that holding it needs."""
        return ("frozen start (kl_weight)",) if self.kl_weight and not may_borrow else ()


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
class StageContext:
    """What an algorithm is told about the run it works in."""

    policy: Policy[Any, Any]
    guidance: Guidance
    """Of the rollouts."""
    num_steps: int
    """Of the rollouts."""
    steps: int
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
    may_borrow: bool = False
    """Whether the policy's weights stay what they are, beside a LoRA, so that frozen ones may use
    them."""
    rt: Runtime = ALONE
    """Whose processes the groups of a step are dealt out to."""


class KlReference:
    """A frozen copy of the policy at the start, and the price of leaving it."""

    def __init__(self, config: KlConfig, context: StageContext) -> None:
        self._weight, self._micro_batch = config.kl_weight, context.micro_batch
        self._start: Policy[Any, Any] | None = None
        if config.kl_weight:
            own = context.policy
            self._start = borrowed(own) if context.may_borrow else frozen(own, context.rt)

    def mark(self, signals: Sequence[Signal]) -> list[Signal]:
        """The signals with the start's conditional velocity as the field `reference`."""
        if self._start is None:
            return list(signals)
        with whole(self._start):
            found = velocities(self._start, signals, self._micro_batch)
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

    def behaviour(
        self,
        policy: Policy[Any, Any],
        config: RolloutConfig,
        prompts: Sequence[Prompt],
        step: int,
    ) -> tuple[Policy[Any, Any], RolloutConfig]:
        """Who draws the groups of a step, and how: the policy itself, unless an algorithm learns
        from somebody else's."""
        return policy, config

    def watch(self, folder: Path, step: int, prompts: Sequence[Prompt]) -> Watch | None:
        """Who looks at the policy while it learns; None if the algorithm has no say in that.

        Args:
            folder: of the stage's run.
            step: at which the stage goes on.
            prompts: of the stage.
        """
        return None

    @abstractmethod
    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        """Signals of all trajectories worth training on, and metrics; without gradient. All
        processes come here; what is asked for velocities is asked inside `sharding.whole`."""

    @abstractmethod
    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        """Mean loss over the states of one micro-batch."""


def with_old(
    context: StageContext, signals: Sequence[Signal], guidance: Guidance | None
) -> list[Signal]:
    """The signals with the conditional velocity that the policy has before the update as the field
    `old`, and with its guided one as `guided` if guidance is given."""
    policy, count = context.policy, context.micro_batch
    with whole(policy):
        if guidance is None:
            old = velocities(policy, signals, count)
            return [s.with_fields(old=v) for s, v in zip(signals, old, strict=True)]
        pairs = guided_velocities(policy, signals, count, guidance)
    return [
        s.with_fields(guided=guided, old=conditional)
        for s, (guided, conditional) in zip(signals, pairs, strict=True)
    ]


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
    rt: Runtime,
) -> tuple[Advantages, dict[str, float]]:
    """Group-normalised, category-weighted advantages of scored groups, and what to log.

    Args:
        groups: of this process.
        configs: of the rewards.
        plan: from scores to advantages.
        rt: whose processes have the other groups of the step.

    Returns:
        Advantages of these groups; the numbers are of the groups of all processes.

    Raises:
        ValueError: groups of different sizes.
    """
    table = tabulated(groups, configs).of_all(rt)
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
    asked = table.asked
    metrics = {"reward/missing": 1.0 - float(present[asked].float().mean()) if asked.any() else 0.0}
    metrics["data/dropped_groups"] = float((~advantages.keep).sum())
    for r, name in enumerate(configs):
        if present[r].any():
            metrics[f"reward/{name}"] = float(values[r][present[r]].mean())
            metrics[f"advantage/share_{name}"] = float(advantages.share[r])
    own = advantages.of(slice(rt.rank, None, rt.world_size))
    return own, metrics | _composite(values, present, weights)


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
