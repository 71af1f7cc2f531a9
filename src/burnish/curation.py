"""Which prompts are worth a rollout: those whose samples differ in reward.

A group whose samples are all good, or all bad, teaches nothing: its advantages are noise over
noise. So before training the base draws one group of every prompt, and a prompt is kept if its
range, the largest minus the smallest composite reward, exceeds a threshold (arXiv 2606.27608,
section 4.2). The paper does not give the threshold. Here it is the range that the rewards' own
noise would reach by chance; a least range, a share of the prompts, and a band of difficulty can be
asked for besides.

    profile-0.jsonl  a row for every prompt, written as it is measured; one file for each process
    kept.jsonl       the prompts that are kept, as a set that a stage reads
    curation.json    counts and quantiles, over all prompts and by category
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from pydantic import Field, model_validator

from burnish import images
from burnish.advantages import composite, group_range, normalised_weights
from burnish.config import Config, ConfigError
from burnish.ledger import Ledger, pin_files, read_ledger
from burnish.policies.base import Policy
from burnish.policy_config import PolicyConfig
from burnish.progress import progress
from burnish.prompt_sets import PromptSet
from burnish.prompts import PromptsConfig, write_prompts
from burnish.rewards.base import AsyncRewardSet, RewardSet, scored_values, tabulated
from burnish.rollout import sample
from burnish.rollout_config import RolloutConfig
from burnish.runtime import Runtime, RuntimeConfig
from burnish.shelves import AnyReward
from burnish.tracking import write_json
from burnish.types import Failed, Group, Prompt

Profile = dict[str, Any]
"""prompt, digest (of text and sources), facts (their digest), aspect, category, task, range, mean,
noise, scored; `scores`: reward -> one for each sample; `failures`: why some are missing."""
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
KEPT = ("kept.jsonl", "curation.json")
"""What is written of a profile for each stage that reads it."""
_NAME = "profile"
_BLOCK = 12
"""Prompts that are drawn and scored before their rows are written."""


class SelectionConfig(Config):
    """Which prompts of a profile are kept; a prompt must pass every rule that is given."""

    chance: float | None = Field(default=0.05, gt=0, lt=1)
    """Share of groups without any difference that would pass by the rewards' noise alone; None
    takes the rule out."""
    min_range: float | None = Field(default=None, ge=0)
    """In points of the composite; ranges above it pass."""
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
    """What is drawn, by what, from which prompts, and what judges it."""

    stage: str
    """Of a recipe, whose settings these are."""
    seed: int = 0
    policy: PolicyConfig
    runtime: RuntimeConfig = RuntimeConfig()
    prompts: PromptsConfig
    rollout: RolloutConfig
    rewards: Mapping[str, AnyReward] = Field(min_length=1)


def measure_prompts(
    config: CurationConfig,
    prompts: Sequence[Prompt],
    policy: Policy[Any, Any],
    folder: Path,
    rt: Runtime,
) -> None:
    """Append a row for every prompt that has none to the folder's profile.

    Ranks share the prompts, each with a file of its own. A prompt's samples do not depend on what
    they are drawn with, so the rows are the same however often the job was stopped.

    Args:
        config: what to draw.
        prompts: of the config.
        policy: the base.
        folder: of the job.
        rt: ranks and precision.

    Raises:
        RunError: rows are missing, and the files of the rewards are not those of the others.
    """
    ledger = Ledger(folder, _NAME, rt)
    done = {row["prompt"] for row in read_profile(folder, prompts)}
    rt.barrier()
    every = PromptSet.of(prompts).select(lambda p: p.id not in done)
    if every:
        with rt.main_first():
            files = {name: reward.inputs() for name, reward in config.rewards.items()}
            pin_files(folder, "rewards", files)
    todo = every[rt.rank :: rt.world_size]
    blocks = [todo[start : start + _BLOCK] for start in range(0, len(todo), _BLOCK)]
    rollout = config.rollout.model_copy(update={"keep": "none"})
    with (
        AsyncRewardSet(RewardSet.build(config.rewards)) as scorer,
        progress("prompts", len(todo)) as bar,
    ):
        for block in blocks:
            with rt.autocast():
                drawn = sample(
                    policy, block, rollout, seed=config.seed, step=0, on_batch=scorer.submit
                )
                # Which attention a judge takes is a matter of the process, not of its thread.
                scored = scorer.collect()
            rows = profile([scored[group.prompt.id] for group in drawn], config.rewards)
            ledger.add(rows)
            bar.advance(len(block))
    rt.barrier()


def read_profile(folder: Path, prompts: Sequence[Prompt]) -> list[Profile]:
    """The rows that all ranks wrote of prompts as they are now.

    A prompt has none of what it was with another text, category, aspect, other sources or facts.
    """
    rows = read_ledger(folder, _NAME)
    measured = {row["prompt"] for row in rows}
    known = PromptSet.of(prompts).select(lambda p: p.id in measured)
    asked = {prompt.id: _asked(prompt) for prompt in known}
    own = [row for row in rows if row["prompt"] in asked and _is_of(row, asked[row["prompt"]])]
    return list({row["prompt"]: row for row in own}.values())


def _asked(prompt: Prompt) -> Profile:
    """All of a prompt that decides its row."""
    facts = json.dumps(dict(prompt.facts), sort_keys=True)
    return {
        "digest": _digest(f"{images.digest(prompt.sources)}{prompt.text}"),
        "facts": _digest(facts),
        "aspect": prompt.aspect,
        "category": prompt.category,
    }


def _is_of(row: Profile, asked: Profile) -> bool:
    """Whether a row was measured of what is asked; what it does not tell is taken to be so."""
    return all(row.get(key, value) == value for key, value in asked.items())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        failed = [s.reason for row in group.scores.values() for s in row if isinstance(s, Failed)]
        yield {
            "prompt": group.prompt.id,
            **_asked(group.prompt),
            "task": group.prompt.task,
            "range": round(float(ranges[row]), 6) if count > 1 else None,
            "mean": round(float(values[row][complete[row]].mean()), 6) if count else None,
            "noise": round(float(noises[row]), 6),
            "scored": count,
            "scores": {
                name: [None if v is None else round(v, 6) for v in scored_values(scores)]
                for name, scores in group.scores.items()
            },
            "failures": sorted(set(failed)),
        }


@lru_cache
def noise_range(count: int, chance: float) -> float:
    """Range of `count` standard normal numbers that is exceeded with a probability of `chance`."""
    return float(scipy.stats.studentized_range.ppf(1 - chance, count, np.inf))


def select(rows: Sequence[Profile], rule: SelectionConfig) -> list[str]:
    """Ids of the prompts that are kept, in the order of the rows.

    Raises:
        ConfigError: none is, of some task; the quantiles of its ranges are told.
    """
    kept = {
        row["prompt"]
        for task in dict.fromkeys(row["task"] for row in rows)
        for row in _select_alike([row for row in rows if row["task"] == task], rule)
    }
    return [row["prompt"] for row in rows if row["prompt"] in kept]


def _select_alike(rows: Sequence[Profile], rule: SelectionConfig) -> list[Profile]:
    """The rows of one task that are kept."""
    measured = [row for row in rows if row["range"] is not None]
    kept = measured
    if rule.chance is not None:
        kept = [
            row
            for row in kept
            if row["range"] > noise_range(row["scored"], rule.chance) * row["noise"]
        ]
    if rule.min_range is not None:
        kept = [row for row in kept if row["range"] > rule.min_range]
    if measured and rule.top is not None:
        least = float(np.quantile([row["range"] for row in measured], 1 - rule.top))
        kept = [row for row in kept if row["range"] >= least]
    if measured and rule.band is not None:
        low, high = np.quantile([row["mean"] for row in measured], rule.band)
        kept = [row for row in kept if low <= row["mean"] <= high]
    if not kept:
        told = ", ".join(f"{q:.0%} {v:.3g}" for q, v in _quantiles(measured, "range").items())
        raise ConfigError(
            f"need prompts of task {rows[0]['task']} to keep, got none of {len(rows)}; the "
            f"quantiles of their ranges are {told or 'unknown, as nothing was scored'}: loosen the "
            "rule"
        )
    return kept


def num_drawn(folder: Path) -> int:
    """Pictures that a profile was measured on."""
    rows = read_ledger(folder, _NAME)
    return sum(max((len(found) for found in row["scores"].values()), default=0) for row in rows)


def write_kept(
    folder: Path, prompts: Sequence[Prompt], rule: SelectionConfig, target: Path | None = None
) -> dict[str, Any]:
    """Write the kept prompts and the summary of a measured profile; returns the summary.

    Args:
        folder: of the profile.
        prompts: as they are now.
        rule: which are kept.
        target: where to write; the profile's own folder if left out.
    """
    rows, target = read_profile(folder, prompts), target or folder
    kept = set(select(rows, rule))
    summary = {"rule": rule.model_dump(mode="json"), **summarise(rows, kept)}
    kept_file, summary_file = (target / name for name in KEPT)
    write_prompts(kept_file, PromptSet.of(prompts).select(lambda p: p.id in kept))
    write_json(summary_file, summary)
    return summary


def summarise(rows: Sequence[Profile], kept: set[str]) -> dict[str, Any]:
    """Counts, and quantiles of range and mean, over all prompts and by category."""
    categories = sorted({row["category"] for row in rows})
    return {
        "all": _summary(rows, kept),
        "categories": {
            name: _summary([row for row in rows if row["category"] == name], kept)
            for name in categories
        },
    }


def _summary(rows: Sequence[Profile], kept: set[str]) -> dict[str, Any]:
    return {
        "prompts": len(rows),
        "kept": sum(row["prompt"] in kept for row in rows),
        "not_scored": sum(row["range"] is None for row in rows),
        "failures": sorted({reason for row in rows for reason in row["failures"]}),
        "range": _quantiles(rows, "range"),
        "mean": _quantiles(rows, "mean"),
    }


def _quantiles(rows: Sequence[Profile], key: str) -> dict[float, float]:
    values = [row[key] for row in rows if row[key] is not None]
    return {q: round(float(np.quantile(values, q)), 4) for q in QUANTILES} if values else {}
