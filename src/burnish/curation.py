"""Which prompts are worth a rollout: those whose samples differ in reward.

A group whose samples are all good, or all bad, teaches nothing: its advantages are noise over
noise. So before training the base draws one group of every prompt, and a prompt is kept if its
range, the largest minus the smallest composite reward, exceeds a threshold (arXiv 2606.27608,
section 4.2). The paper does not give the threshold. Here it is a multiple of what the judges' own
noise does to the composite; a share of the prompts, or a band of difficulty, can be asked for in
its place.

    profile.jsonl   a row for every prompt, written as it is measured: a stopped job goes on
    kept.jsonl      the prompts that are kept, as a set that a stage reads
    curation.json   counts and quantiles, over all prompts and by category
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from burnish.advantages import composite, group_range, normalised_weights
from burnish.config import Config, ConfigError
from burnish.policies.base import Policy
from burnish.prompts import PromptsConfig, write_prompts
from burnish.rewards.base import AsyncRewardSet, RewardSet, scored_values, tabulated
from burnish.rollout import RolloutConfig, sample
from burnish.runtime import Runtime
from burnish.tracking import progress, read_rows, write_json, writing
from burnish.training import AnyReward
from burnish.types import Group, Prompt

Profile = Mapping[str, Any]
"""prompt, task, category, range, mean, noise, scored; `scores`: reward -> one for each sample."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class SelectionConfig(Config):
    """Which prompts of a profile are kept; a prompt must pass every rule that is given."""

    noise_multiple: float = Field(default=3.0, ge=0)
    """Least range, as a multiple of the standard deviation that the rewards' floors give the
    composite; 0 keeps every prompt with a range."""
    min_range: float | None = Field(default=None, ge=0)
    """Least range in points of the composite."""
    top: float | None = Field(default=None, gt=0, le=1)
    """Share of the prompts of each task with the largest ranges."""
    band: tuple[float, float] | None = None
    """Quantiles of the mean composite between which prompts of a task are kept: 0 is the hardest
    prompt, 1 the easiest."""

    @model_validator(mode="after")
    def _band_is_one(self) -> "SelectionConfig":
        if self.band is not None and not 0 <= self.band[0] < self.band[1] <= 1:
            raise ValueError(
                f"need a band of two quantiles between 0 and 1, the lower first, got {self.band}; "
                "[0.25, 0.75] is the middle"
            )
        return self


class CurationConfig(Config):
    """What is drawn, from which prompts, and what judges it."""

    seed: int = 0
    prompts: PromptsConfig
    rollout: RolloutConfig
    rewards: Mapping[str, AnyReward] = Field(min_length=1)
    block: int = Field(default=12, ge=1)
    """Prompts that are drawn and scored before their rows are written."""


def measure_prompts(
    config: CurationConfig, policy: Policy[Any, Any], folder: Path, rt: Runtime
) -> list[Prompt]:
    """Append a row for every prompt that has none to the folder's profile; returns all prompts.

    Ranks share the prompts, each with a file of its own. A prompt's samples do not depend on what
    they are drawn with, so the rows are the same however often the job was stopped.

    Args:
        config: what to draw.
        policy: the base.
        folder: of the job.
        rt: ranks and precision.
    """
    prompts = config.prompts.read()
    own = folder / f"profile-{rt.rank}.jsonl"
    done = {row["prompt"] for row in read_profile(folder)}
    rt.barrier()
    todo = [p for p in prompts[rt.rank :: rt.world_size] if p.id not in done]
    blocks = [todo[start : start + config.block] for start in range(0, len(todo), config.block)]
    total = len(prompts[rt.rank :: rt.world_size])
    with (
        AsyncRewardSet(RewardSet.build(config.rewards)) as scorer,
        progress("prompts", total, done=total - len(todo)) as bar,
    ):
        for block in blocks:
            with rt.autocast():
                drawn = sample(
                    policy, block, config.rollout, seed=config.seed, step=0, on_batch=scorer.submit
                )
            scored = scorer.collect()
            rows = profile([scored[group.prompt.id] for group in drawn], config.rewards)
            with writing(own), own.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            bar.advance(len(block))
    rt.barrier()
    return prompts


def read_profile(folder: Path) -> list[Profile]:
    """The rows that all ranks wrote; a prompt that two of them measured counts once."""
    rows = [row for path in sorted(folder.glob("profile-*.jsonl")) for row in read_rows(path)]
    return list({row["prompt"]: row for row in rows}.values())


def profile(groups: Sequence[Group], configs: Mapping[str, AnyReward]) -> Iterator[Profile]:
    """Range, mean and noise of the composite reward in each group.

    Samples without a full set of scores are left out; a group with fewer than two others has no
    range, which is not the range 0.
    """
    table = tabulated(groups, configs)
    ranges = group_range(table.values, table.present, table.weights)
    values, complete = composite(table.values, table.present, table.weights)
    shares = normalised_weights(table.weights)
    noises = ((shares * table.floors[:, None]) ** 2).sum(dim=0).sqrt()
    for row, group in enumerate(groups):
        count = int(complete[row].sum())
        yield {
            "prompt": group.prompt.id,
            "task": group.prompt.task,
            "category": group.prompt.category,
            "range": round(float(ranges[row]), 6) if count > 1 else None,
            "mean": round(float(values[row][complete[row]].mean()), 6) if count else None,
            "noise": round(float(noises[row]), 6),
            "scored": count,
            "scores": {
                name: [None if v is None else round(v, 6) for v in scored_values(scores)]
                for name, scores in group.scores.items()
            },
        }


def select(rows: Sequence[Profile], rule: SelectionConfig) -> list[str]:
    """Ids of the prompts that are kept, in the order of the rows.

    Raises:
        ConfigError: none is; the quantiles of the ranges are told.
    """
    measured = [row for row in rows if row["range"] is not None]
    kept = [row for row in measured if row["range"] > rule.noise_multiple * row["noise"]]
    if rule.min_range is not None:
        kept = [row for row in kept if row["range"] > rule.min_range]
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in measured if row["task"] == task]
        if own and rule.top is not None:
            least = float(np.quantile([row["range"] for row in own], 1 - rule.top))
            kept = [row for row in kept if row["task"] != task or row["range"] >= least]
        if own and rule.band is not None:
            low, high = np.quantile([row["mean"] for row in own], rule.band)
            kept = [row for row in kept if row["task"] != task or low <= row["mean"] <= high]
    if not kept:
        told = ", ".join(f"{q:.0%} {v:.3g}" for q, v in _quantiles(measured, "range").items())
        raise ConfigError(
            f"need prompts to keep, got none of {len(rows)}; the quantiles of their ranges are "
            f"{told or 'unknown, as nothing was scored'}: loosen the rule"
        )
    return [row["prompt"] for row in kept]


def write_kept(folder: Path, prompts: Sequence[Prompt], rule: SelectionConfig) -> dict[str, Any]:
    """Write the kept prompts and the summary of a measured profile; returns the summary."""
    rows = read_profile(folder)
    kept = set(select(rows, rule))
    summary = {"rule": rule.model_dump(mode="json"), **summarise(rows, kept)}
    with writing(folder / "kept.jsonl"):
        write_prompts(folder / "kept.jsonl", [p for p in prompts if p.id in kept])
        write_json(folder / "curation.json", summary)
    return summary


def summarise(rows: Sequence[Profile], kept: set[str]) -> dict[str, Any]:
    """Counts, and quantiles of range and mean, over all prompts and by category."""
    categories = sorted({row["category"] for row in rows})
    parts = {"all": rows, **{c: [r for r in rows if r["category"] == c] for c in categories}}
    return {
        name: {
            "prompts": len(own),
            "kept": sum(row["prompt"] in kept for row in own),
            "not_scored": sum(row["range"] is None for row in own),
            "range": _quantiles(own, "range"),
            "mean": _quantiles(own, "mean"),
        }
        for name, own in parts.items()
    }


def _quantiles(rows: Sequence[Profile], key: str) -> dict[float, float]:
    values = [row[key] for row in rows if row[key] is not None]
    return {q: round(float(np.quantile(values, q)), 4) for q in QUANTILES} if values else {}
