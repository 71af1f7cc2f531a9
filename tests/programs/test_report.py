"""The summary and the page of a run, from a small fake run with planted gains."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from burnish import images, report
from burnish.config import parse
from burnish.contamination import contamination
from burnish.evaluation import HEADLINE, Row
from burnish.pages.charts import chart
from burnish.pages.galleries import MAX_BYTES
from burnish.prompts import write_prompts
from burnish.report import write_report
from burnish.run_config import BASE, BEST_OF, UNGUIDED, RunConfig
from burnish.run_folder import all_scores
from burnish.summary import KNOWLEDGE, Cells, ratio, read_run, summarise, write_summary
from burnish.tables import cost_table, table
from burnish.tracking import Run, read_rows, write_rows
from burnish.types import Prompt

CATEGORIES = ("general", "portrait", "landscape", "typography")
GAINS = {
    BASE: {"t2i": 0.0, "edit": 0.0},
    UNGUIDED: {"t2i": -0.15, "edit": -0.1},
    "t2i-teacher": {"t2i": 0.2},
    "edit-teacher": {"edit": 0.12},
    "student": {"t2i": 0.19, "edit": 0.114},
}
"""Planted gains over the base; the student keeps 95 % of each teacher's."""
DISTANCE = 0.3
TRAIN = "embedded:prompts/train.jsonl"
EVIL = '<script>alert("x")</script> & a "fox"'


def picture(seed: int, side: int = 32) -> Image.Image:
    """Squares of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(side // 4, 0).repeat(side // 4, 1))


def stage(kind: str, tasks: list[str], **more: Any) -> dict[str, Any]:
    """A stage as a recipe has it."""
    is_student = kind == "distill"
    return {
        "steps": 20,
        "prompts": {"path": TRAIN, "tasks": tasks},
        "rollout": {
            "window": 0,
            "keep": 4 if is_student else "none",
            "guidance_scale": 1.0 if is_student else 3.0,
        },
        "rewards": {} if is_student else {"truth": {"kind": "oracle"}},
        "algorithm": {"kind": kind, **more},
    }


def make_config(folder: Path, *, has_student: bool = True) -> RunConfig:
    """Two teachers and, unless told otherwise, their student."""
    stages = {"t2i-teacher": stage("nft", ["t2i"]), "edit-teacher": stage("nft", ["edit"])}
    if has_student:
        taught = {task: {"path": f"stage:{task}-teacher"} for task in ("t2i", "edit")}
        stages["student"] = stage("distill", ["t2i", "edit"], teachers=taught)
    sets = {"prompts": "held-out.jsonl", "knowledge": "knowledge.jsonl"}
    data = {
        "name": "fake-run",
        "stages": stages,
        "evaluation": {key: str(folder / "sets" / name) for key, name in sets.items()},
        "judge": {"kind": "oracle"},
    }
    return parse(RunConfig, data)


def sources(number: int) -> tuple[bytes, ...]:
    """One, three or seven."""
    count = {0: 3, 1: 7}.get(number, 1)
    return tuple(images.encode_png(picture(number + 100 * place)) for place in range(count))


def make_prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Held-out prompts of both tasks, one of them hostile, and knowledge prompts."""
    held_out = [
        Prompt(
            id=f"{task}-{n}",
            text=EVIL if n == 0 else f"prompt {n} of {task}: a small red fox beside two blue trees",
            task=task,
            category=CATEGORIES[n % 4],
            # Some with three, some with seven.
            sources=sources(n) if task == "edit" else (),
        )
        for task in ("t2i", "edit")
        for n in range(48)
    ]
    knowledge = [
        Prompt(
            id=f"known-{n}", text=f"a picture of Mara {n}", category="portrait", tags=("person",)
        )
        for n in range(16)
    ]
    return held_out, knowledge


def score_rows(policy: str, held_out: list[Prompt], knowledge: list[Prompt]) -> list[Row]:
    """Scores around the planted means: prompts differ, and all policies find the same ones hard."""
    rows: list[Row] = []
    for n, prompt in enumerate([*held_out, *knowledge]):
        ease = np.random.default_rng(n).normal(0.5, 0.1)
        rng = np.random.default_rng([n, *policy.encode()])
        common = {"policy": policy, "prompt": prompt.id, "task": prompt.task}
        common["category"] = prompt.category
        if policy == BEST_OF:
            offsets = [DISTANCE, *[-DISTANCE / 15] * 15]
            values = {"composite": [ease + x for x in offsets]} if prompt in held_out else {}
        elif prompt.task not in GAINS[policy]:
            continue
        elif prompt in held_out:
            drawn = ease + GAINS[policy][prompt.task] + rng.normal(0, 0.03, 2)
            values = {"composite": drawn, "quality": drawn}
        else:
            # Forgetting of one point, which must not reach the headline.
            likeness = 0.8 - (0.01 if policy == "student" else 0) + rng.normal(0, 0.01)
            values = {"composite": [0.0], "likeness": [likeness]}
        rows += [
            {**common, "seed": seed, "metric": metric, "value": float(value)}
            for metric, found in values.items()
            for seed, value in enumerate(found)
        ]
    return rows


def make_run(root: Path, *, has_student: bool = True, without: tuple[str, ...] = ()) -> Path:
    """A finished run folder, but for the policies in `without`."""
    config, folder = make_config(root, has_student=has_student), root / "run"
    held_out, knowledge = make_prompts()
    write_prompts(root / "sets" / "held-out.jsonl", held_out)
    write_prompts(root / "sets" / "knowledge.jsonl", knowledge)
    Run.create(folder, config, command="burnish run fake")
    for name, plan in config.stages.items():
        if name in without:
            continue
        run = Run.create(folder / "stages" / name, plan)
        for step in range(plan.steps):
            fall = float(np.exp(-step / 6))
            metrics: dict[str, Any] = {"data/images": 100.0, "reward/mean": 0.7 - 0.2 * fall}
            if name == "student":
                task = ("t2i", "edit")[step % 2]
                metrics = {"data/images": 50.0, "distill/gap_share": 0.1 * fall, "loss": fall}
                metrics |= {f"teacher/is_{t}": float(t == task) for t in ("t2i", "edit")}
            times = {"time/rollout": 3.0, "time/credit": 1.0, "time/update": 2.0}
            run.log(step, metrics | times)
        (run.folder / "DONE").touch()
    for name in (*GAINS, BEST_OF):
        if name in without or (name == "student" and not has_student):
            continue
        place = folder / "evaluation" / name
        write_rows(place / "scores.jsonl", score_rows(name, held_out, knowledge))
        (place / "pictures").mkdir()
        for n, prompt in enumerate([*held_out, *knowledge]):
            if name != BEST_OF and prompt.task in GAINS[name]:
                file = place / "pictures" / f"{prompt.id}.webp"
                file.write_bytes(images.encode_webp(picture(n), quality=None))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished fake run."""
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def summary(run_folder: Path) -> dict[str, Any]:
    """Its numbers."""
    return write_summary(run_folder)


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    """Its page."""
    return write_report(run_folder).read_text(encoding="utf-8")


def covers(number: dict[str, Any], truth: float) -> bool:
    """Whether a number's interval holds the truth, and its mean the interval."""
    return (
        number["low"] <= number["mean"] <= number["high"]
        and number["low"] <= truth <= number["high"]
    )


def test_the_planted_gains_are_found(summary: dict[str, Any]) -> None:
    """Mean and interval of every gain, and its share of the way to the best."""
    assert len(summary["results"]) == 8
    for result in summary["results"]:
        policy, task = result["policy"], result["task"]
        planted = GAINS[policy][task]
        assert result["score"]["num_prompts"] == 48
        assert result["is_valid"] is True
        if policy == BASE:
            assert result["gain"] is None and result["share_of_best"] is None
            continue
        assert covers(result["gain"], planted)
        assert covers(result["share_of_best"], planted / DISTANCE)
        # Paired by prompt: the prompts' own spread of 0.1 is not in the interval.
        assert result["gain"]["high"] - result["gain"]["low"] < 0.02


def test_the_distance_to_the_best_is_exact(summary: dict[str, Any]) -> None:
    """It was planted without noise."""
    for space in summary["headroom"]:
        assert space["distance"]["mean"] == pytest.approx(DISTANCE)


def test_the_student_keeps_its_share(summary: dict[str, Any]) -> None:
    """Of both teachers, at half the evaluations."""
    assert {k["teacher"] for k in summary["distillation"]} == {"t2i-teacher", "edit-teacher"}
    assert all(covers(k["kept"], 0.95) for k in summary["distillation"])
    passes = {p["policy"]: p["evaluations_per_step"] for p in summary["policies"]}
    assert passes["student"] == passes[UNGUIDED] == 1
    assert passes["t2i-teacher"] == passes[BASE] == 2


def test_knowledge_is_told_in_points(summary: dict[str, Any]) -> None:
    """One point of 100 was planted, on knowledge prompts alone."""
    rows = {row["policy"]: row for row in summary["knowledge"]}
    assert set(rows) == {BASE, UNGUIDED, "t2i-teacher", "student"}
    assert covers(rows["student"]["points"], -1.0)
    assert rows["student"]["points"]["num_prompts"] == 16
    assert "likeness" not in {row["metric"] for row in summary["metrics"]}


def test_the_cost_is_counted(summary: dict[str, Any]) -> None:
    """Pictures, minutes and the gain for them."""
    teacher, _, student = summary["cost"]
    assert (teacher["images"], student["images"]) == (2000, 1000)
    assert teacher["minutes"]["rollout"] == pytest.approx(1.0)
    assert teacher["minutes"]["total"] == pytest.approx(2.0)
    assert covers(teacher["rates"][0]["per_1000_images"], 10.0)
    assert covers(teacher["rates"][0]["per_minute"], 10.0)
    assert [rate["task"] for rate in student["rates"]] == ["t2i", "edit"]


def test_pictures_that_chose_the_prompts_are_paid_for(tmp_path: Path) -> None:
    """As many as were trained on, so that each thousand gained half."""
    folder = make_run(tmp_path)
    data = read_run(folder).model_dump()
    data["stages"]["t2i-teacher"]["curation"] = {}
    config = parse(RunConfig, data)
    plain = summarise(read_run(folder), folder, all_scores(config, folder))
    rows = [{"prompt": f"p-{n}", "scores": {"truth": [0.5] * 20}} for n in range(100)]
    write_rows(folder / "curation" / "t2i-teacher" / "profile-0.jsonl", rows)
    found = summarise(config, folder, all_scores(config, folder))
    before, after = (one["cost"][0]["rates"][0]["per_1000_images"] for one in (plain, found))
    assert after["mean"] == pytest.approx(before["mean"] / 2)
    assert found["cost"][0]["curated"] == 2000 and found["cost"][1]["curated"] == 0
    assert "2,000 + 2,000" in printed(cost_table(found))


def test_a_category_without_a_name_is_one() -> None:
    rows: list[Row] = [
        {"policy": BASE, "prompt": f"p-{n}", "task": "t2i", "category": ("", "portrait")[n % 2]}
        | {"seed": 0, "metric": HEADLINE, "value": float(n % 2)}
        for n in range(8)
    ]
    cells = Cells(rows, frozenset())
    scores = [cells.score(BASE, "t2i", HEADLINE, category=one) for one in ("", "portrait", None)]
    assert [score and score["mean"] for score in scores] == [0.0, 1.0, 0.5]
    assert set(cells.means(BASE, "t2i", "").values()) == {0.0}


def test_the_summary_is_written(summary: dict[str, Any], run_folder: Path) -> None:
    """As JSON without NaN, and nothing is missing."""

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    text = (run_folder / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == summary
    assert summary["missing"] == []
    assert summary["oracle_stages"] == ["t2i-teacher", "edit-teacher"]


def printed(*tables: Any) -> str:
    """Tables as a wide terminal shows them."""
    console = Console(width=160)
    with console.capture() as capture:
        for one in tables:
            console.print(one)
    return capture.get()


def test_the_tables_hold_the_numbers(summary: dict[str, Any]) -> None:
    """Scores, gains and shares, the knowledge, the cost."""
    text = printed(table(summary), cost_table(summary))
    for words in ("t2i-teacher", "gain over base", "to best-16", "likeness", "2,000", " 2.0 "):
        assert words in text
    assert "missing" not in text


def test_a_ratio_needs_a_bottom_that_is_clear_of_zero() -> None:
    """A share of nothing has no size."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 50)
    assert ratio(list(noise), list(noise - noise.mean())) is None
    assert ratio([], []) is None
    bottom = rng.normal(0.2, 0.1, 200)
    found = ratio(list(0.9 * bottom + rng.normal(0, 0.05, 200)), list(bottom))
    assert found is not None and found.low < 0.9 < found.high
    assert found.high - found.low < 0.2


def test_the_page_holds_everything_itself(page: str) -> None:
    """No address, no script, and no picture that is not inside."""
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))
    assert len(page.encode()) < MAX_BYTES
    assert not page.count("missing</")


def test_all_sources_of_an_edit_are_shown(page: str) -> None:
    """In the place of one picture, each with its number."""
    for count, arrangement in ((3, "some"), (7, "many")):
        found = re.findall(rf'class="given {arrangement}">(.*?)</div>', page)
        assert found and all(row.count("<img") == count for row in found)
        assert f"Source image {count} of {count}: " in page
        assert f"{count} sources</span>" in page
    assert "Source image: " in page


def test_other_peoples_text_is_escaped(page: str) -> None:
    """A prompt stays text, in the page and in attributes."""
    assert EVIL not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)" in page


def test_the_page_says_what_the_reward_was(page: str) -> None:
    """The truth of the world as a training reward is told at once."""
    assert "The training reward of t2i-teacher and edit-teacher is the oracle" in page


def test_every_picture_and_header_is_named(page: str) -> None:
    """For readers who do not see the page."""
    assert all('alt="' in tag for tag in re.findall(r"<img[^>]*>", page))
    assert all('scope="' in tag for tag in re.findall(r"<th\b[^>]*>", page))
    assert "prompt 1 of edit: a small red fox" in html.unescape(page)


def test_an_unfinished_student_is_missing(tmp_path: Path) -> None:
    """Not zero: it is named as missing in the numbers, the table and the page."""
    folder = make_run(tmp_path, without=("student", BEST_OF))
    summary = write_summary(folder)
    student = [result for result in summary["results"] if result["policy"] == "student"]
    assert [result["score"] for result in student] == [None, None]
    assert [kept["kept"] for kept in summary["distillation"]] == [None, None]
    assert all(result["share_of_best"] is None for result in summary["results"])
    assert summary["cost"][2]["images"] is None
    assert "The stage student is not trained to its end (0 of 20 steps)." in summary["missing"]
    assert "missing" in printed(table(summary), cost_table(summary))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "What these numbers do not say" in page
    assert "There are no scores of student on t2i." in page


def test_a_recipe_without_distillation(tmp_path: Path) -> None:
    """There is no student, and the page says so."""
    folder = make_run(tmp_path, has_student=False)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "There is no student: the recipe has no stage that distills." in page


def test_too_many_failed_pictures_make_a_result_invalid(tmp_path: Path) -> None:
    """A failure is a row without value, and never a number."""
    folder = make_run(tmp_path)
    path = folder / "evaluation" / "student" / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:20:4]:
        row |= {"metric": "failed", "value": None, "reason": "no answer"}
    write_rows(path, rows)
    found = {(r["policy"], r["task"]): r for r in write_summary(folder)["results"]}
    assert found["student", "t2i"]["is_valid"] is False
    assert found["student", "t2i"]["num_failed"] == 5
    assert found["student", "edit"]["is_valid"] is True


def test_a_judge_that_knows_no_knowledge_has_its_score_there(tmp_path: Path) -> None:
    """In points of its own scale, from 1 to 5; few prompts make no interval, which is told."""
    folder = make_run(tmp_path)
    for path in folder.glob("evaluation/*/scores.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if row["metric"] not in KNOWLEDGE]
        few = [row for row in kept if row["task"] != "edit" or row["prompt"] <= "edit-12"]
        write_rows(path, few)
    config = read_run(folder)
    told = summarise(config, folder, all_scores(config, folder))
    judge = {"kind": "vlm", "path": "judge", "dimension": "alignment"}
    other = parse(RunConfig, config.model_dump() | {"judge": judge})
    found = summarise(other, folder, all_scores(other, folder))
    names = [{row["metric"] for row in one["knowledge"]} for one in (told, found)]
    assert names == [{HEADLINE}, {"alignment"}]
    assert not any(row["is_apart"] for row in found["knowledge"])
    for one, another in zip(told["cost"], found["cost"], strict=True):
        for ours, theirs in zip(one["rates"], another["rates"], strict=True):
            rate, quarter = (r["per_1000_images"]["mean"] for r in (ours, theirs))
            assert quarter == pytest.approx(rate / 4)
    assert found["judges"] == {"t2i": "vlm", "edit": "vlm"}
    assert any("Brackets of edit are too narrow" in line for line in told["missing"])
    assert not any("Brackets of t2i" in line for line in told["missing"])


def test_updates_that_ran_away_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = folder / "stages" / "t2i-teacher" / "metrics.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    sizes = [0.2] * 20 + [3.0] * 10
    rows = [row | {"step": n, "policy/grad_norm": size} for n, size in enumerate(sizes)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = "The updates of the stage t2i-teacher ran away: at step 29 its gradients were 15 times"
    assert [line for line in write_summary(folder)["missing"] if line.startswith(told)]
    assert told in write_report(folder).read_text(encoding="utf-8")


def test_the_best_of_many_stands_as_far_above_the_base_as_on_its_own_prompts(
    tmp_path: Path,
) -> None:
    """It was drawn for fewer prompts, whose scores need not be those of all."""
    folder = make_run(tmp_path)
    path = folder / "evaluation" / BEST_OF / "scores.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_rows(path, [row | {"value": row["value"] - 0.4} for row in rows])
    summary = write_summary(folder)
    bases = {r["task"]: r["score"] for r in summary["results"] if r["policy"] == BASE}
    for space in summary["headroom"]:
        base = bases[space["task"]]["mean"]
        assert space["best"]["mean"] < base
        shown = report._panel(summary, space["task"])["best"]
        assert shown["mean"] == pytest.approx(base + DISTANCE)


def test_names_that_differ_by_a_capital_are_two_on_the_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for path in folder.glob("evaluation/*/scores.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        few = [row | {"category": row["category"].title()} for row in rows[: len(rows) // 2]]
        write_rows(path, few + rows[len(few) :])
    text = write_report(folder).read_text(encoding="utf-8")
    assert set(re.findall(r'<th scope="rowgroup"[^>]*>([Pp]ortrait)<', text)) == {
        "Portrait", "portrait"
    }  # fmt: skip


def test_what_is_trained_on_is_not_told_as_held_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    config, rows = read_run(folder), all_scores(read_run(folder), folder)
    assert not list(contamination(config, {n: s.prompts.read() for n, s in config.stages.items()}))
    measured = {"evaluation": {**config.evaluation.model_dump(), "prompts": TRAIN}}
    missing = summarise(parse(RunConfig, config.model_dump() | measured), folder, rows)["missing"]
    told = [line for line in missing if "is not held out" in line]
    assert [line.split(" (")[0] for line in told] == [
        f"{480 * tasks} of the {480 * tasks} prompts of evaluation.prompts are among those of the "
        f"stage {stage}"
        for stage, tasks in (("t2i-teacher", 1), ("edit-teacher", 1), ("student", 2))
    ]
    gone = {**config.evaluation.model_dump(), "prompts": str(tmp_path / "gone.jsonl")}
    other = parse(RunConfig, config.model_dump() | {"evaluation": gone})
    assert "Whether what is measured is held out is not known" in str(
        summarise(other, folder, rows)
    )


def test_labels_of_curves_that_hardly_move_stay_short() -> None:
    lines = [{"label": "a", "colour": "base", "points": [(0.0, 2.2449425), (1.0, 2.2449431)]}]
    drawn = chart("loss", "loss", lines, last=1.0, end="1")
    assert all(digits <= 4 for _, _, digits in drawn["ticks"])


def test_a_merge_is_a_policy_like_the_others(tmp_path: Path) -> None:
    """It has a row, a gain and pictures, no cost, and its own guidance."""
    folder = make_run(tmp_path)
    merges = {"soup": {"method": "average", "of": ["t2i-teacher", "edit-teacher"]}}
    config = make_config(tmp_path)
    merged = parse(RunConfig, config.model_dump(mode="json") | {"merges": merges})
    Run.open(folder).rebind(merged)
    place = folder / "evaluation"
    shutil.copytree(place / "student", place / "soup")
    rows = read_rows(place / "student" / "scores.jsonl")
    write_rows(place / "soup" / "scores.jsonl", [row | {"policy": "soup"} for row in rows])
    page, found = write_report(folder).read_text(), write_summary(folder)
    own = next(row for row in found["policies"] if row["policy"] == "soup")
    assert (own["role"], own["evaluations_per_step"]) == ("merge", 2)
    gains = {(r["policy"], r["task"]): r["gain"] for r in found["results"]}
    assert gains["soup", "edit"] == gains["student", "edit"]
    assert "soup" not in [row["stage"] for row in found["cost"]]
    assert "soup merges the weights of t2i-teacher and edit-teacher (average)." in page
    assert page.count('alt="soup: ') == page.count('alt="student: ') > 0
