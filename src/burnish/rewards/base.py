"""What a reward must offer, and how several become one opinion per image.

Local and remote rewards, pointwise and group-wide ones, are the same method. A failure is a value
with a name, never a number; not-applicable is decided per prompt. A reward set is a set of named
rewards with a weight vector per category of prompts, as in the paper (arXiv 2606.27608, section
4.2).
"""

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor

from burnish.config import Config
from burnish.runtime import Runtime
from burnish.types import Failed, Group, NotApplicable, Prompt, Score, Scored, ScoreRequest, Task

DeviceKind = Literal["cpu", "cuda"]
EVERY_CATEGORY = "default"
"""Key of the weights for categories that have none of their own."""
MAX_ERROR = 2e-3
"""Of a sum of weights, as they may be rounded to three digits."""


class Reward(ABC):
    """One opinion about images."""

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order; never raises for a bad image, but returns `Failed`."""


class ByTask(Reward):
    """Another opinion for each task."""

    def __init__(self, configs: "Mapping[Task, RewardConfig]") -> None:
        """Build the rewards; one that several tasks share is built once."""
        made = {repr(config): config.build() for config in configs.values()}
        self._rewards = {task: made[repr(config)] for task, config in configs.items()}

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        found: dict[int, Score] = {}
        for task, reward in self._rewards.items():
            own = [row for row, one in enumerate(requests) if one.prompt.task == task]
            if own:
                scores = reward.score([requests[row] for row in own])
                found |= zip(own, scores, strict=True)
        return [found[row] for row in range(len(requests))]


class RewardConfig(Config, ABC):
    """Base of the one config of each file on the shelf; its `kind` is the file's name."""

    span: ClassVar[float] = 1.0
    """From the worst score to the best."""
    weights: Mapping[str, float] = {EVERY_CATEGORY: 1.0}
    """Weight by category of the prompt; `default` for the others, 0 where the reward has no say."""
    tasks: tuple[Task, ...] = ("t2i", "edit")
    """Tasks on whose prompts it has a say."""
    floor: float = 1e-3
    """Standard deviation of scoring one image again: spread below it is noise, not preference."""

    @model_validator(mode="after")
    def _weights_are_usable(self) -> "RewardConfig":
        wrong = [name for name, weight in self.weights.items() if weight < 0]
        if wrong or not self.floor > 0:
            raise ValueError(
                f"need weights of at least 0 and a floor above 0, got {dict(self.weights)} and "
                f"{self.floor}; a reward that should be lowered is another reward"
            )
        return self

    def weight(self, prompt: Prompt) -> float:
        """Weight of this reward for a prompt, before the weights are made to sum to 1."""
        return self.weight_of(prompt.category) if prompt.task in self.tasks else 0.0

    def weight_of(self, category: str) -> float:
        """Weight of this reward for a category."""
        return self.weights.get(category, self.weights.get(EVERY_CATEGORY, 0.0))

    @property
    def runs_on(self) -> DeviceKind:
        """Where its models are: in the memory of the machine or, a copy for each process, of the
        GPU that trains."""
        return "cpu"

    def check(self) -> None:
        """Look, without loading anything, whether `build` would find what it needs.

        Raises:
            ConfigError: it would not.
        """

    def meet(self) -> None:
        """Look, before a run, whether who answers elsewhere is there.

        Raises:
            ConfigError: nobody is.
        """

    def inputs(self) -> Sequence[Path]:
        """Files whose content decides the scores, beside the settings."""
        return ()

    def footprint(self, resolution: int) -> Mapping[str, int]:
        """Bytes that its models need in this process, by what they are; equal names are one thing.

        Args:
            resolution: side of the pictures in pixels.
        """
        return {}

    @abstractmethod
    def build(self) -> Reward:
        """The reward itself; heavy imports belong here."""


def check_weights(
    configs: Mapping[str, RewardConfig], tasks: Sequence[Task], categories: Sequence[str] = ()
) -> None:
    """Look whether the weights of a set of rewards say what each of them counts.

    Rewards that all leave their weights out count alike.

    Args:
        configs: by name.
        tasks: of the prompts.
        categories: that must have weights, beside those that the weights name.

    Raises:
        ValueError: the weights of a category do not sum to 1.
    """
    if all(dict(config.weights) == {EVERY_CATEGORY: 1.0} for config in configs.values()):
        return
    for task in tasks:
        own = {name: config for name, config in configs.items() if task in config.tasks}
        named = [category for config in own.values() for category in config.weights]
        for category in dict.fromkeys([*named, *categories]):
            weights = {name: config.weight_of(category) for name, config in own.items()}
            if abs(sum(weights.values()) - 1) > MAX_ERROR:
                told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
                raise ValueError(
                    f"need weights of category {category!r} that sum to 1 for task {task}, got "
                    f"{told or 'no reward'}; correct rewards.NAME.weights, where "
                    f"{EVERY_CATEGORY!r} stands for categories without their own"
                )


@dataclass(frozen=True)
class RewardSet:
    """Named rewards with their weights."""

    configs: Mapping[str, RewardConfig]
    rewards: Mapping[str, Reward]

    @classmethod
    def build(cls, configs: Mapping[str, RewardConfig]) -> "RewardSet":
        """Build every reward of a recipe."""
        return cls(configs, {name: config.build() for name, config in configs.items()})

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the scores of all rewards that have weight for their prompts."""
        return _together(groups, {name: self.opinions(name, groups) for name in self.rewards})

    def opinions(self, name: str, groups: Sequence[Group]) -> list[tuple[Score, ...] | None]:
        """What one reward says of each group; None where it has no weight for the prompt."""
        asked = [self.configs[name].weight(group.prompt) > 0 for group in groups]
        requests = [
            ScoreRequest(prompt=group.prompt, image=trajectory.image)
            for group, is_asked in zip(groups, asked, strict=True)
            if is_asked
            for trajectory in group.trajectories
        ]
        answers = iter(self.rewards[name].score(requests) if requests else ())
        return [
            tuple(next(answers) for _ in group.trajectories) if is_asked else None
            for group, is_asked in zip(groups, asked, strict=True)
        ]


def _together(
    groups: Sequence[Group], opinions: Mapping[str, Sequence[tuple[Score, ...] | None]]
) -> list[Group]:
    """The groups with the scores of several rewards."""
    scored = []
    for row, group in enumerate(groups):
        said = {name: rows[row] for name, rows in opinions.items()}
        found = {name: scores for name, scores in said.items() if scores is not None}
        scored.append(replace(group, scores={**group.scores, **found}))
    return scored


class RewardWarning(UserWarning):
    """A reward that has no score for some pictures."""


class AsyncRewardSet:
    """Scores micro-batches on other threads while the next ones are sampled.

    Submit as images appear, then `collect` at the barrier before advantages; the result is the same
    as scoring everything at once, in the order of submission. Rewards do not wait for each other,
    so another one on another server adds no time of its own.
    """

    def __init__(self, rewards: RewardSet, workers: int | None = None) -> None:
        """Start the threads.

        Args:
            rewards: of the recipe.
            workers: threads; None takes one for each reward.
        """
        self._rewards = rewards
        count = max(1, len(rewards.rewards)) if workers is None else workers
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="reward")
        self._pending: list[tuple[list[Group], dict[str, Future[Any]]]] = []
        self._told: set[str] = set()

    def submit(self, groups: list[Group]) -> None:
        """Start scoring complete groups; returns at once."""
        asked = {
            name: self._pool.submit(self._rewards.opinions, name, groups)
            for name in self._rewards.rewards
        }
        self._pending.append((groups, asked))

    def collect(self) -> dict[str, Group]:
        """Wait for everything submitted; scored groups by prompt id."""
        pending, self._pending = self._pending, []
        found = {
            group.prompt.id: group
            for groups, asked in pending
            for group in _together(groups, {name: f.result() for name, f in asked.items()})
        }
        self._tell(list(found.values()))
        return found

    def _tell(self, groups: Sequence[Group]) -> None:
        """Say once of each reward why it fails, as what it misses is left out in silence."""
        for name in self._rewards.rewards.keys() - self._told:
            scores = [score for group in groups for score in group.scores.get(name, ())]
            reasons = Counter(score.reason for score in scores if isinstance(score, Failed))
            for reason, count in reasons.most_common(1):
                self._told.add(name)
                message = f"the reward {name} fails on {count} of {len(scores)} pictures: {reason}"
                warnings.warn(message, RewardWarning, stacklevel=2)

    def __enter__(self) -> "AsyncRewardSet":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class RewardTable:
    """The scores of several groups as tensors, and what the recipe makes of them."""

    values: Float[Tensor, "reward group sample"]
    present: Bool[Tensor, "reward group sample"]
    """The score exists; where it does not, its value means nothing."""
    weights: Float[Tensor, "reward group"]
    """0 where the reward has no say."""
    asked: Bool[Tensor, "reward group"]
    """The reward was to say something about the group."""
    floors: Float[Tensor, " reward"]

    def of_all(self, rt: Runtime) -> "RewardTable":
        """The table of the groups of all processes, in the order in which they were dealt out."""
        if rt.world_size == 1:
            return self
        names = ("values", "present", "weights", "asked")
        own = [[getattr(self, n)[:, g].tolist() for n in names] for g in range(len(self.asked[0]))]
        columns = zip(names, zip(*rt.together(own), strict=True), strict=True)
        found = {name: torch.tensor(column).transpose(0, 1) for name, column in columns}
        return RewardTable(floors=self.floors, **found)


def tabulated(groups: Sequence[Group], configs: Mapping[str, RewardConfig]) -> RewardTable:
    """The scores of groups in the order of the rewards.

    Raises:
        ValueError: groups of different sizes.
    """
    size = len(groups[0].trajectories)
    if any(len(group.trajectories) != size for group in groups):
        raise ValueError("need groups of one size, got several; draw them with one group_size")
    found = [
        [scored_values(group.scores.get(name, ())) or [None] * size for group in groups]
        for name in configs
    ]
    weights = [
        [config.weight(group.prompt) * _has_say(group, name) for group in groups]
        for name, config in configs.items()
    ]
    return RewardTable(
        values=torch.tensor([[[v or 0.0 for v in group] for group in row] for row in found]),
        present=torch.tensor([[[v is not None for v in group] for group in row] for row in found]),
        weights=torch.tensor(weights),
        asked=torch.tensor([[name in group.scores for group in groups] for name in configs]),
        floors=torch.tensor([config.floor for config in configs.values()]),
    )


def _has_say(group: Group, name: str) -> bool:
    """Whether a reward applies to a group; one that failed applies, and its samples drop out."""
    scores = group.scores.get(name, ())
    return any(not isinstance(score, NotApplicable) for score in scores)


def scored_values(scores: Sequence[Score]) -> list[float | None]:
    """Values of the scored ones, None for the others."""
    return [score.value if isinstance(score, Scored) else None for score in scores]
