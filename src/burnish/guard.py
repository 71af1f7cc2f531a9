"""A guard against reward hacking: a scorer that trains nothing looks at the policy now and then.

A policy that is trained against a judge long enough finds what the judge can be talked into: the
reward goes on rising while the pictures get worse (arXiv 2606.27608, section 4.2, saw it within few
iterations when all timesteps were trained). So every few steps the policy draws the same pictures
of prompts that it is not trained on, another scorer reads them, and a rule compares
(`burnish.hacking`). Beside the score stand figures that a cheat moves: what further scorers say,
sharpness, saturation, roughness and diversity of the pictures (`burnish.traits`), whether named
people and styles are still known, and how much guidance the conditional branch has absorbed.

    guard/looks.jsonl        a row for each look, with the score of every prompt
    guard/start.safetensors  states and velocities of the start, for the absorption
    guard/step-.../          the weights with the best score so far
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish import runtime, traits
from burnish.batches import guided_velocities
from burnish.config import Config, ConfigError, located
from burnish.flow import add_noise
from burnish.guidance import absorption
from burnish.hacking import MIN_COVERAGE, is_better, verdict
from burnish.looks import LEVELS, Look, Looks, Watch
from burnish.policies.base import Policy
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts, spaced
from burnish.rewards.base import Reward, RewardConfig
from burnish.rollout import draw, read_ahead
from burnish.rollout_config import RolloutConfig
from burnish.runtime import Runtime
from burnish.shelves import AnyReward
from burnish.tracking import RunError, writing
from burnish.types import Failed, Prompt, Scored, ScoreRequest, Signal, Task

FOLDER = "guard"
"""Of the looks, in the folder of the stage's run."""
_STATES = 8
"""Pictures on which it is."""


class RetentionConfig(Config):
    """What a policy knew before and no reward asks for."""

    prompts: str = "embedded:prompts/knowledge.jsonl"
    """Of named people and styles."""
    num_prompts: int = Field(default=32, ge=2)
    """At even distances; one picture each."""
    judge: AnyReward | None = None
    """Scores them, and everything in the details of its scores is told; None is the guard's."""


class GuardConfig(Config):
    """When a stage looks whether its reward is still worth following, and what it does if not."""

    judge: AnyReward
    """Scores the pictures, and the rule goes by it; it should be none of the rewards."""
    others: Mapping[str, AnyReward] = {}
    """Further scorers of the same pictures, by names of yours: told beside it, no part of the
    rule."""
    retention: RetentionConfig | None = None
    """None does not look."""
    every: int = Field(default=8, ge=1)
    """Steps between two looks."""
    prompts: str = "embedded:prompts/held-out.jsonl"
    num_prompts: int = Field(default=32, ge=8)
    """Of each task, from the end of the file: an evaluation begins at its beginning."""
    num_seeds: int = Field(default=2, ge=2)
    """Pictures of each prompt, the same noise at every look."""
    num_steps: int | None = Field(default=None, ge=1)
    """Sampler steps of the pictures; None is as the stage draws."""
    max_loss: float = Field(default=0.2, gt=0, lt=1)
    """Share of the best gain so far that may be lost again."""
    action: Literal["warn", "stop", "roll_back"] = "roll_back"
    """`warn` only writes it down; `stop` ends the stage; `roll_back` ends it with the weights of
    the best look."""

    def scorers(self) -> Iterator[tuple[str, RewardConfig]]:
        """All that score, by the key that names each here."""
        yield "judge", self.judge
        for name, reward in self.others.items():
            yield f"others.{name}", reward
        if self.retention is not None and self.retention.judge is not None:
            yield "retention.judge", self.retention.judge


def held_out(
    config: GuardConfig, tasks: Sequence[Task], trained_on: PromptSet | None = None
) -> PromptSet:
    """The prompts that a guard looks at, task by task.

    Args:
        config: of the guard.
        tasks: of the stage.
        trained_on: the prompts that the stage is trained on, if they are to be compared.

    Raises:
        ConfigError: too few, or one that the stage is trained on.
    """
    every = read_prompts(located(config.prompts))
    entries = []
    for task in tasks:
        own = every.select(lambda prompt, task=task: prompt.task == task)[-config.num_prompts :]
        if len(own) < config.num_prompts:
            raise ConfigError(
                f"guard.num_prompts: need {config.num_prompts} prompts of task {task}, got "
                f"{len(own)} in {config.prompts}; ask for fewer"
            )
        entries += own.entries
    chosen = PromptSet(entries)
    if trained_on is not None and (shared := chosen.shared(trained_on).entries):
        raise ConfigError(
            f"guard.prompts: need prompts that the stage is not trained on, got {shared[0].id!r} "
            f"and {len(shared) - 1} more of {len(chosen)} that it is trained on; give another set"
        )
    return chosen


class Guard(Watch):
    """The looks of one stage."""

    def __init__(
        self,
        config: GuardConfig,
        rollout: RolloutConfig,
        tasks: Sequence[Task],
        folder: Path,
        *,
        step: int,
    ) -> None:
        """Read what was seen before.

        Args:
            config: when, with what, and what follows.
            rollout: as the stage draws; noise of a window is left out.
            tasks: of the stage.
            folder: of the stage's run.
            step: at which the stage goes on; later looks are forgotten, as they come again.

        Raises:
            ConfigError: too few prompts.
        """
        self._config, self._rollout = config, rollout
        self.looks = Looks(folder / FOLDER, every=config.every, step=step, is_better=is_better)
        self._judge = config.judge.build()
        self._others = {name: reward.build() for name, reward in config.others.items()}
        self._known = _Retention(config.retention, self._judge, tasks)
        self._prompts: list[Prompt] = list(held_out(config, tasks))

    @property
    def is_over(self) -> bool:
        """Whether the stage must end here."""
        ends = self._config.action != "warn"
        return ends and any(look["verdict"] == "hacked" for look in self.looks.rows)

    def prepare(self, policy: Policy[Any, Any], rt: Runtime) -> None:
        """Read the prompts, before the policy is gathered to draw."""
        if rt.is_main:
            with rt.autocast():
                read_ahead(policy, [*self._prompts, *self._known.prompts], self._rollout.guidance)

    def look(
        self, policy: Policy[Any, Any], step: int, reward: float | None, rt: Runtime
    ) -> dict[str, float]:
        """Draw, score and compare."""
        seeds = self._config.num_seeds
        with rt.autocast():
            pictures = self._draw(policy, self._prompts, seeds)
            known = self._draw(policy, self._known.prompts, 1)
            absorbed = self._absorbed(policy, pictures)
        coverage: dict[str, float] = {}
        scores, coverage["judge"] = self._scores("judge", self._judge, pictures)
        others: dict[str, float] = {}
        for name, scorer in self._others.items():
            said, coverage[f"others.{name}"] = self._scores(f"others.{name}", scorer, pictures)
            others |= _told({name: list(said.values())}, coverage[f"others.{name}"])
        retention, share = self._known.kept(known)
        if self._known.prompts:
            coverage["retention"] = share
        each = [picture[None] for picture in pictures]
        found = {
            "sharpness": _mean(traits.sharpness, each),
            "saturation": _mean(traits.saturation, each),
            "roughness": _mean(traits.roughness, each),
            "diversity": _mean(traits.diversity, traits.groups(pictures, seeds)),
            "absorbed_guidance": absorbed,
        }
        held_out = float(np.mean(list(scores.values())))
        look: Look = {
            "step": step,
            "reward": reward,
            "held_out": held_out,
            "verdict": "fine",
            "others": others,
            "retention": retention,
            "coverage": coverage,
            "traits": found,
            "scores": scores,
        }
        self.looks.rows.append(look)
        look["verdict"] = verdict(self.looks.rows, self._config.max_loss)
        return {
            "guard/held_out": held_out,
            "guard/hacked": float(look["verdict"] == "hacked"),
            **{f"guard/{name}": value for name, value in found.items()},
            **{f"guard/others/{name}": value for name, value in others.items()},
            **{f"guard/retention/{name}": value for name, value in retention.items()},
            **{f"guard/coverage/{name}": value for name, value in coverage.items()},
        }

    def restore(self, policy: Policy[Any, Any]) -> None:
        """Give back the weights of the best look, if that is what the guard is for."""
        if self._config.action != "roll_back" or not self.is_over:
            return
        # The start is no result, although it was the best.
        if not self.looks.best["step"]:
            raise RunError(
                "need a held-out score that rises before it falls, got none better than the start; "
                "choose other rewards, or look more often with guard.every"
            )
        self.looks.restore(policy)

    def _draw(
        self, policy: Policy[Any, Any], prompts: Sequence[Prompt], seeds: int
    ) -> list[Tensor]:
        """Pictures of prompts, those of one prompt together; the same noise at every look."""
        each = [prompt for prompt in prompts for _ in range(seeds)]
        noises = [
            runtime.derived_seed(0, "guard", prompt.id, place % seeds)
            for place, prompt in enumerate(each)
        ]
        return draw(
            policy,
            each,
            num_steps=self._config.num_steps or self._rollout.num_steps,
            guidance=self._rollout.guidance,
            seeds=noises,
            micro_batch=self._rollout.micro_batch,
        )

    def _scores(
        self, key: str, reward: Reward, pictures: Sequence[Tensor]
    ) -> tuple[dict[str, float], float]:
        """Mean score of each prompt's pictures, prompts without any missing; and the coverage."""
        asked = [prompt for prompt in self._prompts for _ in range(self._config.num_seeds)]
        found: dict[str, list[float]] = {}
        answers, coverage = _answers(reward, asked, pictures)
        for prompt, answer in answers:
            found.setdefault(prompt.id, []).append(answer.value)
        if not found:
            raise RunError(
                f"need held-out pictures that guard.{key} can score, got none of {len(pictures)}; "
                "choose a judge that has a say on these prompts"
            )
        return {name: float(np.mean(values)) for name, values in found.items()}, coverage

    def _absorbed(self, policy: Policy[Any, Any], pictures: Sequence[Tensor]) -> float:
        """Mean projection of the conditional branch's move onto the start's guidance; 0 without."""
        if self._rollout.guidance_scale == 1:
            return 0.0
        # One call has one task and one size.
        kinds = [(prompt.task, policy.buckets.size(prompt)) for prompt in self._prompts]
        rows = [row for row, kind in enumerate(kinds) if kind == kinds[0]][:_STATES]
        prompts = [self._prompts[row] for row in rows] * len(LEVELS)
        path = self.looks.folder / "start.safetensors"
        if not self.looks.rows:
            first = [pictures[row * self._config.num_seeds] for row in rows]
            states = self._states(policy, torch.stack(first))
            guided, conditional = self._velocities(policy, prompts, states)
            self.looks.folder.mkdir(parents=True, exist_ok=True)
            with writing(path):
                save_file({**states, "conditional": conditional, "guided": guided}, path)
            return 0.0
        start = load_file(path)
        _, conditional = self._velocities(policy, prompts, start)
        scale = self._rollout.guidance_scale
        moved = absorption(conditional, start["conditional"], start["guided"], scale)
        return float(moved.projection.mean())

    def _states(
        self,
        policy: Policy[Any, Any],
        pictures: Float[Tensor, "picture 3 height width"],
    ) -> dict[str, Tensor]:
        """A picture each of some prompts, noised to each level."""
        clean = policy.encode_images(pictures.to(policy.device)).cpu()
        clean = clean.float().repeat(len(LEVELS), 1, 1, 1)
        draws = runtime.generator(0, "guard", "states")
        sigmas = torch.tensor(LEVELS).repeat_interleave(len(pictures))
        noise = torch.randn(clean.shape, generator=draws)
        return {"latents": add_noise(clean, noise, sigmas).contiguous(), "sigmas": sigmas}

    def _velocities(
        self, policy: Policy[Any, Any], prompts: Sequence[Prompt], states: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(guided, conditional) at the states."""
        each = zip(prompts, states["latents"].split(1), states["sigmas"].split(1), strict=True)
        signals = [Signal(prompt=p, latents=latents, sigmas=sigma) for p, latents, sigma in each]
        found = guided_velocities(
            policy, signals, self._rollout.micro_batch, self._rollout.guidance
        )
        guided, conditional = (torch.cat(own).float() for own in zip(*found, strict=True))
        return guided.contiguous(), conditional.contiguous()


class _Retention:
    """Whether what no reward asks for is still known."""

    def __init__(
        self, config: RetentionConfig | None, judge: Reward, tasks: Sequence[Task]
    ) -> None:
        self.prompts: list[Prompt] = []
        self._judge = judge
        if config is None:
            return
        known = read_prompts(located(config.prompts)).select(lambda p: p.task in tasks)
        if not known:
            raise ConfigError(
                f"guard.retention: need prompts of task {' or '.join(tasks)}, got none in "
                f"{config.prompts}; give others, or leave `retention` out"
            )
        self.prompts = spaced(known, config.num_prompts)
        if config.judge is not None:
            self._judge = config.judge.build()

    def kept(self, pictures: Sequence[Tensor]) -> tuple[dict[str, float], float]:
        """Mean of everything in the details of the scores, or of the scores where there are none,
        and the coverage; empty if nobody looks."""
        found: dict[str, list[float]] = {}
        answers, coverage = _answers(self._judge, self.prompts, pictures)
        for _, answer in answers:
            for name, value in (answer.detail or {"score": answer.value}).items():
                found.setdefault(name, []).append(value)
        return _told(found, coverage), coverage


def _mean(trait: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> float:
    return float(np.mean([float(trait(one)) for one in pictures]))


def _told(found: Mapping[str, list[float]], coverage: float) -> dict[str, float]:
    """Means of what was found; none of too little, which would be of other prompts at each look."""
    if coverage < MIN_COVERAGE:
        return {}
    return {name: float(np.mean(values)) for name, values in found.items()}


def _answers(
    reward: Reward, prompts: Sequence[Prompt], pictures: Sequence[Tensor]
) -> tuple[list[tuple[Prompt, Scored]], float]:
    """The scores that there are, and their share of those that were due; without prompts nobody is
    asked."""
    if not prompts:
        return [], 1.0
    requests = [ScoreRequest(prompt=p, image=i) for p, i in zip(prompts, pictures, strict=True)]
    answers = list(zip(prompts, reward.score(requests), strict=True))
    found = [(prompt, answer) for prompt, answer in answers if isinstance(answer, Scored)]
    failed = sum(isinstance(answer, Failed) for _, answer in answers)
    return found, len(found) / max(1, len(found) + failed)
