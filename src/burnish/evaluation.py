"""Measure policies on prompts nobody trained on, on the same prompts and seeds for all of them.

Every picture becomes one row per metric in `scores.jsonl`; a mean comes with the 95 % interval of a
bootstrap over prompts, because prompts, not pictures, are what a claim is meant to hold for.
Differences between two policies are paired by prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from burnish import images, runtime, traits
from burnish.config import Config
from burnish.policies.base import Policy
from burnish.progress import progress
from burnish.rewards.base import Reward
from burnish.rollout import draw
from burnish.runtime import Runtime
from burnish.tracking import write_atomic
from burnish.types import Failed, Guidance, NotApplicable, Prompt, Scored, ScoreRequest

Row = dict[str, Any]
"""policy, prompt, task, category, seed, metric, value."""


HEADLINE = "composite"
"""The metric that a policy is measured by: what the judge says."""
AT_ONCE = 96
"""Pictures between two looks of a judge."""


class EvaluationConfig(Config):
    """How policies are measured."""

    prompts: str = "embedded:prompts/held-out.jsonl"
    """Held-out prompts: what training is meant to improve."""
    knowledge: str | None = "embedded:prompts/knowledge.jsonl"
    """Prompts for what no reward rewards: named people and styles."""
    num_prompts: int = Field(default=96, ge=2)
    """Of each task."""
    num_seeds: int = Field(default=2, ge=1)
    """Pictures per held-out prompt."""
    num_knowledge: int = Field(default=96, ge=2)
    """Knowledge prompts, one picture each."""
    best_of: int = Field(default=16, ge=1)
    """Pictures per prompt of the base, whose best marks how far re-weighting could go."""
    best_of_prompts: int = Field(default=48, ge=2)
    """Prompts of each task for that mark."""
    num_steps: int = Field(default=10, ge=1)
    guidance_scale: float = Field(default=3.0, ge=1)
    """Of the base; a stage is measured at the scale of its own rollouts, a student at 1."""
    negative_prompt: str = ""
    """Of the base, likewise."""
    seed: int = 10_000
    """Seeds of the pictures; far from those of training."""
    micro_batch: int = Field(default=64, ge=1)
    """Pictures at once, here and on benches; changes none but for rounding."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over prompts."""

    mean: float
    low: float
    high: float
    num_prompts: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def measure(
    policy: Policy[Any, Any],
    prompts: Sequence[Prompt],
    reward: Reward,
    rt: Runtime,
    *,
    name: str,
    config: EvaluationConfig,
    guidance: Guidance,
    num_seeds: int,
    pictures: Path | None = None,
) -> list[Row]:
    """Draw `num_seeds` pictures of every prompt and score them.

    Args:
        policy: whose pictures these are.
        prompts: of any mix of tasks.
        reward: its score is the `HEADLINE`, and the score's details are metrics, too; a failed
            score is a row without value. One metric more is `diversity`, of the pictures of a
            prompt that has several.
        rt: device and precision.
        name: of the policy, in the rows.
        config: steps and seeds.
        guidance: scale 1 draws without.
        num_seeds: pictures per prompt; seed k is the same noise for every policy.
        pictures: folder for the first picture of every prompt, as WebP.
    """
    rows: list[Row] = []
    chunk = max(1, AT_ONCE // num_seeds)
    with progress(f"measure {name}", len(prompts)) as bar:
        for start in range(0, len(prompts), chunk):
            block = [p for p in prompts[start : start + chunk] for _ in range(num_seeds)]
            seeds = list(range(num_seeds)) * (len(block) // num_seeds)
            noises = [
                runtime.derived_seed(config.seed, "evaluation", p.id, s)
                for p, s in zip(block, seeds, strict=True)
            ]
            with rt.autocast():
                drawn = draw(
                    policy,
                    block,
                    num_steps=config.num_steps,
                    guidance=guidance,
                    seeds=noises,
                    micro_batch=config.micro_batch,
                )
            requests = [
                ScoreRequest(prompt=p, image=image) for p, image in zip(block, drawn, strict=True)
            ]
            for request, seed, score in zip(requests, seeds, reward.score(requests), strict=True):
                rows += _rows(name, request.prompt, seed, score)
                if pictures is not None and seed == 0:
                    save_picture(pictures / f"{request.prompt.id}.webp", request)
            if num_seeds > 1:
                rows += _diversity(name, block[::num_seeds], traits.groups(drawn, num_seeds))
            bar.advance(len(block) // num_seeds)
    return rows


def save_picture(path: Path, request: ScoreRequest) -> None:
    """Write the picture of a request as it is."""
    write_atomic(path, images.encode_webp(images.to_pil(request.image), quality=None))


def _rows(
    name: str, prompt: Prompt, seed: int, score: Scored | NotApplicable | Failed
) -> list[Row]:
    common = _cell(name, prompt, seed)
    if isinstance(score, Scored):
        # The oracle has one of its own, over all its dimensions.
        found = {**score.detail, HEADLINE: score.detail.get(HEADLINE, score.value)}
        return [{**common, "metric": k, "value": round(v, 6)} for k, v in found.items()]
    if isinstance(score, Failed):
        return [{**common, "metric": "failed", "value": None, "reason": score.reason}]
    return []


def _diversity(
    name: str, prompts: Sequence[Prompt], groups: Sequence[Float[Tensor, "1 member 3 _ _"]]
) -> list[Row]:
    values = [float(traits.diversity(group)) for group in groups]
    return [
        {**_cell(name, prompt, 0), "metric": "diversity", "value": round(value, 6)}
        for prompt, value in zip(prompts, values, strict=True)
    ]


def _cell(name: str, prompt: Prompt, seed: int) -> Row:
    """Whose score of what a row is."""
    return {
        "policy": name,
        "prompt": prompt.id,
        "task": prompt.task,
        "category": prompt.category,
        "seed": seed,
    }


def by_prompt(rows: Iterable[Row], **wanted: str) -> dict[str, list[float]]:
    """Values of the rows that match, e.g. `policy="base", metric="composite"`, by prompt."""
    found: dict[str, list[float]] = {}
    for row in rows:
        is_wanted = all(row.get(key) == value for key, value in wanted.items())
        if is_wanted and row["value"] is not None:
            found.setdefault(row["prompt"], []).append(row["value"])
    return found


def estimate(
    values: Mapping[str, Sequence[float]] | Sequence[float], resamples: int = 4000
) -> Estimate:
    """Mean over prompts of each prompt's mean, with the percentile interval over prompts.

    Raises:
        ValueError: there is no prompt.
    """
    groups = list(values.values()) if isinstance(values, Mapping) else [[v] for v in values]
    if not groups:
        raise ValueError("need at least one prompt, got none; nothing was measured")
    means = np.array([float(np.mean(group)) for group in groups])
    rng = np.random.default_rng(0)
    picks = rng.integers(len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[picks].mean(axis=1), [0.025, 0.975])
    return Estimate(float(means.mean()), float(low), float(high), len(means))


def differences(
    rows: Sequence[Row], policy: str, over: str, **wanted: str
) -> dict[str, list[float]]:
    """Difference of the means of two policies on every prompt that both have."""
    mine, theirs = (by_prompt(rows, policy=name, **wanted) for name in (policy, over))
    shared = sorted(mine.keys() & theirs.keys())
    return {p: [float(np.mean(mine[p]) - np.mean(theirs[p]))] for p in shared}


def gain(rows: Sequence[Row], policy: str, over: str, **wanted: str) -> Estimate:
    """Mean difference of two policies, paired by prompt."""
    return estimate(differences(rows, policy, over, **wanted))


def best_of(rows: Iterable[Row], **wanted: str) -> dict[str, list[float]]:
    """The best value of every prompt: what perfect re-weighting of the samples would reach."""
    return {prompt: [max(values)] for prompt, values in by_prompt(rows, **wanted).items()}
