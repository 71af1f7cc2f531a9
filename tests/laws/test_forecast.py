"""How much a stage has on a device at once, from its settings."""

from typing import Any

import pytest

from burnish.algorithms.base import Footprint
from burnish.algorithms.nft import NftConfig
from burnish.cli.recipes import recipe_path
from burnish.config import load
from burnish.forecast import counts, forecast
from burnish.optimization import OptimizerConfig
from burnish.prompts import PromptsConfig
from burnish.rewards.oracle import OracleConfig
from burnish.rollout_config import RolloutConfig
from burnish.run_config import RunConfig
from burnish.training import StageConfig

FOUR = Footprint(states=4, draw_scale=2.0)


def stage(rollout: Any = None, optimizer: Any = None) -> StageConfig:
    """Twelve prompts, eight samples each."""
    return StageConfig(
        prompts=PromptsConfig(path="prompts.jsonl"),
        prompts_per_step=12,
        rollout=RolloutConfig(group_size=8, window=0, keep="none", **(rollout or {})),
        rewards={"oracle": OracleConfig()},
        algorithm=NftConfig(),
        optimizer=OptimizerConfig(**(optimizer or {})),
    )


@pytest.mark.parametrize(
    ("micro_batch", "pictures", "prompts"), [(1, 1, 1), (8, 8, 1), (40, 40, 5), (999, 96, 12)]
)
def test_pictures_are_drawn_by_whole_groups(micro_batch: int, pictures: int, prompts: int) -> None:
    """As many groups as fit, at least one, and no more than there are."""
    found = counts(stage({"micro_batch": micro_batch}), FOUR)
    assert (found.pictures, found.picture_prompts) == (pictures, prompts)


def test_states_are_whole_signals() -> None:
    """Signals have four states each; an update sees two of every group of eight."""
    found = counts(stage(optimizer={"micro_batch": 21, "num_updates": 4}), FOUR)
    assert found.states == found.credited == 24
    assert (found.state_prompts, found.credited_prompts) == (4, 2)
    most = counts(stage(optimizer={"micro_batch": 9999, "num_updates": 4}), FOUR)
    assert (most.states, most.credited) == (96, 384)
    assert most.state_prompts == most.credited_prompts == 12


def test_who_looks_on_draws_different_prompts() -> None:
    """A picture each, so that the prefix is the larger part."""
    looked = Footprint(states=4, draws=8)
    assert counts(stage({"micro_batch": 2}), looked).picture_prompts == 8


def test_pictures_that_nobody_looks_at_need_no_memory() -> None:
    config = load(RunConfig, recipe_path("smoke"), [])
    parts = {plan.stage: [p.name for p in plan.parts] for plan in forecast(config, "cuda")}
    decoding = [stage for stage, names in parts.items() if "decoding its pictures" in names]
    assert decoding == ["t2i_teacher", "edit_teacher", "evaluation"]
