"""Prompts are kept by what their groups' rewards say, and a stopped measurement goes on."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from burnish import jobs, runtime
from burnish.config import ConfigError, located, parse
from burnish.curation import (
    CurationConfig,
    SelectionConfig,
    measure_prompts,
    noise_range,
    profile,
    read_profile,
    select,
    write_kept,
)
from burnish.guard import GuardConfig
from burnish.jobs import run_job
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.policy_config import PolicyConfig
from burnish.prompts import PromptsConfig, read_prompts
from burnish.rewards.base import Reward
from burnish.rewards.oracle import OracleConfig
from burnish.rollout_config import RolloutConfig
from burnish.run_config import RunConfig
from burnish.run_folder import is_complete
from burnish.tracking import RunError
from burnish.types import Failed, Group, Prompt, Score, Scored, ScoreRequest, Trajectory

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
CONFIGS = {
    "alignment": OracleConfig(dimension="alignment", floor=0.3, weights={"default": 3.0}),
    "quality": OracleConfig(dimension="quality", floor=0.4, weights={"default": 1.0}),
}


def group(scores: Mapping[str, Sequence[float | None]], name: str = "p") -> Group:
    """A group whose samples are scores alone; None is a failure."""
    none, states = torch.zeros(0), torch.zeros(0, 1)
    path = Trajectory(
        seed=0, image=torch.zeros(3, 1, 1), clean=torch.zeros(1), latents=states,
        sigmas=none, sigmas_next=none, noise=states, guided=states,
        conditional=states, unconditional=states,
    )  # fmt: skip
    said: dict[str, tuple[Score, ...]] = {
        reward: tuple(Failed(reason="x") if v is None else Scored(value=float(v)) for v in values)
        for reward, values in scores.items()
    }
    count = len(next(iter(said.values())))
    return Group(prompt=Prompt(id=name, text=name), trajectories=(path,) * count, scores=said)


def test_a_profile_is_the_range_of_the_weighted_sum() -> None:
    (row,) = profile([group({"alignment": [1, 2, 3], "quality": [5, 1, 1]})], CONFIGS)
    # 0.75 a + 0.25 q: 2.0, 1.75, 2.5.
    assert row["range"] == pytest.approx(0.75) and row["mean"] == pytest.approx(25 / 12)
    assert row["noise"] == pytest.approx(((0.75 * 0.3) ** 2 + (0.25 * 0.4) ** 2) ** 0.5, abs=1e-6)
    assert row["scored"] == 3
    assert row["scores"] == {"alignment": [1.0, 2.0, 3.0], "quality": [5.0, 1.0, 1.0]}


def test_what_failed_is_left_out_and_one_sample_has_no_range() -> None:
    rows = list(
        profile(
            [
                group({"alignment": [1, None, 3], "quality": [1, 9, 1]}),
                group({"alignment": [1, None, None], "quality": [1, 9, 1]}),
            ],
            CONFIGS,
        )
    )
    assert rows[0]["range"] == pytest.approx(1.5) and rows[0]["scored"] == 2
    assert rows[0]["scores"]["alignment"] == [1.0, None, 3.0]
    assert rows[1]["range"] is None and rows[1]["scored"] == 1


def rows(
    *pairs: tuple[float, float], task: str = "t2i", noise: float = 0.0
) -> list[dict[str, Any]]:
    """Profile rows of ranges and means, from groups of 8."""
    return [
        {"prompt": f"{task}-{n}", "task": task, "category": "general", "range": spread,
         "mean": mean, "noise": noise, "scored": 8, "failures": []}
        for n, (spread, mean) in enumerate(pairs)
    ]  # fmt: skip


def test_each_rule_keeps_what_it_says() -> None:
    some = rows((0.0, 5.0), (0.5, 4.0), (1.0, 3.0), (2.0, 1.0), noise=0.2)

    def kept(**rule: Any) -> list[int]:
        return [int(name[-1]) for name in select(some, parse(SelectionConfig, rule))]

    # Of eight samples of noise 0.2 the range exceeds 0.86 once in twenty groups.
    assert kept() == [2, 3]
    assert kept(chance=None) == [0, 1, 2, 3]
    assert kept(chance=None, min_range=1.0) == [3]
    assert kept(chance=None, top=0.5) == [2, 3]
    assert kept(chance=None, band=[0.5, 1.0]) == [0, 1]
    assert kept(band=[0.0, 0.5]) == [2, 3]
    assert kept(top=0.25) == [3]


@pytest.mark.parametrize("count", [2, 8, 24])
@pytest.mark.parametrize("chance", [0.05, 0.3])
def test_noise_alone_passes_as_often_as_is_said(count: int, chance: float) -> None:
    drawn = np.random.default_rng(0).normal(0, 0.3, (20_000, count))
    share = float((np.ptp(drawn, axis=1) > 0.3 * noise_range(count, chance)).mean())
    assert share == pytest.approx(chance, abs=0.01)


def test_a_share_is_taken_of_each_task() -> None:
    """Or one task, whose rewards spread more, would leave nothing of the other."""
    some = [*rows((0.1, 1.0), (0.2, 1.0)), *rows((5.0, 1.0), (6.0, 1.0), task="edit")]
    assert select(some, SelectionConfig(top=0.5)) == ["t2i-1", "edit-1"]


def test_an_empty_pool_tells_the_quantiles_of_its_task() -> None:
    some = [*rows((0.5, 1.0), (1.5, 1.0)), *rows((20.0, 1.0), task="edit")]
    said = r"task t2i to keep, got none of 2; .* 0% 0.5, .*50% 1, .*100% 1.5: loosen"
    with pytest.raises(ConfigError, match=said):
        select(some, SelectionConfig(min_range=9))
    with pytest.raises(ConfigError, match="unknown, as nothing was scored"):
        select([{**some[0], "range": None}], SelectionConfig())


@pytest.mark.parametrize("band", [[0.5, 0.5], [0.9, 0.1], [-0.1, 0.5]])
def test_a_band_must_be_one(band: list[float]) -> None:
    with pytest.raises(ConfigError, match="need a band of two quantiles"):
        parse(SelectionConfig, {"band": band})


def test_a_measurement_that_was_cut_off_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Processes share the prompts, and what each wrote does not depend on who else did."""
    base = QwenImage21Policy.load(located("embedded:weights/base"), resolution=64)
    config = parse(
        CurationConfig,
        {
            "stage": "teacher",
            "policy": {"resolution": 64},
            "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"], "limit": 5},
            "rollout": {"num_steps": 2, "group_size": 3, "window": 0, "keep": "none"},
            "rewards": {"quality": {"kind": "oracle", "dimension": "quality"}},
        },
    )
    prompts = config.prompts.read()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    measure_prompts(config, prompts, base, whole, CPU)
    written = (whole / "profile-0.jsonl").read_text().splitlines(keepends=True)
    assert len(written) == 5 and all(json.loads(line)["range"] > 0 for line in written)
    # As if two processes had been killed, the first one in the middle of a line.
    (cut / "profile-0.jsonl").write_text(written[0] + written[1][:20])
    (cut / "profile-1.jsonl").write_text(written[2])
    measure_prompts(config, prompts, base, cut, CPU)
    by_name = sorted(written, key=lambda line: json.loads(line)["prompt"])
    found = sorted(read_profile(cut, prompts), key=lambda row: row["prompt"])
    assert [json.loads(line) for line in by_name] == found
    summary = write_kept(whole, prompts, SelectionConfig(chance=None, top=0.4))
    names = [prompt.id for prompt in read_prompts(whole / "kept.jsonl")]
    assert len(names) == summary["all"]["kept"] == 2 and summary["all"]["prompts"] == 5
    assert json.loads((whole / "curation.json").read_text())["all"]["not_scored"] == 0
    # A prompt that asks for something else now is measured again, and a row that tells less stands.
    others: list[dict[str, Any]] = [
        {"text": "a cat"}, {"category": "food"}, {"aspect": "16:9"}, {"facts": {"count": 3}}
    ]  # fmt: skip
    for other in others:
        changed = [replace(prompts[0], **other), *prompts[1:]]
        assert len(read_profile(whole, changed)) == 4
    bare = [{k: v for k, v in row.items() if k not in ("aspect", "facts")} for row in found]
    (whole / "profile-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert read_profile(whole, prompts) == bare


class Filed(OracleConfig):
    """An oracle that a file belongs to."""

    path: Path

    def inputs(self) -> Sequence[Path]:
        return [self.path]


def short(reward: OracleConfig) -> CurationConfig:
    """Of two prompts, two pictures each."""
    return CurationConfig(
        stage="teacher",
        policy=PolicyConfig(resolution=64),
        prompts=PromptsConfig(path="embedded:prompts/train.jsonl", tasks=("t2i",), limit=2),
        rollout=RolloutConfig(num_steps=1, group_size=2, window=0, guidance_scale=1, keep="none"),
        rewards={"quality": OracleConfig()},
    ).model_copy(update={"rewards": {"quality": reward}})


def test_a_profile_is_of_one_judge(tmp_path: Path) -> None:
    base, file, folder = QwenImage21Policy.tiny(), tmp_path / "judge", tmp_path / "profile"
    config = short(Filed(dimension="quality", path=file))
    prompts = config.prompts.read()
    file.write_text("one")
    measure_prompts(config, prompts[:1], base, folder, CPU)
    file.write_text("another")
    with pytest.raises(RunError, match="need the files of quality as they were when"):
        measure_prompts(config, prompts, base, folder, CPU)
    # What is complete is selected from again, whatever has become of the judge.
    measure_prompts(config, prompts[:1], base, folder, CPU)
    assert len(read_profile(folder, prompts)) == 1


class Slow(Reward):
    """Tells which attention the process takes when the pictures have long been drawn."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        time.sleep(0.5)
        is_fused = torch.backends.cuda.flash_sdp_enabled()
        return [Scored(value=float(is_fused)) for _ in requests]


class SlowConfig(OracleConfig):
    def build(self) -> Reward:
        return Slow()


def test_pictures_are_scored_as_in_training(tmp_path: Path) -> None:
    rt, config = replace(CPU, dtype=torch.bfloat16), short(SlowConfig())
    measure_prompts(config, config.prompts.read(), QwenImage21Policy.tiny(), tmp_path, rt)
    (row, _) = read_profile(tmp_path, config.prompts.read())
    assert row["scores"]["quality"] == [0.0, 0.0]


def test_a_guard_goes_on_with_the_judge_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "train", lambda *_, **__: None)
    config, file = parse(RunConfig, yaml.safe_load(RECIPE)), tmp_path / "judge"
    guard = GuardConfig(judge=OracleConfig()).model_copy(update={"judge": Filed(path=file)})
    stage = config.stages["teacher"].model_copy(update={"guard": guard})
    config = config.model_copy(update={"stages": {"teacher": stage}})
    file.write_text("one")
    run_job(config, tmp_path, "train/teacher", CPU)
    file.write_text("another")
    with pytest.raises(RunError, match=r"need the files of guard\.judge as they were when"):
        run_job(config, tmp_path, "train/teacher", CPU)
    # A folder that does not tell takes the judge as it is.
    (tmp_path / "stages/teacher/guard-judges.json").unlink()
    run_job(config, tmp_path, "train/teacher", CPU)


RECIPE = """
name: shared
policy: {resolution: 64}
runtime: {device: cpu, threads: 1}
stages:
  teacher:
    prompts: {path: "embedded:prompts/train.jsonl", tasks: [t2i], limit: 5}
    rollout: {num_steps: 2, group_size: 3, window: 0, keep: none}
    rewards: {quality: {kind: oracle, dimension: quality}}
    algorithm: {kind: nft}
judge: {kind: oracle}
"""


def test_two_processes_keep_what_one_keeps(tmp_path: Path) -> None:
    """Two real processes over gloo, started as torchrun starts them."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)

    def curate(out: Path, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = [sys.executable, "-m", "burnish", "curate", str(recipe), "teacher"]
        command += ["--keep", "chance=null", "--keep", "top=0.4", "--out", str(out)]
        started = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env = os.environ | (shared | place if ranks > 1 else {})
            started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        for process in started:
            assert process.communicate(timeout=300)[1] is not None and process.returncode == 0

    curate(tmp_path / "one", 1)
    curate(tmp_path / "two", 2)
    shares = [len((tmp_path / f"two/profile-{n}.jsonl").read_text().splitlines()) for n in (0, 1)]
    assert shares == [3, 2]
    kept, ranges = [], []
    for folder in (tmp_path / "one", tmp_path / "two"):
        lines = "".join(path.read_text() for path in folder.glob("profile-*.jsonl")).splitlines()
        found = sorted((json.loads(line) for line in lines), key=lambda row: row["prompt"])
        ranges.append([row["range"] for row in found])
        kept.append((folder / "kept.jsonl").read_text())
    # A batch of another shape rounds otherwise.
    assert ranges[0] == pytest.approx(ranges[1], abs=1e-4)
    assert kept[0] == kept[1]


def test_a_category_of_which_nothing_is_kept_ends_no_stage(tmp_path: Path) -> None:
    stage = "stages.teacher.curation={chance: null, top: 0.1}"
    categories = "stages.teacher.prompts.categories=[portrait, typography]"
    config = parse(RunConfig, yaml.safe_load(RECIPE), [stage, categories])
    run_job(config, tmp_path, "curate/teacher", CPU)
    chosen = jobs._chosen(config, tmp_path, "teacher", CPU)
    assert len(config.stages["teacher"].prompts.read()) == 5 and len(chosen.prompts.read()) == 1


def test_an_empty_pool_ends_the_job_that_measured_it(tmp_path: Path) -> None:
    stage = "stages.teacher.curation={chance: null, min_range: 100}"
    config = parse(RunConfig, yaml.safe_load(RECIPE), [stage, "stages.teacher.prompts.limit=2"])
    with pytest.raises(ConfigError, match=r"need prompts of task t2i to keep, got none of 2"):
        run_job(config, tmp_path, "curate/teacher", CPU)
    # Another rule measures nothing again.
    assert len((tmp_path / "curation/teacher/profile-0.jsonl").read_text().splitlines()) == 2
    assert not is_complete(tmp_path, "curate/teacher")
