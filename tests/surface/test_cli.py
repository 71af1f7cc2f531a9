"""The command line: what it says, what it refuses, and that no process is left behind."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from burnish import cli, launcher
from burnish.cli import program, recipes
from burnish.config import load, located
from burnish.contamination import ContaminationWarning
from burnish.launcher import STOPPED, JobError, Stopped, launch
from burnish.preflight import check_inputs
from burnish.run_config import RunConfig

GROUPED = (
    "arena judge",
    "arena rate",
    "bench read",
    "bench run",
    "miniature build",
    "prompts check",
    "prompts write",
    "miniature annotate",
    "reward train",
    "reward report",
    "reward serve",
)
COMMANDS = ("run", "grpo", "nft", "distill", "report", "recipes", "sample", "doctor")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with random weights."""
    from burnish.policies.qwen_image21 import QwenImage21Policy

    folder = tmp_path_factory.mktemp("model")
    QwenImage21Policy.tiny().save(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts of the embedded world."""
    return two_prompts("train", tmp_path / "prompts.jsonl")


def two_prompts(name: str, path: Path) -> Path:
    lines = located(f"embedded:prompts/{name}.jsonl").read_text().splitlines()
    path.write_text("\n".join([line for line in lines if '"task": "t2i"' in line][:2]) + "\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path, model: Path, prompts: Path) -> Path:
    """A model distilled into itself, guidance included, in two tiny steps."""
    plan = {
        "name": "tiny",
        "policy": {"path": str(model), "resolution": 64},
        "runtime": {"device": "cpu", "threads": 1},
        "stages": {
            "student": {
                "steps": 2,
                "prompts_per_step": 2,
                "save_every": 1,
                "prompts": {"path": str(prompts), "tasks": ["t2i"]},
                "rollout": {
                    "num_steps": 2,
                    "guidance_scale": 1.0,
                    "group_size": 1,
                    "window": 0,
                    "keep": 1,
                },
                "algorithm": {
                    "kind": "distill",
                    "teachers": {"t2i": {"path": str(model), "guidance_scale": 3.0}},
                },
                "optimizer": {"num_updates": 1},
            }
        },
        "judge": {"kind": "oracle"},
        "benches": {"truth": {"kind": "miniature", "prompts": str(prompts), "knowledge": None}},
        "arena": {"judge": {"kind": "oracle"}, "raters": {"count": 2, "margin": 0.02}},
        "evaluation": {
            "prompts": str(two_prompts("held-out", tmp_path / "held-out.jsonl")),
            "knowledge": None,
            "num_seeds": 1,
            "best_of": 2,
            "num_steps": 2,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run a command that must be refused in one line, leaving nothing; gives that line."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("burnish: "), err
        assert "Traceback" not in err
        assert list(here.iterdir()) == []
        return err

    return run


# --- Help ------------------------------------------------------------------------------------


def test_help_comes_at_once() -> None:
    """Without torch, and with every command but the hidden one."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "burnish", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 5, "generous, for a machine that is busy"
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", "| numpy"))]
    assert all(f"  {name} " in done.stdout for name in (*COMMANDS, "miniature", "reward"))
    assert "  job " not in done.stdout and "..." not in done.stdout.replace("[ARGS]...", "")


@pytest.mark.parametrize("command", [*COMMANDS, *GROUPED])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has an example that begins with itself."""
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"Example: burnish {command}" in capsys.readouterr().out


def test_nothing_is_help_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Both end well."""
    assert cli.main([]) == 0
    assert "Usage: burnish" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("burnish 0.")


def test_recipes_are_listed_with_their_header(capsys: pytest.CaptureFixture[str]) -> None:
    """Command, hardware, time, result of each."""
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    names = [line.split(" (")[0] for line in out.splitlines() if line and line[0] != " "]
    assert names == sorted(path.stem for path in recipes.RECIPES.glob("*.yaml"))
    assert {"miniature", "judges", "hacking"} <= set(names)
    for word in ("burnish ", "Hardware: ", "Time: ", "Result: "):
        assert out.count(f"    {word}") >= len(names)


@pytest.mark.parametrize("name", sorted(recipes.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_has_its_own_name(name: Path) -> None:
    """Every recipe that ships."""
    from burnish.config import load
    from burnish.run_config import RunConfig

    assert load(RunConfig, name).name == name.stem


# --- Bad input -------------------------------------------------------------------------------


def test_a_category_without_weights_is_refused(refused: Refused) -> None:
    """Before anything runs, by the categories of the prompts."""
    weights = {"alignment": 1.0, "quality": 0.0, "portrait": 0.0}
    said = refused(
        "grpo",
        *(f"stages.teacher.rewards.{name}.weights={{general: {n}}}" for name, n in weights.items()),
    )
    assert "stages.teacher.rewards: need weights of category 'portrait' that sum to 1" in said
    assert "got alignment 0, quality 0, portrait 0" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("rnu smoke", "Did you mean 'run'; see burnish --help"),
        ("run", "Missing argument 'recipe'; see burnish run --help"),
        ("run smoke --fast", "No such option: --fast"),
        ("run smokey", "got 'smokey'; did you mean 'smoke'?"),
        ("run quite-another", "the recipes are categories, curation"),
        ("run none.yaml", "none.yaml does not exist"),
        ("run smoke stages.student.step=3", "did you mean `stages.student.steps`?"),
        ("run smoke seed", "need key=value, got 'seed'"),
        ("curate miniature t2i_techer", "did you mean 't2i_teacher'?"),
        ("curate miniature student", "need a stage with rewards, got 'student'"),
        ("curate miniature t2i_teacher --keep tp=1", "did you mean `top`?"),
        ("study", "need a study, got none; the studies are categories, curation"),
        ("study judgs", "got 'judgs'; did you mean 'judges'?"),
        ("study smoke", "need a recipe with `study:`, got smoke"),
        ("study judges --all", "need --all alone, got more"),
        ("study judges seed=1", "set study.seeds=[0,1,2]"),
        ("study judges study.seeds=[-1]", "study.seeds"),
        ("study judges study.seeds=[0,0]", "need seeds that differ, got [0, 0]"),
        ("run smoke stages.t2i_techer.steps=2", "did you mean `stages.t2i_teacher`?"),
        ("run smoke judge={}", "judge"),
        (
            "run smoke evaluation.knowledge=embedded:prompts/held-out.jsonl",
            "evaluation.knowledge: need other ids than those of evaluation.prompts",
        ),
        (
            'study distillation study.compare=[{"arm":"ties","over":"sum","categories":["x"]}]',
            "need categories of the measured prompts (general, landscape, portrait, typography)",
        ),
        ("run smoke stages.t2i_teacher.rollout.window=2", "set rollout.window=0"),
        ("grpo stages.teacher.rollout.kernel=cps", "set rollout.noise_level=0.3"),
        ("grpo stages.teacher.rollout.kernel=dance", "set rollout.noise_level=0.3"),
        ("grpo stages.teacher.rollout.window_steps=[2,1]", "need window_steps in order"),
        ("grpo stages.teacher.rollout.window_steps=[0,1,2]", "set rollout.window=3"),
        ("run smoke stages.student.rollout.guidance_scale=3", "rollout.guidance_scale=1"),
        (
            "run smoke stages.student.rollout.negative_prompt=ugly",
            "stages.student: need rollout.guidance_scale other than 1 for a negative_prompt",
        ),
        (
            'run smoke stages.student.rewards={"truth":{"kind":"oracle"}}',
            "stages.student: need no rewards for distill, got some",
        ),
        (
            "grpo stages.teacher.rollout.window_steps=[0,3] "
            "stages.teacher.rollout.window_start=sliding",
            "stages.teacher: need a window that can move for rollout.window_start=sliding",
        ),
        ("run smoke stages.t2i_teacher.lora={targets:[to_q,to_kk]}", "did you mean 'to_k'?"),
        ("run smoke stages.t2i_teacher.prompts.categories=[portrat]", "did you mean 'portrait'?"),
        ("grpo stages.teacher.rollout.kernel=ode", "rollout.kernel=precise"),
        ("nft stages.teacher.rewards={}", "need at least one reward for nft"),
        ("grpo stages.teacher.algorithm.kind=ppo", "need one of"),
        (
            "run smoke stages.t2i_teacher.rewards.alignmnt.floor=0.1",
            "did you mean `stages.t2i_teacher.rewards.alignment`? Else choose one of them",
        ),
        ("nft policy.aspects=[16/9]", "policy.aspects: need an aspect of width to height"),
        ("nft policy.aspects=[]", "policy.aspects: need"),
        ("nft policy.aspects=[1:1,4:3]", "policy.aspects: need aspects that differ at 64 pixels"),
        ("nft policy.path=missing", "policy.path: need a folder"),
        ("nft policy.resolution=65", "policy.resolution: need a multiple of 32, got 65"),
        ("nft policy.resolution=100000", "policy.resolution: need less than or equal to 4096"),
        ("nft name=../../evil", "name: need"),
        ("nft seed=-1", "seed: need"),
        ("nft runtime.threads=0", "runtime.threads: need"),
        ("nft stages={}", "stages: need at least 1 entry, got {}"),
        ("nft stages.teacher.prompts.limit=0", "prompts.limit: need"),
        ("nft stages.teacher.prompts.tasks=[]", "prompts.tasks: need"),
        ("nft stages.teacher.start=teachr", "need stages that come before 'teacher'"),
        ("run smoke benches.t2i.kind=minature", "did you mean"),
        (
            'run smoke benches={"b":{"kind":"geneval","checkout":"missing"}}',
            "benches.b: missing/prompts",
        ),
        ('run smoke benches={"a/b":{"kind":"miniature"}}', "need a bench name"),
        ("run smoke arena.raters.count=0", "arena.raters.count: need"),
        ("bench run minature runs/x", "got 'minature'"),
        ("bench run miniature missing", "missing"),
        ("bench run miniature base=missing", "got missing; check the path"),
        ('bench run {"kind":"miniature","task":"t2j"} base=missing', "bench.task: need"),
        ("bench run missing.yaml base=missing", "missing.yaml does not exist"),
        ("bench read miniature missing", "got Miniature; judge the pictures"),
        ("arena judge missing --judge {}", "url: need a value"),
        ("report .", "without run.json"),
        ("job . train/teacher", "without run.json"),
        ("sample cat --model missing", "got missing; check the path"),
        ("sample cat --resolution 40", "--resolution: need a multiple of 32, got 40; take 32"),
        ("sample cat --aspect 16x9", "--aspect: need an aspect of width to height"),
        ("merge tise a b", "METHOD: need one of average, task_arithmetic, ties, lora"),
        (f"run smoke --out {__file__}", "--out: need a folder, got the file"),
        ("sample cat --steps 0", "Invalid value for '--steps'"),
        ("sample cat --out cat.jpg", "ends in .png, got cat.jpg"),
        ("sample cat --source missing.png", "got missing.png: No such file"),
        ("miniature biuld", "Did you mean 'build'"),
        ("reward train", "path: need a value, got none"),
        ("reward train path=missing annotations=[]", "annotations: need at least one file"),
        ("reward train path=. annotations=[{path:missing.jsonl}]", "missing.jsonl"),
        ("reward train path=. annotations=[] los=pairwise", "did you mean `loss`?"),
        ("reward report missing annotations=[]", "need the folder of a judge"),
        ("reward report . limti=3", "did you mean `limit`?"),
        ("reward serve missing", "need the folder of a judge"),
    ],
)
def test_bad_words_are_refused(arguments: str, words: str, refused: Refused) -> None:
    """Commands, options, recipes, keys, combinations, paths."""
    assert words in refused(*arguments.split())


def test_a_mistyped_category_is_not_taken_for_another_one(refused: Refused) -> None:
    weights = {"alignment": (0.6, 0.4), "quality": (0.4, 0.3), "portrait": (0.0, 0.3)}
    said = refused(
        "grpo",
        *(
            f"stages.teacher.rewards.{name}.weights={{default: {every}, portriat: {own}}}"
            for name, (every, own) in weights.items()
        ),
    )
    assert "got 'portriat'; did you mean 'portrait'?" in said


def test_teachers_must_be_given(refused: Refused, model: Path) -> None:
    """The recipe of distillation has none of its own, and says which key wants one."""
    said = refused("distill", f"policy.path={model}")
    assert "pass stages.student.algorithm.teachers.t2i.path=DIR" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a cat"', "need one JSON object a line"),
        ('{"txt": "a cat"}', 'need an object with a "text"'),
        ('{"text": "a cat", "categry": "x"}', "did you mean 'category'?"),
        ('{"text": "brighter", "source": "cut.png"}', "need a whole PNG"),
        ('{"text": "brighter", "source": "none.png"}', "none.png: No such file"),
    ],
)
def test_a_broken_prompt_is_named_by_line(
    line: str, words: str, refused: Refused, recipe: Path, prompts: Path
) -> None:
    """Before a folder is made."""
    Image.effect_noise((64, 64), 50).save(prompts.with_name("whole.png"))
    prompts.with_name("cut.png").write_bytes(prompts.with_name("whole.png").read_bytes()[:900])
    with prompts.open("a") as file:
        file.write(line + "\n")
    said = refused("run", recipe)
    assert f"{prompts}:3: " in said and words in said


def test_prompts_that_are_trained_on_and_measured_are_told(recipe: Path, prompts: Path) -> None:
    with pytest.warns(ContaminationWarning, match="2 of the 2 prompts of evaluation.prompts are"):
        check_inputs(load(RunConfig, str(recipe), [f"evaluation.prompts={prompts}"]))


def test_prompts_must_fit_the_stages(refused: Refused, recipe: Path, model: Path) -> None:
    """A task without a teacher or prompts, and a step that wants more than there are."""
    edits = "stages.student.prompts.tasks=[edit]"
    assert "need a teacher for task 'edit'" in refused("run", recipe, edits)
    teacher = f"stages.student.algorithm.teachers.edit={{path: {model}, guidance_scale: 3.0}}"
    assert "none in" in refused("run", recipe, teacher, edits)
    without = f"stages.student.algorithm.teachers.t2i={{path: {model}}}"
    assert "need the guidance scale" in refused("run", recipe, without)
    said = refused("run", recipe, "stages.student.prompts_per_step=3")
    assert "stages.student.prompts_per_step: need at least 3 prompts" in said


def test_a_teacher_of_another_schedule_is_refused_before_anything_is_loaded(
    refused: Refused, recipe: Path, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    place = other / "scheduler" / "scheduler_config.json"
    settings = json.loads(place.read_text())
    place.write_text(json.dumps({**settings, "shift": 9.0}))
    said = refused("run", recipe, f"stages.student.algorithm.teachers.t2i.path={other}")
    assert "got another scheduler in" in said and "(shift)" in said


@pytest.mark.parametrize(
    ("kind", "words"),
    [("text", "of something else"), ("cut", "need a whole"), ("large", "need at most")],
)
def test_a_bad_source_is_refused(kind: str, words: str, refused: Refused, tmp_path: Path) -> None:
    """Not an image, truncated, too many pixels."""
    path = tmp_path / "source.png"
    side = 8000 if kind == "large" else 64
    Image.new("1", (side, side)).save(path)
    whole = path.read_bytes()
    data = {"text": b"no image", "cut": whole[: len(whole) // 2], "large": whole}[kind]
    path.write_bytes(data)
    assert words in refused("sample", "brighter", "--source", path)


def test_several_sources_are_given_one_after_the_other(refused: Refused, tmp_path: Path) -> None:
    """The embedded model reads as many as there may be, and no more."""
    drawn = []
    for name, colours in (("a", ("red", "blue")), ("b", ("blue", "red"))):
        given: list[Any] = []
        for colour in colours:
            path = tmp_path / f"{colour}.png"
            Image.new("RGB", (64, 64), colour).save(path)
            given += ["--source", path]
        out = tmp_path / f"out-{name}.png"
        options = ["--steps", "1", "--count", "1", "--resolution", "64", "--out", out]
        assert cli.main([str(word) for word in ("sample", "join them", *given, *options)]) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] != drawn[1]
    many = ["--source", tmp_path / "red.png"] * 9
    assert "need at most 8 source images" in refused("sample", "join them", *many)


def test_our_own_fault_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and the last line says whom to tell."""
    monkeypatch.setattr(recipes, "known_recipes", lambda: 1 // 0)
    assert cli.main(["recipes"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError" in err.splitlines()[-1]


def test_a_traceback_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For bad input too."""
    monkeypatch.setenv("BURNISH_TRACEBACK", "1")
    assert cli.main(["run", "smokey"]) == 2
    assert "Traceback" in capsys.readouterr().err


# --- Runs ------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run one after the other in this process."""

    def run_jobs(config: Any, folder: Path, *, force: bool = False) -> None:
        for job in launcher.pending(folder, config.jobs(), force=force):
            if (code := cli.main(["job", str(folder), job])) != 0:
                raise JobError(job, code)

    monkeypatch.setattr(launcher, "run_jobs", run_jobs)


def test_a_run_is_trained_measured_and_reported(
    recipe: Path, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then drawn with; a second start finds everything done, other settings are refused."""
    out = tmp_path / "run"
    assert cli.main(["run", str(recipe), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["folder"] == str(out) and Path(found["report"]).is_file()
    assert (out / "config.yaml").is_file() and found["summary"]["name"] == "tiny"
    page = (out / "report.html").read_text()
    assert "Bench: truth" in page and "Arena: text to image" in page
    for link in re.findall(r'href="([^"#][^"]*)"', page):
        # A name in the arena leads to the folder of its pictures.
        place = out / link
        assert place.is_dir() if link.endswith("/") else place.is_file(), link
    replies = next(out.glob("benches/student/truth/judged-*/replies-0.jsonl"))
    kept = (out / "stages" / "student" / "metrics.jsonl", replies)
    rows = [path.read_bytes() for path in kept]
    assert replies.read_text().count("\n") == 2
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    assert [path.read_bytes() for path in kept] == rows
    capsys.readouterr()
    assert cli.main(["run", str(recipe), "seed=1", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "belongs to another run (seed: 0 there, 1 here)" in said and said.count("\n") == 1
    picture = tmp_path / "picture.png"
    command = ["sample", "a cat", "a dog", "--count", "3", "--out", str(picture)]
    assert cli.main([*command, "--model", str(out / "student")]) == 0
    assert Image.open(picture).size == (3 * 64 + 4, 2 * 64 + 2)
    assert cli.main([*command, "--model", str(out)]) == 2
    assert f"take {out / 'student'}" in capsys.readouterr().err
    assert cli.main(["report", str(out)]) == 0


def test_a_study_that_was_cut_off_goes_on_with_its_next_seed(
    recipe: Path, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a longer list of seeds runs only those that are missing."""
    with recipe.open("a") as file:
        file.write("study: {question: 'Does it learn?', seeds: [3]}\n")
    out = tmp_path / "study"
    command = ["study", str(recipe), "--out", str(out), "--json"]
    assert cli.main(command) == 0
    first = (out / "seed-3" / "stages" / "student" / "metrics.jsonl").stat()
    capsys.readouterr()
    assert cli.main([*command, "study.seeds=[3,4]"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["studies"]
    assert found["seeds"] == [3, 4]
    stages = [out / f"seed-{seed}" / "stages" / "student" for seed in (3, 4)]
    assert (stages[0] / "metrics.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    # Settings that cannot be run do not take the place of what was.
    assert cli.main([*command, "stages.student.prompts.path=missing.jsonl"]) == 2
    assert "stages.student.prompts: need" in capsys.readouterr().err
    assert (stages[0] / "metrics.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    assert len({(stage / "metrics.jsonl").read_bytes() for stage in stages}) == 2
    assert (out / "study.md").read_text().startswith("# Does it learn?")
    assert all((out / f"seed-{seed}" / "report.html").is_file() for seed in (3, 4))


def test_a_study_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from burnish.cli import studies

    ran: list[str] = []

    def run(name: str, overrides: list[str], out: Path | None) -> dict[str, Any]:
        ran.append(name)
        if name == "curation":
            raise JobError("train/all: no space left", 1)
        return {"folder": name}

    monkeypatch.setattr(studies, "_study", run)
    assert cli.main(["study", "--all"]) == 1
    assert ran == studies.known_studies() and len(ran) > 8
    said = capsys.readouterr().err
    assert "burnish: curation: train/all: no space left" in said
    assert f"1 of {len(ran)} studies failed (curation)" in said


def test_prompts_are_curated_and_rewards_weighed(
    recipe: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rule selects again and draws nothing; what is printed is a setting of the stage."""
    plan = yaml.safe_load(recipe.read_text())
    stage = plan["stages"].pop("student")
    plan["stages"]["teacher"] = {
        **stage,
        "rollout": {**stage["rollout"], "group_size": 3, "guidance_scale": 2.0, "keep": "none"},
        "rewards": {"truth": {"kind": "oracle", "dimension": "quality"}},
        "algorithm": {"kind": "nft"},
        "prompts": {"path": "embedded:prompts/train.jsonl", "tasks": ["t2i"], "limit": 3},
    }
    recipe.write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "curated"
    command = ["curate", str(recipe), "teacher", "--out", str(out), "--keep"]
    assert cli.main([*command, "chance=null"]) == 0
    measured = (out / "profile-0.jsonl").read_bytes()
    said = capsys.readouterr().out
    assert f"stages.teacher.prompts.path={out / 'kept.jsonl'}" in said
    page = (out / "curation.html").read_text()
    assert page.count("<circle") == page.count('class="kept"') == 3 and "<script" not in page
    assert cli.main([*command, "min_range=100"]) == 2
    assert "the quantiles of their ranges are 0%" in capsys.readouterr().err
    assert (out / "profile-0.jsonl").read_bytes() == measured
    assert cli.main(["calibrate", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("'stages.teacher.rewards.truth.weights={default: 1,")
    assert cli.main(["calibrate", str(tmp_path)]) == 2


def test_a_damaged_checkpoint_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One: the one before is taken, with a note. All: one line, exit code 2."""
    out = tmp_path / "run"
    monkeypatch.setattr(launcher, "run_jobs", lambda *_, **__: None)
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    command, stage = ["job", str(out), "train/student"], out / "stages" / "student"
    assert cli.main(command) == 0
    for damaged, code, words in ((2, 0, "falling back to the checkpoint of step 1"), (1, 2, "all")):
        (stage / "DONE").unlink(missing_ok=True)
        for step in range(damaged, 3):
            (stage / "checkpoints" / f"step-{step:06d}" / "policy.safetensors").write_bytes(b"x")
        capsys.readouterr()
        assert cli.main(command) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if "burnish: " in line]
        assert len(lines) == 1 and words in lines[0]
        assert lines[0].startswith(launcher.NOTE) == (code == 0)


def test_a_run_that_was_refused_late_leaves_nothing(
    recipe: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the corrected command would find the folder of another run."""

    def fail(*_: Any, **__: Any) -> None:
        raise JobError("train/student: need a, got b; do c", 2)

    monkeypatch.setattr(launcher, "run_jobs", fail)
    said = refused("run", recipe, "--out", "fresh")
    assert said == "burnish: train/student: need a, got b; do c\n"


@pytest.mark.parametrize(
    "rows",
    [
        "stages/student/metrics.jsonl",
        "curation/student/profile-0.jsonl",
        "benches/base/truth/pictures/pictures-0.jsonl",
        "benches/base/truth/judged-0/replies-1.jsonl",
    ],
)
def test_a_run_that_was_refused_late_keeps_what_took_time(
    rows: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fresh"

    def fail(*_: Any, **__: Any) -> None:
        (out / rows).parent.mkdir(parents=True)
        (out / rows).write_text("{}\n")
        raise JobError("train/student: need a, got b; do c", 2)

    monkeypatch.setattr(launcher, "run_jobs", fail)
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 2
    assert (out / rows).is_file() and (out / "run.json").is_file()


def test_a_run_that_was_stopped_says_how_to_go_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With the exit code for it, and its folder kept."""
    monkeypatch.setattr(launcher, "run_jobs", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["run", str(recipe), "--out", str(tmp_path / "run")]) == STOPPED
    said = "burnish: stopped; start the same command again to resume\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "run" / "run.json").is_file()


def test_the_doctor_says_what_to_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Exit code 1 where something is broken."""
    from burnish import machine

    missing = machine.examine(str(tmp_path))
    monkeypatch.setattr(machine, "examine", lambda: missing)
    assert cli.main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out and "burnish miniature build" in out and "recipe smoke" in out
    findings = json.loads(out.splitlines()[-1])["findings"]
    assert {"torch", "torchvision", "cores", "free disk"} <= {f["name"] for f in findings}
    assert machine._drawing(str(model)).found == "loads and draws"


def test_the_doctor_plans_a_recipe(recipe: Path, capsys: Any) -> None:
    """Every part of every stage, and a device that is too small is refused by the largest."""
    assert cli.main(["doctor", "--recipe", str(recipe), "--json"]) == 0
    out = capsys.readouterr().out
    assert "student (cpu)" in out and "optimizer state" in out and "teacher in use" in out
    plan, evaluation = json.loads(out.splitlines()[-1])["plans"]
    assert plan["needed"] < plan["available"]
    assert "evaluation (cpu)" in out and evaluation["key"] == "evaluation"
    assert {"drawing a micro-batch"} <= {p["name"] for p in evaluation["parts"]}
    assert not {"gradients", "optimizer state"} & {p["name"] for p in evaluation["parts"]}
    assert {"gradients", "activations, forward and backward"} <= {p["name"] for p in plan["parts"]}
    given = ["doctor", "--recipe", str(recipe), "runtime.device=cuda", "--memory", "0.5"]
    assert cli.main([*given, "--devices", "2"]) == 2
    assert "need policy.share_prefix=false" in capsys.readouterr().err
    assert cli.main([*given, "policy.share_prefix=false", "--devices", "2"]) == 2
    shown = capsys.readouterr()
    assert "student (cuda, each of 2 devices)" in shown.out and "gathered block" in shown.out
    assert "need 1.0" in shown.err and "got 512.0 MiB" in shown.err
    # So many as the recipe says, where nobody says another number.
    own = ["policy.share_prefix=false", "runtime.processes=2", "runtime.sharding=full"]
    assert cli.main([*given, *own]) == 2
    assert capsys.readouterr() == shown
    for alone in ("seed=1", "--fit", "--memory=8", "--devices=2"):
        assert cli.main(["doctor", alone]) == 2
        assert "name a recipe" in capsys.readouterr().err


def test_the_doctor_plans_for_a_number_of_bytes(recipe: Path, capsys: Any) -> None:
    assert cli.main(["doctor", "--recipe", str(recipe), "--memory", "inf"]) == 2
    assert "--memory: need a number of GiB, got inf" in capsys.readouterr().err


def test_the_doctor_reads_a_recipe_as_a_run_does(recipe: Path, capsys: Any) -> None:
    """What is wrong is one line there, too."""
    given = ["doctor", "--recipe", str(recipe), "--memory", "80"]
    judge = "{kind: vlm, path: embedded:weights/judge, dimension: alignmnt, device: cuda}"
    assert cli.main([*given, f"judge={judge}"]) == 2
    assert "judge: need a dimension of this judge" in capsys.readouterr().err
    right = judge.replace("alignmnt", "alignment")
    assert cli.main([*given, f"judge={right}"]) == 2
    assert "judge: need a run on a GPU for device=cuda" in capsys.readouterr().err
    assert cli.main([*given, f"judge={right}", "runtime.device=cuda"]) == 0
    assert cli.main([*given[:-2], "runtime.device=cuda"]) == 2
    assert "add --memory GiB" in capsys.readouterr().err


def test_the_doctor_finds_the_largest_micro_batches(recipe: Path, capsys: Any) -> None:
    """What it finds fits; twice as many pictures do not."""
    limit = 0.79
    given = ["doctor", "--recipe", str(recipe), "--memory", str(limit), "--json"]
    assert cli.main([*given, "--fit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["micro_batches"]
    assert lines[:-1] == [f"{key}={size}" for key, size in found.items()]
    names = ("stages.student.rollout", "stages.student.optimizer", "evaluation")
    assert set(found) == {f"{name}.micro_batch" for name in names}
    assert cli.main([*given, *lines[:-1]]) == 0
    capsys.readouterr()
    twice = 2 * found["evaluation.micro_batch"]
    assert cli.main([*given, *lines[:-1], f"evaluation.micro_batch={twice}"]) == 2
    assert "lower evaluation.micro_batch" in capsys.readouterr().err
    assert cli.main(["doctor", "--recipe", str(recipe), "--memory", "0.1", "--fit"]) == 2
    assert "for one at a time, got 102.4 MiB" in capsys.readouterr().err


def test_too_little_memory_is_no_fault_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a device or of the machine: one line that tells what to change."""
    import torch

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    others = RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
    for error in (gpu, cpu, MemoryError(), *others):
        assert program._explained(error) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--fit" in said and "a fault of" not in said
    assert program._explained(RuntimeError("else")) == 1


def test_a_run_that_does_not_fit_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With its plan, and before a file is written; who knows better may start it."""
    from burnish import runtime

    monkeypatch.setattr(runtime, "memory", lambda device: 1 << 20)
    given = ["run", str(recipe), "--out", str(tmp_path / "run"), "--prepare"]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert "stages.student: need" in said and "got 1.0 MiB" in said
    assert "optimizer state" in said
    assert not (tmp_path / "run").exists()
    assert cli.main([*given, "runtime.check_memory=false"]) == 0
    monkeypatch.undo()
    assert cli.main(given) == 0


def test_a_run_is_prepared_and_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its jobs are told in their order, those of several processes as torchrun starts them."""
    out = tmp_path / "run"
    own = ["runtime.processes=2", "runtime.device=cpu", "--out", str(out), "--prepare"]
    assert cli.main(["run", "smoke", *own, "--json"]) == 0
    *lines, told = capsys.readouterr().out.splitlines()
    jobs = json.loads(told)["jobs"]
    assert [shlex.split(line) for line in lines] == list(jobs.values())
    assert next(iter(jobs)) == "train/t2i_teacher" and "--nproc-per-node" in jobs["train/student"]
    assert "torch.distributed.run" not in jobs["measure/base"]
    assert (out / "run.json").is_file() and not (out / "stages").exists()
    assert cli.main(["run", "smoke", *own, "--force"]) == 2
    assert "need --prepare or --force, got both" in capsys.readouterr().err


def test_a_size_or_a_scale_that_a_folder_cannot_draw_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from burnish.shelves import policy_class

    for family in ("stable_diffusion3", "flux2_klein", "qwen_image_edit"):
        policy_class(family).tiny().save(tmp_path / family)
    index = tmp_path / "flux2_klein" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    for asked, said in (
        (["stable_diffusion3"], "need sides of at most"),
        (["flux2_klein", "--guidance-scale", "4"], "need guidance_scale=1"),
        (["qwen_image_edit"], "got t2i; add --source IMAGE"),
    ):
        model = str(tmp_path / asked[0])
        assert cli.main(["sample", "a cat", "--model", model, *asked[1:]]) == 2
        assert said in capsys.readouterr().err
    # Without being told, it is drawn as it can be.
    out = tmp_path / "cat.png"
    own = ["--resolution", "64", "--steps", "1", "--count", "1", "--out", str(out)]
    assert cli.main(["sample", "a cat", "--model", str(tmp_path / "flux2_klein"), *own]) == 0
    assert out.is_file()
    assert cli.main(["sample", "a cat", "--guidance-scale", "0.5"]) == 2


def test_jobs_get_a_core_or_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than there are jobs, and each told its share."""
    import torch

    from burnish import runtime

    cpu = runtime.RuntimeConfig(device="cpu")
    monkeypatch.setattr(runtime, "usable_cores", lambda: 4)
    many = [f"train/{number}" for number in range(9)]
    assert [p["OMP_NUM_THREADS"] for p in launcher.environments(cpu, many)] == ["1"] * 4
    assert len(launcher.environments(cpu, many[:3])) == 3
    two = launcher.environments(runtime.RuntimeConfig(device="cpu", threads=2), many)
    assert [p["OMP_NUM_THREADS"] for p in two] == ["2", "2"]
    assert "OMP_NUM_THREADS" not in launcher.environments(cpu, many[:1])[0]
    # Training has processes of its own, measuring has one.
    pairs = runtime.RuntimeConfig(device="cpu", processes=2)
    assert len(launcher.environments(pairs, many)) == 2
    assert len(launcher.environments(pairs, ["measure/base", "measure/a", "measure/b"])) == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = launcher.environments(runtime.RuntimeConfig(), many)
    assert gpus == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert launcher.environments(runtime.RuntimeConfig(), many)[1] == {"CUDA_VISIBLE_DEVICES": "5"}


def test_what_depends_on_a_new_result_is_made_again(tmp_path: Path) -> None:
    """As a build tool would; force means everything."""
    jobs = {"train/a": (), "train/b": ("train/a",), "measure/base": (), "measure/b": ("train/b",)}
    for job in jobs:
        folder = tmp_path / job.replace("train/", "stages/").replace("measure/", "evaluation/")
        folder.mkdir(parents=True)
        (folder / "DONE").touch()
    assert launcher.pending(tmp_path, jobs) == {}
    (tmp_path / "stages" / "a" / "DONE").unlink()
    assert list(launcher.pending(tmp_path, jobs)) == ["train/a", "train/b", "measure/b"]
    assert launcher.pending(tmp_path, jobs, force=True) == jobs


# --- Processes -------------------------------------------------------------------------------

CHILD = """
import signal, sys, time
from pathlib import Path
from burnish.launcher import follow_launcher

follow_launcher()
folder, job, plan = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
with (folder / "events").open("a") as file:
    print("start", job, file=file)
print(f"{job}: 1/2, 3 s, 3 s left", file=sys.stderr)
if "note" in plan:
    print("burnish: note: look here", file=sys.stderr)
if "fail" in plan:
    time.sleep(1)
    sys.exit("something before\\nburnish: need a, got b; do c")
if "together" in plan:
    # As torchrun tells of one process that refuses its input, and of another that it leaves.
    sys.exit("burnish: need a, got b\\nburnish: connection closed\\n  exitcode  : 2 (pid: 7) \\n")
if "killed" in plan:
    sys.exit("burnish: connection closed\\nexitcode  : -15 (pid: 7)\\nexitcode  : -9 (pid: 8)\\n")
if "torn" in plan:
    # As torchrun ends when it is asked to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SignalException"))
if "deaf" in plan:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"{job}.ready").touch()
time.sleep(60 if {"sleep", "torn", "deaf"}.intersection(plan) else 0.3)
with (folder / "events").open("a") as file:
    print("end", job, file=file)
"""

PARENT = """
import signal
# A test session in the background ignores SIGINT and would hand that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys
from pathlib import Path
from burnish.launcher import Stopped, launch

folder = Path(sys.argv[1])
try:
    launch(
        {"one": (), "two": ()},
        command=lambda job: [sys.executable, folder / "child.py", folder, job, sys.argv[2]],
        log_file=lambda job: folder / f"{job}.txt",
        environments=[{}, {}],
    )
except Stopped:
    sys.exit(75)
"""

Launch = Callable[..., None]


@pytest.fixture
def launched(tmp_path: Path) -> Launch:
    """Launch jobs that only sleep; keywords say what else each one does."""
    (tmp_path / "child.py").write_text(CHILD)

    def run(jobs: dict[str, tuple[str, ...]], count: int = 2, **plans: str) -> None:
        launch(
            jobs,
            command=lambda job: [
                sys.executable,
                str(tmp_path / "child.py"),
                str(tmp_path),
                job,
                plans.get(job, ""),
            ],
            log_file=lambda job: tmp_path / "logs" / job,
            environments=[{"PLACE": str(place)} for place in range(count)],
        )

    return run


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A launcher in a process of its own, with two children that are up."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    started: list[subprocess.Popen[str]] = []

    def start(plan: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path), plan]
        started.append(subprocess.Popen(command, text=True))
        wait_for(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        assert len(children(tmp_path)) == 2
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def children(folder: Path) -> list[int]:
    """The processes that run a child of the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder / "child.py").encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(is_so: Callable[[], bool], seconds: float = 120) -> None:
    """Until something holds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_wait_for_their_input(
    launched: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two at once, the third when its two are done, the fourth as soon as there is a place."""
    launched({"a": (), "b": (), "c": ("a", "b"), "d": ("done before",)}, a="note")
    events = (tmp_path / "events").read_text().splitlines()
    assert set(events[:2]) == {"start a", "start b"}
    assert max(events.index("end a"), events.index("end b")) < events.index("start c")
    assert len(events) == 8
    assert (tmp_path / "logs" / "a").read_text().startswith("a: 1/2")
    assert capsys.readouterr().err == "burnish: a: look here\n"


def test_a_failure_ends_the_others(launched: Launch, tmp_path: Path) -> None:
    """What waits is not started, and the error is the job's last."""
    with pytest.raises(JobError, match=r"^b: need a, got b; do c; all it said is in ") as caught:
        launched({"a": (), "b": (), "c": ("b",)}, a="sleep", b="fail")
    assert caught.value.exit_code == 1
    assert not children(tmp_path)
    assert "start c" not in (tmp_path / "events").read_text()


def test_of_several_processes_the_first_error_counts(launched: Launch) -> None:
    """And its exit code, which torchrun only tells of."""
    with pytest.raises(JobError, match=r"^a: need a, got b$") as caught:
        launched({"a": ()}, a="together")
    assert caught.value.exit_code == 2


def test_of_several_processes_the_killed_one_is_told(launched: Launch) -> None:
    """And not what the others say of their lost connection."""
    with pytest.raises(JobError, match=r"^a: the process was killed by SIGKILL") as caught:
        launched({"a": ()}, a="killed")
    assert caught.value.exit_code == 1


@contextlib.contextmanager
def signalled(place: Path, number: signal.Signals) -> Iterator[None]:
    """Send the child of a job `a` a signal as soon as it runs."""

    def send() -> None:
        wait_for(lambda: (place / "a.ready").exists())
        os.kill(children(place)[0], number)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


def test_a_killed_job_is_told(launched: Launch, tmp_path: Path) -> None:
    """As the system does when memory runs out."""
    with (
        signalled(tmp_path, signal.SIGKILL),
        pytest.raises(JobError, match="killed by SIGKILL") as caught,
    ):
        launched({"a": ()}, a="sleep")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(
    number: signal.Signals, parent: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Exit code 75, and nobody is left."""
    process = parent("sleep")
    process.send_signal(number)
    assert process.wait(30) == STOPPED
    assert not children(tmp_path)


@pytest.mark.parametrize("plan", ["sleep", "torn"])
def test_a_signal_to_all_processes_is_no_failure(
    plan: str, parent: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As schedulers stop a job: children end by it, or with an error, before they are asked to."""
    process = parent(plan)
    # Held, so that both children have ended when it hears of it.
    process.send_signal(signal.SIGSTOP)
    for number in (process.pid, *children(tmp_path)):
        os.kill(number, signal.SIGTERM)
    wait_for(lambda: not children(tmp_path))
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == STOPPED


def test_a_child_that_was_asked_to_stop_stops_the_others(launched: Launch, tmp_path: Path) -> None:
    """Also before it can answer, as it loads libraries."""
    with signalled(tmp_path, signal.SIGTERM), pytest.raises(Stopped):
        launched({"a": ()}, a="sleep")


def test_children_do_not_outlive_a_killed_launcher(
    parent: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Not even children that do not listen."""
    parent("deaf").kill()
    wait_for(lambda: not children(tmp_path), 20)
