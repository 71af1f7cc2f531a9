"""A study's table, from small fake runs with planted gains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish import revision
from burnish.config import ConfigError, parse
from burnish.curation import SelectionConfig
from burnish.evaluation import Row
from burnish.guard import FOLDER, GuardConfig
from burnish.launcher import pending
from burnish.looks import LOOKS
from burnish.prompts import write_prompts
from burnish.run_config import BASE, BASES, BEST_OF, RunConfig
from burnish.run_folder import is_complete, job_folder
from burnish.studies.courses import course, mean_course
from burnish.studies.curves import Curve, budget, budgets
from burnish.studies.study import of_seed, seed_folder, share_base, tabulate, write_study
from burnish.studies.table import markdown
from burnish.summary import read_run
from burnish.tracking import Run, RunError, read_rows, write_atomic, write_rows
from burnish.types import Prompt

GAINS = {BASE: 0.0, "plain": 0.05, "better": 0.15}
"""Planted; each seed adds its own hundredth."""
PROMPTS = [Prompt(id=f"p{n}", text=f"prompt {n}", category="general") for n in range(60)]


def make_config(folder: Path, **changes: Any) -> RunConfig:
    stage: dict[str, Any] = {
        "steps": 20,
        "prompts": {"path": "train.jsonl", "tasks": ["t2i"]},
        "rollout": {"window": 0, "keep": "none"},
        "rewards": {"truth": {"kind": "oracle"}},
        "algorithm": {"kind": "nft"},
    }
    data = {
        "name": "fake",
        "stages": {"plain": stage, "better": stage},
        "evaluation": {"prompts": str(folder / "held-out.jsonl"), "knowledge": None},
        "judge": {"kind": "oracle"},
        "study": {"question": "Which is better?", "claim": "The better one.", "seeds": [0, 1]},
    }
    return parse(RunConfig, data | changes)


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
    out = seed_folder(folder / "study", seed)
    config = of_seed(make_config(folder), seed)
    write_prompts(folder / "held-out.jsonl", PROMPTS)
    Run.create(out, config, command="burnish study fake", environment={})
    for policy in (*BASES, "plain", "better"):
        write_rows(out / "evaluation" / policy / "scores.jsonl", score_rows(policy, seed))
        write_atomic(out / "evaluation" / policy / "DONE", "")
    for arm in ("plain", "better"):
        stage = out / "stages" / arm
        rows = [{"step": n, "data/images": 96, "data/evaluations": 1920.0} for n in range(20)]
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
    found = write_study(make_config(tmp_path), tmp_path / "study", "burnish study fake")
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
    cost = {"images": 1920.0, "curated": 0.0, "evaluations": 38400.0, "minutes": 1.0}
    assert found["cost"]["better"] == cost
    assert [row["category"] for row in found["categories"]] == ["general", "general"]


def test_the_table_says_the_question_the_command_and_the_seeds(tmp_path: Path) -> None:
    make_run(tmp_path, 0)
    make_run(tmp_path, 1, is_complete=False)
    found = write_study(make_config(tmp_path), tmp_path / "study", "burnish study fake")
    text = (tmp_path / "study" / "study.md").read_text()
    assert text.startswith("# Which is better?\n\nClaim: The better one.\n")
    # A run that is not complete has no say.
    assert "Command: `burnish study fake`; seeds 0." in text and found["seeds"] == [0]
    assert "| plain | 1,920 | 0 | 38,400 | 1.0 |" in text
    page = (tmp_path / "study" / "study.html").read_text()
    assert "Which is better?" in page and "<script" not in page and "arm-1" in page
    assert page.count("38,400") == 2 and 'href="#budget"' not in page
    rows = read_rows(tmp_path / "study" / "scores.jsonl")
    assert {row["arm"] for row in rows} == {*BASES, "plain", "better"}
    assert all(row["study"] == "fake" and row["seed"] == 0 for row in rows)


GUARD = {"judge": {"kind": "oracle"}, "every": 5, "action": "warn"}


def make_looks(run: Path, arm: str, gains: Mapping[int, float]) -> None:
    """Looks of an arm's guard: what each of 40 prompts had gained before some steps."""
    ease = np.random.default_rng(0).normal(0.5, 0.2, 40)
    rows = [
        {"step": step, "scores": {f"g{n}": float(one + gain) for n, one in enumerate(ease)}}
        for step, gain in gains.items()
    ]
    write_rows(run / "stages" / arm / "guard" / "looks.jsonl", rows)


def test_what_an_arm_needs_to_be_as_good_as_the_first(tmp_path: Path) -> None:
    """A planted arm that gains twice as fast needs half; one that never arrives, no number."""
    config = make_config(tmp_path)
    stages = {name: stage.model_copy(update={"guard": parse(GuardConfig, GUARD)})
              for name, stage in config.stages.items()}  # fmt: skip
    config = config.model_copy(update={"stages": stages})
    runs = [make_run(tmp_path, seed) for seed in (0, 1)]
    slow = {0: 0.0, 5: 0.05, 10: 0.1, 15: 0.1, 20: 0.1}
    for run, extra in zip(runs, (-0.01, 0.01), strict=True):
        # The seeds differ, their mean is the planted curve.
        make_looks(run, "plain", {s: g + extra * (s > 0) for s, g in slow.items()})
        make_looks(run, "better", {s: min(2 * g, 0.2) for s, g in slow.items()})
    found = budgets(config, runs)
    assert found["plain"]["evaluations"] == [0.0, 9600.0, 19200.0, 28800.0, 38400.0]
    assert found["plain"]["share"]["mean"] == pytest.approx(1.0)
    # Between two looks a straight line: 0.1 is reached at step 5, half of the ten of `plain`.
    assert found["better"]["share"]["mean"] == pytest.approx(0.5)
    assert found["better"]["share"]["low"] == pytest.approx(0.5)
    make_looks(runs[0], "better", {s: g / 4 for s, g in slow.items()})
    make_looks(runs[1], "better", {s: g / 4 for s, g in slow.items()})
    assert budgets(config, runs)["better"]["share"]["mean"] is None
    # A control that only falls is at its level before it has spent anything, whoever asks.
    for run in runs:
        make_looks(run, "plain", {step: -gain for step, gain in slow.items()})
    assert [own["share"] for own in budgets(config, runs).values()] == [None, None]


def test_a_control_that_hardly_rises_makes_no_budget() -> None:
    """It does in the mean, and in so few resamples of its prompts that no interval is left."""
    spent, names = np.array([0.0, 100.0, 200.0]), tuple(f"p{n}" for n in range(20))
    gains = np.where(np.arange(20) % 2, 0.2, -0.19)
    control, other = (
        Curve((0, 1, 2), spent, np.stack([0 * gains, rise * gains, rise * gains]), names)
        for rise in (1.0, 2.0)
    )
    assert budget(control, other) is None
    sure = Curve((0, 1, 2), spent, np.stack([0 * gains, abs(gains), abs(gains)]), names)
    found = budget(sure, sure)
    assert found is not None and (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_a_study_without_a_complete_run_has_no_table(tmp_path: Path) -> None:
    make_run(tmp_path, 0, is_complete=False)
    with pytest.raises(ConfigError, match="need a complete run"):
        write_study(make_config(tmp_path), tmp_path / "study", "burnish study fake")


def test_the_base_is_measured_once(tmp_path: Path) -> None:
    """The copy is what the first run measured, and the job that would measure it is done."""
    first = make_run(tmp_path, 0)
    config = of_seed(make_config(tmp_path), 1)
    second = seed_folder(tmp_path / "study", 1)
    Run.create(second, config, command="burnish study fake", environment={})
    share_base(tmp_path / "study", (0, 1), 1)
    for name in BASES:
        there, here = (run / "evaluation" / name / "scores.jsonl" for run in (first, second))
        assert there.read_bytes() == here.read_bytes()
    assert (second / "evaluation" / BASE / "DONE").is_file()
    # One that is drawn without guidance anyway is not measured twice.
    assert config.bases == BASES and config.able("t2i")[:2] == BASES[:2]
    plain = config.evaluation.model_copy(update={"guidance_scale": 1.0})
    unguided = config.model_copy(update={"evaluation": plain})
    assert unguided.bases == (BASE, BEST_OF) and unguided.able("t2i")[1] != BASES[1]
    third = seed_folder(tmp_path / "study", 2)
    Run.create(third, of_seed(unguided, 2), command="burnish study", environment={})
    share_base(tmp_path / "study", (0, 2), 2)
    assert {p.name for p in (third / "evaluation").iterdir()} == set(unguided.bases)
    assert BEST_OF in BASES and not (second / "evaluation" / "plain").exists()


def test_only_arms_that_changed_are_run_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, 0)
    config = of_seed(make_config(tmp_path), 0)
    assert revision.take_up(config, run, arms=True) == [] and is_complete(run, "train/better")
    changed = config.stages["better"].model_copy(update={"steps": 30})
    stages = {"plain": config.stages["plain"], "new": changed, "better": changed}
    other = config.model_copy(update={"stages": stages})
    assert revision.take_up(other, run, arms=True) == ["better"]
    assert pending(run, other.jobs()) == {
        "train/new": (), "train/better": (),
        "measure/new": ("train/new",), "measure/better": ("train/better",),
    }  # fmt: skip
    # The folder is that of the new settings, and of no third ones.
    Run.create(run, other)
    third = other.model_copy(update={"seed": 5})
    assert revision.take_up(third, run, arms=True) == []
    with pytest.raises(RunError, match="belongs to another run"):
        Run.create(run, third)


def test_the_base_is_measured_again_on_a_task_that_an_arm_was_given(tmp_path: Path) -> None:
    """And takes the benches of it; another seed is given what was measured then."""
    later = {"benches": {task: {"kind": "miniature", "task": task} for task in ("t2i", "edit")}}
    first, second = (make_run(tmp_path, seed) for seed in (0, 1))
    config = make_config(tmp_path, **later)
    revision.take_up(config, first)
    for name in (BASE, "plain"):
        job_folder(first, f"bench/{name}").mkdir(parents=True)
        write_atomic(job_folder(first, f"bench/{name}") / "DONE", "")
    prompts = config.stages["better"].prompts.model_copy(update={"tasks": ("t2i", "edit")})
    better = config.stages["better"].model_copy(update={"prompts": prompts})
    given = config.model_copy(update={"stages": {**config.stages, "better": better}})
    for seed, run in enumerate((first, second)):
        own = revision.with_later(of_seed(given, seed), run)
        assert revision.take_up(own, run, arms=True) == ["better"]
        assert f"measure/{BASE}" in pending(run, own.jobs())
        assert is_complete(run, "measure/plain") and read_run(run) == own
        if run == first:
            assert not is_complete(run, f"bench/{BASE}") and is_complete(run, "bench/plain")
            write_rows(run / "evaluation" / BASE / "scores.jsonl", score_rows(BASE, 5))
            write_atomic(run / "evaluation" / BASE / "DONE", "")
    share_base(tmp_path / "study", (0, 1), 1)
    assert is_complete(second, f"measure/{BASE}")
    assert read_rows(second / "evaluation" / BASE / "scores.jsonl") == score_rows(BASE, 5)


def test_a_shared_profile_stays_when_the_arm_that_had_it_changes(tmp_path: Path) -> None:
    """The other arm has it then, with what it kept of it, and is not run again; nor is an arm drawn
    for again that only trains otherwise."""
    run, config = make_run(tmp_path, 0), of_seed(make_config(tmp_path), 0)
    curated = {
        name: stage.model_copy(update={"curation": SelectionConfig()})
        for name, stage in config.stages.items()
    }
    config = config.model_copy(update={"stages": curated})
    Run.open(run).rebind(config)
    places = {name: job_folder(run, f"curate/{name}") for name in curated}
    Run.create(places["plain"], config.curated("plain"))
    write_rows(places["plain"] / "profile-0.jsonl", [{"prompt": "p0"}])
    write_atomic(places["plain"] / "DONE", "")
    places["better"].mkdir()
    write_atomic(places["better"] / "kept.jsonl", "own")

    def change(name: str, **changes: Any) -> RunConfig:
        return config.model_copy(
            update={
                "stages": {**config.stages, name: config.stages[name].model_copy(update=changes)}
            }
        )

    config = change("plain", steps=30)
    assert revision.take_up(config, run, arms=True) == ["plain"]
    assert set(pending(run, config.jobs())) == {"train/plain", "measure/plain"}
    rollout = config.stages["plain"].rollout.model_copy(update={"num_steps": 3})
    config = change("plain", rollout=rollout)
    assert revision.take_up(config, run, arms=True) == ["plain"]
    assert set(pending(run, config.jobs())) == {"curate/plain", "train/plain", "measure/plain"}
    assert not places["plain"].exists()
    assert (places["better"] / "profile-0.jsonl").is_file()
    assert (places["better"] / "kept.jsonl").read_text() == "own"
    # It can be taken up there.
    Run.create(places["better"], config.curated("better"))


def both_runs() -> list[Row]:
    """Scores of two seeds."""
    policies = (BASE, "plain", "better")
    return [row | {"run": seed} for seed in (0, 1) for p in policies for row in score_rows(p, seed)]


def test_prompts_are_the_unit(tmp_path: Path) -> None:
    """Twice as many pictures of the same prompts make no narrower interval."""
    write_prompts(tmp_path / "held-out.jsonl", PROMPTS)
    config, rows = make_config(tmp_path), both_runs()
    once = result(tabulate(config, rows), "better")["gain"]
    again = [*rows, *({**row, "seed": 1} for row in rows)]
    assert once == result(tabulate(config, again), "better")["gain"]


def test_an_arm_is_compared_with_the_base_of_the_same_prompts(tmp_path: Path) -> None:
    """A seed in which only the hardest prompts were scored must not look like a bad seed."""
    config, rows = make_config(tmp_path), both_runs()
    easy = {row["prompt"] for row in rows if row["policy"] == BASE and row["value"] > 0.45}
    kept = [
        row if not (row["policy"] == "better" and row["run"] == 1 and row["prompt"] in easy)
        else row | {"metric": "failed", "value": None, "reason": "x"}
        for row in rows
    ]  # fmt: skip
    row = result(tabulate(config, kept), "better")
    assert row["gain"]["low"] < 0.155 < row["gain"]["high"]
    assert row["gain_of_each_seed"][1] == pytest.approx(0.16, abs=0.02)
    assert row["failed"] == len(easy) and not row["is_valid"]


def test_an_arm_without_scores_is_there_and_marked(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    rows = [
        row | {"metric": "failed", "value": None, "reason": "x"}
        if row["policy"] == "better"
        else row
        for row in both_runs()
    ]
    found = tabulate(config, rows)
    row = result(found, "better")
    assert row["score"] is row["gain"] is None and row["gain_of_each_seed"] == [None, None]
    text = markdown(
        {
            **found,
            "question": "",
            "name": "x",
            "claim": "",
            "command": "c",
            "seeds": [0],
            "cost": {},
            "budgets": {},
            "course": [],
            "folding": [],
        }
    )
    assert (
        "| better | t2i | composite | missing invalid, 120 failed | missing | none, none |" in text
    )


def test_runs_of_other_settings_or_seeds_have_no_say(tmp_path: Path) -> None:
    """Another question, claim or list of seeds is no other setting."""
    make_run(tmp_path, 0)
    make_run(tmp_path, 7)
    (tmp_path / "study" / "seed-0-old").mkdir()
    worded = make_config(tmp_path, study={"question": "Or is it?", "seeds": [0, 3]})
    assert write_study(worded, tmp_path / "study", "c")["seeds"] == [0]
    other = make_config(tmp_path, judge={"kind": "oracle", "floor": 0.5})
    with pytest.raises(ConfigError, match=r"need runs of these settings, got others in .*seed-0"):
        write_study(other, tmp_path / "study", "c")


def test_a_merge_is_an_arm_without_a_cost(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_run(tmp_path, seed)
        place = run / "evaluation" / "soup"
        rows = [row | {"policy": "soup"} for row in score_rows("better", seed)]
        write_rows(place / "scores.jsonl", rows)
        write_atomic(place / "DONE", "")
        (run / "stages" / "soup").mkdir()
        write_atomic(run / "stages" / "soup" / "DONE", "")
        merges = {"soup": {"method": "average", "of": ["plain", "better"]}}
        Run.open(run).rebind(of_seed(make_config(tmp_path, merges=merges), seed))
    config = make_config(tmp_path, merges=merges)
    found = write_study(config, tmp_path / "study", "burnish study fake")
    assert result(found, "soup")["gain"] == result(found, "better")["gain"]
    assert list(found["cost"]) == ["plain", "better"] and found["arms"][-1] == "soup"
    assert "arm-2" in (tmp_path / "study" / "study.html").read_text()


def test_planted_differences_and_shares_come_back(tmp_path: Path) -> None:
    """`better` gains 0.15 where `plain` gains 0.05, so `plain` has a third of its gain."""
    for seed in (0, 1):
        make_run(tmp_path, seed)
    study = {"question": "Which?", "seeds": [0, 1], "compare": [{"arm": "plain", "over": "better"}]}
    config = make_config(tmp_path, study=study)
    found = write_study(config, tmp_path / "study", "burnish study fake")
    (row,) = found["comparisons"]
    planted = GAINS["plain"] - GAINS["better"]
    assert row["difference"]["low"] < planted < row["difference"]["high"]
    share = (GAINS["plain"] + 0.005) / (GAINS["better"] + 0.005)
    assert row["share"]["low"] < share < row["share"]["high"]
    # The same prompts, whatever the order: the difference the other way round.
    study["compare"] = [{"arm": "better", "over": "plain", "categories": ["general"]}]
    (turned,) = write_study(
        make_config(tmp_path, study=study), tmp_path / "study", "burnish study fake"
    )["comparisons"]
    assert turned["difference"]["mean"] == pytest.approx(-row["difference"]["mean"])
    page = (tmp_path / "study" / "study.html").read_text()
    assert 'href="#compared"' in page and "text to image: general" in page.lower()
    study["compare"] = [{"arm": "beter", "over": "plain"}]
    with pytest.raises(ConfigError, match="did you mean 'better'"):
        make_config(tmp_path, study=study)


def test_what_was_made_of_a_changed_arm_is_made_again(tmp_path: Path) -> None:
    """A merge of it, a stage that starts from the merge, and their measurements; half-done work
    with the old results goes, too."""
    merges = {"soup": {"method": "average", "of": ["plain", "better"]}}
    config = make_config(tmp_path, merges=merges)
    after = config.stages["plain"].model_copy(update={"start": "soup"})
    config = config.model_copy(update={"stages": {**config.stages, "after": after}})
    jobs = list(config.jobs())
    assert jobs.index("train/better") < jobs.index("merge/soup") < jobs.index("train/after")
    run = make_run(tmp_path, 0)
    own = of_seed(config, 0)
    Run.open(run).rebind(own)
    for name in ("soup", "after"):
        (run / "stages" / name / "checkpoints").mkdir(parents=True)
        (run / "evaluation" / name).mkdir()
        write_atomic(run / "evaluation" / name / "DONE", "")
    changed = own.stages["better"].model_copy(update={"steps": 30})
    other = own.model_copy(update={"stages": {**own.stages, "better": changed}})
    assert revision.take_up(other, run, arms=True) == ["better"]
    assert is_complete(run, "train/plain") and is_complete(run, "measure/plain")
    for name in ("better", "soup", "after"):
        assert not (run / "stages" / name).exists() and not (run / "evaluation" / name).exists()


def test_a_finished_run_is_given_benches_and_an_arena_later(tmp_path: Path) -> None:
    """They are its only new jobs, the table of its study stays, and the study leaves them be."""
    run = make_run(tmp_path, 0)
    held_out = str(tmp_path / "held-out.jsonl")
    later = {
        "benches": {"t2i": {"kind": "miniature", "prompts": held_out}},
        "arena": {"judge": {"kind": "oracle"}},
    }
    given = make_config(tmp_path, **later)
    assert revision.take_up(given, run) == []
    benches = {f"bench/{name}" for name in (BASE, "plain", "better")}
    assert set(pending(run, given.jobs())) == {*benches, "arena/t2i"}
    Run.create(run, given)
    for job in (*benches, "arena/t2i"):
        job_folder(run, job).mkdir(parents=True)
        write_atomic(job_folder(run, job) / "DONE", "")
    own = revision.with_later(of_seed(make_config(tmp_path), 0), run)
    assert own == given and revision.take_up(own, run, arms=True) == []
    assert pending(run, own.jobs()) == {}
    found = write_study(make_config(tmp_path), tmp_path / "study", "burnish study fake")
    assert found["seeds"] == [0]
    # Other votes are cast again, and nothing else is done.
    later["arena"] = {"judge": {"kind": "oracle"}, "raters": {"count": 9}}
    other = make_config(tmp_path, **later)
    revision.take_up(other, run)
    assert set(pending(run, other.jobs())) == {"arena/t2i"}


def test_a_run_is_given_nothing_that_would_change_its_results(tmp_path: Path) -> None:
    run = make_run(tmp_path, 0)
    before = (run / "config.yaml").read_bytes()
    stages = {"plain": {**make_config(tmp_path).model_dump()["stages"]["plain"], "steps": 30}}
    for changes in ({"seed": 5}, {"stages": stages}):
        assert revision.take_up(make_config(tmp_path, **changes), run) == []
        assert (run / "config.yaml").read_bytes() == before


def test_who_judges_may_change_until_something_is_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, 0)
    other = make_config(tmp_path, edit_judge={"kind": "oracle"})
    before = (run / "config.yaml").read_bytes()
    assert revision.take_up(other, run) == []
    assert (run / "config.yaml").read_bytes() == before
    for marker in run.glob("evaluation/*/DONE"):
        marker.unlink()
    assert revision.take_up(other, run) == []
    Run.create(run, other)


def test_the_course_puts_the_reward_of_a_span_beside_the_look_at_its_end(tmp_path: Path) -> None:
    runs = {seed: make_run(tmp_path, seed) for seed in (0, 1)}
    for seed, run in runs.items():
        stage = run / "stages" / "plain"
        rows = [
            {"step": n, "reward/mean": float(n + seed), "advantage/share_truth": 0.25 + seed / 2}
            for n in range(20)
        ]
        write_rows(stage / "metrics.jsonl", rows)
        looks = [(0, 0.5, "fine"), (8, 0.7 + seed / 5, "fine"), (16, 0.6, "hacked")]
        # The second seed was ended by its guard before the first.
        looked = [
            {"step": step, "held_out": held_out, "verdict": verdict}
            for step, held_out, verdict in looks[: 3 - seed]
        ]
        write_rows(stage / FOLDER / LOOKS, looked)
    rows = list(course(make_config(tmp_path), runs))
    # Arms without rewards and without looks have no course.
    assert {row["arm"] for row in rows} == {"plain"} and len(rows) == 5
    means = mean_course(rows)
    assert [row["step"] for row in means] == [0, 8]
    start, end = means
    assert start["reward"] is None and start["held_out"] == 0.5 and start["hacked"] == 0
    assert end["reward"] == pytest.approx(4.0) and end["held_out"] == pytest.approx(0.8)
    assert end["shares"] == {"truth": pytest.approx(0.5)}
    (last,) = (row for row in rows if row["step"] == 16)
    assert last["reward"] == pytest.approx(11.5) and last["verdict"] == "hacked"


def test_a_training_that_nobody_looked_at_is_told_in_quarters(tmp_path: Path) -> None:
    run = make_run(tmp_path, 0)
    rows = [{"step": n, "reward/mean": float(n)} for n in range(20)]
    write_rows(run / "stages" / "better" / "metrics.jsonl", rows)
    found = write_study(make_config(tmp_path), tmp_path / "study", "burnish study fake")
    assert [(row["step"], row["reward"]) for row in found["course"]] == [
        (5, 2.0), (10, 7.0), (15, 12.0), (20, 17.0)
    ]  # fmt: skip
    assert "| better | 15 | 12.000 |  |  |  |" in (tmp_path / "study" / "study.md").read_text()
    assert len((tmp_path / "study" / "course.jsonl").read_text().splitlines()) == 4
