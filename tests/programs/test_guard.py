"""The guard: what it calls hacking, what it remembers, what it gives back."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.looking import look

from burnish import runtime
from burnish.config import ConfigError, located, parse
from burnish.guard import Guard, GuardConfig, RetentionConfig, held_out
from burnish.hacking import is_better, verdict
from burnish.looks import Look, best_of
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts
from burnish.rewards.base import Reward
from burnish.rewards.oracle import OracleConfig
from burnish.rollout_config import RolloutConfig
from burnish.tracking import RunError
from burnish.training import StageConfig
from burnish.types import Failed, Score, Scored, ScoreRequest

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
CURIOUS = GuardConfig(
    judge=OracleConfig(),
    others={"beauty": OracleConfig(dimension="quality")},
    retention=RetentionConfig(),
    num_prompts=8,
)
ROLLOUT = RolloutConfig(num_steps=2, guidance_scale=2.0, group_size=2, window=0, keep="none")


def check(reward: float | None, mean: float, noise: float = 0.0, seed: int = 0) -> Look:
    """A look at 64 prompts whose scores lie around a mean."""
    scores = mean + noise * np.random.default_rng(seed).standard_normal(64)
    named = {str(number): float(score) for number, score in enumerate(scores)}
    return {"step": 0, "reward": reward, "held_out": float(scores.mean()), "scores": named}


class TestVerdict:
    @pytest.mark.parametrize(
        ("looks", "expected"),
        [
            # The reward rises, what was gained is lost.
            ([(None, 0.5), (0.6, 0.6), (0.7, 0.56)], "hacked"),
            ([(None, 0.5), (0.6, 0.6), (0.7, 0.58)], "fine"),
            # Both fall: the training fails, but not by cheating.
            ([(None, 0.5), (0.6, 0.6), (0.5, 0.4)], "fine"),
            # The reward shakes, but keeps what it had gained: the fall is not its own.
            ([(None, 0.5), (0.4, 0.52), (0.6, 0.6), (0.58, 0.55)], "hacked"),
            ([(None, 0.5), (0.4, 0.52), (0.6, 0.6), (0.5, 0.55)], "fine"),
            # Never better than the start.
            ([(None, 0.5), (0.6, 0.45)], "hacked"),
            ([(None, 0.5)], "fine"),
            # No reward was seen before the newest look, before the best one, at all.
            ([(None, 0.5), (0.6, 0.6), (None, 0.4)], "fine"),
            ([(None, 0.5), (0.4, 0.52), (None, 0.6), (0.41, 0.4)], "hacked"),
            ([(None, 0.5), (0.4, 0.52), (None, 0.6), (0.3, 0.4)], "fine"),
            ([(None, 0.5), (None, 0.6), (0.3, 0.4)], "hacked"),
            ([(None, 0.5), (None, 0.4)], "fine"),
            ([(None, 0.5), (0.6, 0.6), (0.7, 0.7)], "fine"),
        ],
    )
    def test_the_rule(self, looks: Sequence[tuple[float | None, float]], expected: str) -> None:
        assert verdict([check(*look) for look in looks], 0.25) == expected

    def test_noise_alone_seldom_ends_a_stage_and_a_real_fall_mostly_does(self) -> None:
        def share(last: float) -> float:
            found = [
                verdict(
                    [check(None, 0.5, 0.1, 3 * s), check(0.6, 0.6, 0.1, 3 * s + 1),
                     check(0.7, last, 0.1, 3 * s + 2)], 0.25,
                )
                for s in range(200)
            ]  # fmt: skip
            return found.count("hacked") / len(found)

        assert share(0.6) < 0.15
        assert share(0.55) > 0.85


EASY, HARD = ([f"{kind}{number}" for number in range(16)] for kind in ("easy", "hard"))


def mixed(reward: float | None, easy: float, hard: float, num_failed: int = 0) -> Look:
    """A look at easy and hard prompts, of which the first hard ones have no score."""
    scores = dict.fromkeys(EASY, easy) | dict.fromkeys(HARD[num_failed:], hard)
    held_out = float(np.mean(list(scores.values())))
    coverage = {"judge": len(scores) / 32}
    return {"reward": reward, "held_out": held_out, "scores": scores, "coverage": coverage}


class TestFailures:
    """A judge that fails on hard prompts raises the mean of those that are left."""

    def test_neither_hide_a_fall_nor_win(self) -> None:
        rise = [mixed(None, 0.8, 0.2), mixed(0.5, 0.8, 0.6)]
        for num_failed in (3, 16):
            looks = [*rise, mixed(0.7, 0.8, 0.65, num_failed), mixed(0.9, 0.8, 0.2)]
            assert verdict(looks, 0.2) == "hacked"
        # Of the hard prompts fourteen have risen, and the mean of what is left with them.
        few, many = mixed(0.7, 0.8, 0.65, 2), mixed(0.7, 0.8, 0.65, 16)
        assert best_of([*rise, few], is_better) is few
        assert best_of([*rise, many, mixed(0.8, 0.8, 0.62)], is_better)["reward"] == 0.8
        assert best_of([*rise, mixed(0.7, 0.8, 0.6, 3)], is_better) is rise[1]

    def test_a_look_without_enough_scores_gives_no_verdict(self) -> None:
        looks = [mixed(None, 0.8, 0.2), mixed(0.5, 0.8, 0.6)]
        assert verdict([*looks, mixed(0.7, 0.4, 0.2, 3)], 0.2) == "hacked"
        assert verdict([*looks, mixed(0.7, 0.4, 0.2, 4)], 0.2) == "fine"
        # Nor is a start the ground of a gain.
        assert verdict([mixed(None, 0.1, 0.1, 16), *looks, mixed(0.7, 0.8, 0.55)], 0.2) == "fine"
        assert verdict([mixed(None, 0.1, 0.1, 16), *looks, mixed(0.7, 0.8, 0.5)], 0.2) == "hacked"


LOOKS = Path(__file__).parents[2] / "docs" / "studies" / "hacking-looks.jsonl"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_hacking_ends_before_half_of_the_gain_is_lost(seed: int) -> None:
    """On the looks of the study's arm that nothing stopped, with the default share."""
    looks = [json.loads(line) for line in LOOKS.open()]
    looks = [look for look in looks if look["seed"] == seed]
    share = GuardConfig(judge=OracleConfig()).max_loss
    end = next(n for n in range(1, len(looks)) if verdict(looks[: n + 1], share) == "hacked")
    start, best = looks[0]["held_out"], max(look["held_out"] for look in looks[:end])

    def lost(look: Look) -> float:
        return (best - look["held_out"]) / (best - start)

    print(f"seed {seed}: ends at step {looks[end]['step']}, {lost(looks[end]):.0%} lost")
    assert lost(looks[end]) < 0.5 < lost(looks[-1])
    assert best == max(look["held_out"] for look in looks)


class Scripted(Reward):
    """Gives every picture what is asked for at this look."""

    def __init__(self, values: Sequence[float | None]) -> None:
        self._values = iter(values)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        value = next(self._values)
        if value is None:
            return [Failed(reason="lost") for _ in requests]
        return [Scored(value=value) for _ in requests]


class Failing(Reward):
    """Loses the first of the answers."""

    def __init__(self, reward: Reward, num_lost: int) -> None:
        self._reward, self._num_lost = reward, num_lost

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        lost: list[Score] = [Failed(reason="lost")] * self._num_lost
        return lost + self._reward.score(requests)[self._num_lost :]


@pytest.fixture(scope="module")
def policy() -> QwenImage21Policy:
    found = QwenImage21Policy.tiny()
    found.transformer.requires_grad_(True)
    return found


def guard(folder: Path, values: Sequence[float | None], step: int = 0, **changes: Any) -> Guard:
    config = GuardConfig(judge=OracleConfig(), num_prompts=8, every=4, **changes)
    made = Guard(config, ROLLOUT, ["t2i", "edit"], folder, step=step)
    made._judge = Scripted(values)
    return made


def weights(policy: QwenImage21Policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in policy.trainable()])


def shake(policy: QwenImage21Policy, seed: int) -> None:
    with torch.no_grad():
        for _, parameter in policy.trainable():
            draws = torch.Generator().manual_seed(seed)
            parameter += 0.02 * torch.randn(parameter.shape, generator=draws)


class TestGuard:
    def test_the_best_weights_come_back_and_a_resumed_stage_decides_alike(
        self, policy: QwenImage21Policy, tmp_path: Path
    ) -> None:
        learner = policy.sibling()
        learner.transformer.requires_grad_(True)
        watch = guard(tmp_path, [0.2, 0.6, 0.3])
        assert watch.looks.is_due(0) and not watch.looks.is_due(1)
        assert watch.looks.last_step == 0
        first = look(watch, learner, 0, None, CPU)
        assert first["guard/absorbed_guidance"] == 0 and first["guard/diversity"] > 0
        assert not watch.looks.is_due(0)
        shake(learner, 1)
        best = weights(learner)
        again = look(watch, learner, 4, 1.0, CPU)
        assert again["guard/held_out"] == pytest.approx(0.6) and not watch.is_over
        assert again["guard/absorbed_guidance"] != 0
        shake(learner, 2)
        # Cut off after the second look: what came later is forgotten and seen again.
        for resumed in (watch, guard(tmp_path, [0.3], step=5)):
            assert look(resumed, learner, 8, 2.0, CPU)["guard/hacked"] == 1 and resumed.is_over
        resumed.restore(learner)
        assert torch.equal(weights(learner), best)
        rows = [json.loads(line) for line in (tmp_path / "guard/looks.jsonl").open()]
        assert [row["verdict"] for row in rows] == ["fine", "fine", "hacked"]
        assert [len(row["scores"]) for row in rows] == [16, 16, 16]

    def test_absorbed_guidance_is_the_same_in_calls_of_any_size(
        self, policy: QwenImage21Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And no call has more pictures, in both branches, than drawing has."""
        found, largest = [], []
        real = QwenImage21Policy.velocity

        def asked(self: QwenImage21Policy, latents: Any, sigmas: Any, prefix: Any) -> Any:
            largest.append(len(latents))
            return real(self, latents, sigmas, prefix)

        monkeypatch.setattr(QwenImage21Policy, "velocity", asked)
        for micro_batch in (64, 2):
            largest.clear()
            learner = policy.sibling()
            learner.transformer.requires_grad_(True)
            rollout = ROLLOUT.model_copy(update={"micro_batch": micro_batch})
            config = GuardConfig(judge=OracleConfig(), num_prompts=8, every=4)
            watch = Guard(config, rollout, ["t2i"], tmp_path / str(micro_batch), step=0)
            watch._judge = Scripted([0.2, 0.6])
            look(watch, learner, 0, None, CPU)
            shake(learner, 1)
            found.append(look(watch, learner, 4, 1.0, CPU)["guard/absorbed_guidance"])
            assert max(largest) <= 2 * micro_batch
        assert found[0] == pytest.approx(found[1], rel=1e-4)

    def test_what_others_say_and_what_is_still_known_is_told_beside_the_rule(
        self, policy: QwenImage21Policy, tmp_path: Path
    ) -> None:
        watch = Guard(CURIOUS, ROLLOUT, ["t2i"], tmp_path, step=0)
        found = look(watch, policy, 0, None, CPU)
        (row,) = [json.loads(line) for line in (tmp_path / "guard/looks.jsonl").open()]
        assert {"likeness", "style"} <= row["retention"].keys()
        assert all(0 <= value <= 1 for value in row["retention"].values())
        assert found["guard/others/beauty"] == row["others"]["beauty"] != row["held_out"]
        assert found["guard/retention/style"] == row["retention"]["style"]
        # The same pictures again: nothing has moved, so nothing differs.
        look(watch, policy, 8, 1.0, CPU)
        again = [json.loads(line) for line in (tmp_path / "guard/looks.jsonl").open()][1]
        assert (again["retention"], again["others"]) == (row["retention"], row["others"])

    def test_what_fails_is_told_and_means_of_too_little_are_not(
        self, policy: QwenImage21Policy, tmp_path: Path
    ) -> None:
        watch = Guard(CURIOUS, ROLLOUT, ["t2i"], tmp_path, step=0)
        watch._judge, watch._others["beauty"] = Failing(watch._judge, 1), Failing(watch._judge, 2)
        watch._known._judge = Failing(watch._judge, 16)
        found = look(watch, policy, 0, None, CPU)
        (row,) = [json.loads(line) for line in (tmp_path / "guard/looks.jsonl").open()]
        coverage = {"judge": 15 / 16, "others.beauty": 14 / 16, "retention": 16 / 32}
        assert row["coverage"] == coverage
        assert {name: found[f"guard/coverage/{name}"] for name in coverage} == coverage
        assert row["others"] == row["retention"] == {} and len(row["scores"]) == 8

    def test_retention_needs_prompts_and_is_off_by_default(self, tmp_path: Path) -> None:
        config = GuardConfig(judge=OracleConfig(), num_prompts=8)
        assert config.retention is None and config.others == {}
        held_out = "embedded:prompts/held-out.jsonl"
        for task, path in (("edit", RetentionConfig().prompts), ("t2i", held_out)):
            asked = config.model_copy(update={"retention": RetentionConfig(prompts=path)})
            if task == "t2i":
                assert Guard(asked, ROLLOUT, [task], tmp_path / task, step=0)
            else:
                with pytest.raises(ConfigError, match="need prompts of task edit, got none"):
                    Guard(asked, ROLLOUT, [task], tmp_path / task, step=0)

    def test_to_warn_ends_nothing_and_to_stop_gives_nothing_back(
        self, policy: QwenImage21Policy, tmp_path: Path
    ) -> None:
        for action, is_over in (("warn", False), ("stop", True)):
            learner = policy.sibling()
            learner.transformer.requires_grad_(True)
            watch = guard(tmp_path / action, [0.5, 0.1], action=action)
            look(watch, learner, 0, None, CPU)
            shake(learner, 3)
            before = weights(learner)
            assert look(watch, learner, 4, 1.0, CPU)["guard/hacked"] == 1
            assert watch.is_over == is_over
            watch.restore(learner)
            assert torch.equal(weights(learner), before)

    def test_a_start_that_was_best_and_a_judge_without_a_say_are_told(
        self, policy: QwenImage21Policy, tmp_path: Path
    ) -> None:
        watch = guard(tmp_path / "start", [0.5, 0.1])
        look(watch, policy, 0, None, CPU)
        look(watch, policy, 4, 1.0, CPU)
        with pytest.raises(RunError, match="got none better than the start"):
            watch.restore(policy)
        with pytest.raises(RunError, match=r"pictures that guard\.judge can score"):
            look(guard(tmp_path / "none", [None]), policy, 0, None, CPU)
        with pytest.raises(ConfigError, match="need 999 prompts of task t2i, got 128"):
            config = GuardConfig(judge=OracleConfig(), num_prompts=999)
            Guard(config, ROLLOUT, ["t2i"], tmp_path / "many", step=0)


def test_a_guard_needs_a_reward_to_watch() -> None:
    stage = {
        "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"]},
        "rollout": {"guidance_scale": 1, "window": 0, "keep": 2},
        "algorithm": {"kind": "distill", "teachers": {"t2i": {"path": "x", "guidance_scale": 2}}},
        "guard": {"judge": {"kind": "oracle"}},
    }
    with pytest.raises(ConfigError, match="need no guard for distill"):
        parse(StageConfig, stage)


def test_what_is_trained_on_is_not_held_out() -> None:
    path = "embedded:prompts/train.jsonl"
    trained_on = read_prompts(located(path))
    own = GuardConfig(judge=OracleConfig(), prompts=path)
    last = trained_on.select(lambda prompt: prompt.task == "t2i")[-8:]
    renamed = PromptSet.of([replace(prompt, id=f"x-{prompt.id}") for prompt in last])
    for known in (trained_on, renamed):
        with pytest.raises(
            ConfigError, match=r"guard\.prompts: need prompts that the stage is not"
        ):
            held_out(own, ["t2i"], known)
    fine = held_out(GuardConfig(judge=OracleConfig(), num_prompts=8), ["t2i", "edit"], trained_on)
    assert [prompt.task for prompt in fine.entries] == ["t2i"] * 8 + ["edit"] * 8
    with pytest.raises(ConfigError, match=r"guard\.num_prompts: need 9999 prompts of task t2i"):
        held_out(GuardConfig(judge=OracleConfig(), num_prompts=9999), ["t2i"])
