"""A study's table, from small fake runs with planted gains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish import studies
from burnish.config import parse
from burnish.evaluation import Row, read_scores, write_rows
from burnish.prompts import write_prompts
from burnish.stages import BASE, BASES, BEST_OF, RunConfig
from burnish.tracking import Run, write_atomic
from burnish.types import Prompt

GAINS = {BASE: 0.0, "plain": 0.05, "better": 0.15}
"""Planted; each seed adds its own hundredth."""
PROMPTS = [Prompt(id=f"p{n}", text=f"prompt {n}", category="general") for n in range(60)]


def make_config(folder: Path, seed: int) -> RunConfig:
    stage: dict[str, Any] = {
        "steps": 20,
        "prompts": {"path": "train.jsonl", "tasks": ["t2i"]},
        "rollout": {"window": 0, "keep": "none"},
        "rewards": {"truth": {"kind": "oracle"}},
        "algorithm": {"kind": "nft"},
    }
    data = {
        "name": "fake",
        "seed": seed,
        "stages": {"plain": stage, "better": stage},
        "evaluation": {"prompts": str(folder / "held-out.jsonl"), "knowledge": None},
        "judge": {"kind": "oracle"},
        "study": {"question": "Which is better?", "claim": "The better one.", "seeds": [0, 1]},
    }
    return parse(RunConfig, data)


def score_rows(policy: str, seed: int) -> list[Row]:
    """Scores around the planted means; what is hard is hard for all policies."""
    rows: list[Row] = []
    for number, prompt in enumerate(PROMPTS):
        ease = np.random.default_rng(number).normal(0.5, 0.1)
        # The base draws the same pictures in every run.
        own = 0 if policy in BASES else seed
        noise = np.random.default_rng([number, own, *policy.encode()]).normal(0, 0.03)
        value = float(ease + GAINS.get(policy, 0.0) + 0.01 * own + noise)
        common = {"policy": policy, "prompt": prompt.id, "task": "t2i", "category": "general"}
        rows.append({**common, "seed": 0, "metric": "composite", "value": value})
    return rows


def make_run(folder: Path, seed: int, *, is_complete: bool = True) -> Path:
    """The run folder of one seed, with everything that a study reads."""
    config, out = make_config(folder, seed), studies.seed_folder(folder / "study", seed)
    write_prompts(folder / "held-out.jsonl", PROMPTS)
    Run.create(out, config, command="burnish study fake", environment={})
    for policy in (*BASES, "plain", "better"):
        write_rows(out / "evaluation" / policy / "scores.jsonl", score_rows(policy, seed))
        write_atomic(out / "evaluation" / policy / "DONE", "")
    for arm in ("plain", "better"):
        stage = out / "stages" / arm
        rows = [{"step": n, "data/images": 96} for n in range(20)]
        times = [{"step": n, "time/rollout": 3.0} for n in range(20)]
        write_rows(stage / "metrics.jsonl", rows)
        write_rows(stage / "timings.jsonl", times)
        if is_complete:
            write_atomic(stage / "DONE", "")
    return out


def result(found: dict[str, Any], arm: str) -> dict[str, Any]:
    (row,) = (r for r in found["results"] if (r["arm"], r["metric"]) == (arm, "composite"))
    return row


def test_planted_gains_come_back_with_their_intervals_and_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, seed)
    found = studies.write_study(tmp_path / "study", "burnish study fake")
    for arm in ("plain", "better"):
        row, planted = result(found, arm), GAINS[arm] + 0.005
        assert row["gain"]["low"] < planted < row["gain"]["high"]
        assert row["gain"]["high"] - row["gain"]["low"] < 0.03
        first, second = row["gain_of_each_seed"]
        assert np.mean([first, second]) == pytest.approx(row["gain"]["mean"])
        assert second - first == pytest.approx(0.01, abs=0.015)
    assert result(found, "plain")["over_first_arm"] is None
    over = result(found, "better")["over_first_arm"]
    assert over["low"] < 0.1 < over["high"] and over["low"] > 0.05
    assert found["cost"]["better"] == {"images": 1920.0, "minutes": 1.0}


def test_the_table_says_the_question_the_command_and_the_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    make_run(tmp_path, 1, is_complete=False)
    found = studies.write_study(tmp_path / "study", "burnish study fake")
    text = (tmp_path / "study" / "study.md").read_text()
    assert text.startswith("# Which is better?\n\nClaim: The better one.\n")
    # A run that is not complete has no say.
    assert "Command: `burnish study fake`; seeds 0." in text and found["seeds"] == [0]
    assert "| plain | 1,920 | 1.0 |" in text
    rows = read_scores(tmp_path / "study" / "scores.jsonl")
    assert {row["arm"] for row in rows} == {*BASES, "plain", "better"}
    assert all(row["study"] == "fake" and row["run"] == 0 for row in rows)


def test_a_study_without_a_complete_run_has_no_table(tmp_path: Path) -> None:
    make_run(tmp_path, 0, is_complete=False)
    with pytest.raises(ValueError, match="need a complete run"):
        studies.write_study(tmp_path / "study", "burnish study fake")


def test_the_base_is_measured_once(tmp_path: Path) -> None:
    """The copy is what the first run measured, and the job that would measure it is done."""
    first = make_run(tmp_path, 0)
    config = make_config(tmp_path, 1)
    second = studies.seed_folder(tmp_path / "study", 1)
    Run.create(second, config, command="burnish study fake", environment={})
    studies.share_base(tmp_path / "study", (0, 1), 1)
    for name in BASES:
        there, here = (run / "evaluation" / name / "scores.jsonl" for run in (first, second))
        assert there.read_bytes() == here.read_bytes()
    assert (second / "evaluation" / BASE / "DONE").is_file()
    assert BEST_OF in BASES and not (second / "evaluation" / "plain").exists()


def test_prompts_are_the_unit(tmp_path: Path) -> None:
    """Twice as many pictures of the same prompts make no narrower interval."""
    config = make_config(tmp_path, 0)
    rows = [r | {"run": 0} for p in (BASE, "plain", "better") for r in score_rows(p, 0)]
    cost = [{"stage": arm, "images": 1, "minutes": {"total": 1.0}} for arm in ("plain", "better")]
    once = result(studies.tabulate(config, rows, [cost]), "better")["gain"]
    again = [*rows, *({**row, "seed": 1} for row in rows)]
    twice = result(studies.tabulate(config, again, [cost]), "better")["gain"]
    assert once == twice
