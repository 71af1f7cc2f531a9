"""How much a stage has on a device at once, from its settings."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from burnish import runtime
from burnish.algorithms.base import Footprint
from burnish.algorithms.nft import NftConfig
from burnish.cli.recipes import recipe_path
from burnish.config import ConfigError, load
from burnish.optimization import OptimizerConfig
from burnish.planning import forecast as forecasts
from burnish.planning.forecast import counts, forecast
from burnish.planning.parts import on_one_device
from burnish.planning.plan import PROCESS_BYTES, Part, Plan, Sharding
from burnish.prompts import PromptsConfig
from burnish.rewards.oracle import OracleConfig
from burnish.rollout_config import RolloutConfig
from burnish.run_config import RunConfig
from burnish.runtime import generator
from burnish.training import StageConfig
from burnish.updates import _turns

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


@pytest.mark.parametrize("processes", [1, 2, 5, 12])
@pytest.mark.parametrize(("size", "num_updates"), [(8, 1), (8, 4), (8, 3), (2, 4)])
def test_a_process_has_its_share_of_the_groups(processes: int, size: int, num_updates: int) -> None:
    """As they are dealt out: the most that any process has in any update."""
    own = stage({"micro_batch": 9999}, {"micro_batch": 9999, "num_updates": num_updates})
    own = own.model_copy(update={"rollout": own.rollout.model_copy(update={"group_size": size})})
    found = counts(own, Footprint(states=4), processes)
    groups = -(-12 // processes)
    assert (found.pictures, found.picture_prompts) == (groups * size, groups)
    assert (found.credited, found.credited_prompts) == (4 * groups * size, groups)
    dealt = _turns([size] * 12, num_updates, generator(0))
    shares = [
        sum(turn == number for turns in dealt[rank::processes] for turn in turns)
        for rank in range(processes)
        for number in range(num_updates)
    ]
    assert found.states == 4 * max(shares)


def test_processes_share_the_memory_of_a_cpu() -> None:
    """Each has its own of most; what is spread, or there once for all, is there once."""
    parts = [
        Part(name="own", num_bytes=10),
        Part(name="common", num_bytes=20, is_common=True),
        Part(name="trained", num_bytes=30, is_sharded=True),
    ]

    def bytes_of(count: int, sharding: Sharding) -> int:
        return sum(part.num_bytes for part in on_one_device(parts, count, sharding))

    others = 2 * PROCESS_BYTES["cpu"]
    assert bytes_of(1, Sharding()) == 60
    assert bytes_of(3, Sharding()) == 3 * 10 + 20 + 3 * 30 + others
    assert bytes_of(3, Sharding(3)) == 3 * 10 + 20 + 30 + others
    # More processes would not help, which is what is advised on GPUs.
    assert all("fewer processes" in one.advice for one in on_one_device(parts, 3, Sharding(3)))
    # Nothing is divided again.
    assert sum(map(Sharding(3).share, on_one_device(parts, 3, Sharding(3)))) == 80 + others


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the GPUs: each that runs there has its own of most, those elsewhere need none."""
    config = load(RunConfig, recipe_path("nft"), ["runtime.processes=4"])
    real, found = forecasts.measure, []

    def once(*asked: Any) -> Any:
        # What calls hold is on the GPU, and the same each time.
        found.extend([] if found else [real(*asked)])
        return found[0]

    monkeypatch.setattr(forecasts, "measure", once)
    nothing = Plan(stage="evaluation", key="evaluation", device="cuda", parts=[])
    monkeypatch.setattr(forecasts, "_evaluation_plan", lambda *_: nothing)

    def beside(on_machine: int | None) -> int:
        (plan, *_) = forecast(config, "cuda", on_machine=on_machine)
        return plan.beside(plan.host_peak)

    one, two, four = (beside(count) for count in (1, 2, 4))
    common = 2 * one - two
    assert 0 <= common < one
    assert four == common + 4 * (one - common) == beside(None)


def test_only_small_models_at_small_sizes_start_without_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few weights say nothing of what large pictures need."""

    class Planned(Exception):
        pass

    def plan(*_: Any, **__: Any) -> None:
        raise Planned

    monkeypatch.setattr(forecasts, "forecast", plan)
    monkeypatch.setattr(runtime, "memory", lambda device: 24 << 30)
    small = load(RunConfig, recipe_path("smoke"), ["runtime.device=cpu"])
    forecasts.check_memory(small)
    with pytest.raises(Planned):
        forecasts.check_memory(
            small.model_copy(
                update={"policy": small.policy.model_copy(update={"resolution": 1024})}
            )
        )
    picture, path = Image.new("RGB", (640, 480)), tmp_path / "edits.jsonl"
    picture.save(tmp_path / "a.png")
    path.write_text(json.dumps({"text": "make it blue", "task": "edit", "source": "a.png"}))
    edits = ["runtime.device=cpu", f"evaluation.prompts={path}"]
    with pytest.raises(Planned):
        forecasts.check_memory(load(RunConfig, recipe_path("smoke"), edits))
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: .*a\.png"):
        forecasts.check_memory(load(RunConfig, recipe_path("smoke"), edits))
    monkeypatch.setattr(runtime, "memory", lambda device: 4 << 30)
    with pytest.raises(Planned):
        forecasts.check_memory(small)


def test_who_looks_on_draws_different_prompts() -> None:
    """A picture each, so that the prefix is the larger part."""
    looked = Footprint(states=4, draws=8)
    for processes in (1, 12):
        assert counts(stage({"micro_batch": 2}), looked, processes).picture_prompts == 8
