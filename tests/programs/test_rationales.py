"""A judge's own reasoning: who may write about what, resumed, and taught as given."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from burnish import images, runtime
from burnish.annotations.base import read_annotations, split, write_annotations
from burnish.annotations.schema import Annotation, annotation_digest
from burnish.cli import main
from burnish.judges.lessons import Collator, Curriculum, exercises
from burnish.judges.rationales import chosen_evenly, write_rationales
from burnish.judging import Rubric
from burnish.ledger import read_ledger
from burnish.rewards.vlm import Judge

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)
SPLIT = {"held_out": 0.3, "seed": 1}


def annotation(number: int) -> Annotation:
    """A grey picture whose brightness is its quality; two pictures share a prompt."""
    score = 1.0 + number % 5
    shade = Image.new("RGB", (32, 32), (round(50 * score),) * 3)
    return Annotation(
        id=f"picture-{number}",
        prompt=f"prompt {number // 2}",
        output=images.encode_png(shade),
        dimension="alignment",
        score_mean=score,
        score_std=0.3,
        reasoning="raters said so",
        pair_group=f"group {number // 2}",
        licence="Apache-2.0",
        origin="test",
    )


SOME = [annotation(number) for number in range(40)]


@pytest.fixture
def judge(copy_with: Callable[[dict[str, object]], Path]) -> Path:
    """A judge that knows what its training held out."""
    return copy_with({"split": SPLIT})


def test_the_command_writes_about_what_was_not_held_out_and_goes_on_where_it_stopped(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_annotations(tmp_path / "some.jsonl", SOME)
    out = tmp_path / "own.jsonl"
    given = [str(judge), f"annotations=[{{path: {tmp_path / 'some.jsonl'}}}]", "batch_size=4"]
    command = ["reward", "reason", *given, "runtime.device=cpu", "--out", str(out), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found, (training, _) = read_annotations(out), split(SOME, **SPLIT)
    assert told["asked"] == told["written"] == len(training) == len(found) < len(SOME)
    of = {annotation.id: annotation for annotation in training}
    for own in found:
        theirs = of[own.id.removeprefix("own-")]
        wanted = replace(theirs, id=own.id, reasoning=own.reasoning, reasoned_by="judge")
        assert own == wanted and own.reasoning.startswith("ok")
    rows = next((tmp_path / "own-rows").glob("rationales-*.jsonl"))
    lines = rows.read_text().splitlines(keepends=True)
    # A kill in the middle of a row: what stands is kept, as one line of another text shows.
    digest = json.loads(lines[0])["digest"]
    kept = [json.dumps({"digest": digest, "reasoning": "kept"}) + "\n", *lines[1:6]]
    rows.write_text("".join(kept) + lines[6][:9])
    assert main(command) == 0
    again = {own.id: own.reasoning for own in read_annotations(out)}
    (first,) = [a.id for a in training if annotation_digest(a) == digest]
    assert again == {own.id: own.reasoning for own in found} | {f"own-{first}": "kept"}
    assert main([*command, "limit=3"]) == 2, "other settings in a folder of rows"


def test_ranks_share_the_pictures_and_failures_are_left_out(
    small_judge: Path, tmp_path: Path
) -> None:
    judge = Judge.load(small_judge)
    (tmp_path / "rationales-1.jsonl").write_text(
        json.dumps({"digest": annotation_digest(SOME[0]), "reasoning": None})
        + "\n"
        + json.dumps({"digest": annotation_digest(SOME[1]), "reasoning": "of rank 1"})
        + "\n"
    )
    found = write_rationales(judge, SOME[:4], tmp_path, CPU, batch_size=4)
    assert [own.id for own in found] == [f"own-{a.id}" for a in SOME[1:4]]
    assert found[0].reasoning == "of rank 1"
    assert len(read_ledger(tmp_path, "rationales")) == 4


def test_as_many_of_each_dimension_are_chosen_in_any_order() -> None:
    mixed = [*SOME, *(replace(a, id=f"{a.id}b", dimension="portrait") for a in SOME[:6])]
    chosen = chosen_evenly(mixed, 10)
    assert {a.id for a in chosen} == {a.id for a in chosen_evenly(mixed[::-1], 10)}
    assert [a.dimension for a in chosen].count("portrait") == 6
    assert [a.dimension for a in chosen].count("alignment") == 10


def test_own_words_are_given_and_only_the_score_after_them_is_taught(small_judge: Path) -> None:
    own = [replace(a, id=f"own-{a.id}", reasoning="my words", reasoned_by="judge") for a in SOME]
    rubrics = [Rubric("alignment", "Is it bright?")]
    chosen = exercises([*SOME, *own], in_pairs=False)
    made = Curriculum(chosen, rubrics, length=len(chosen), skip_reasoning=0.5, seed=0)
    lessons = [lesson for place in range(len(made)) for lesson in made[place]]
    collate = Collator.of(Judge.load(small_judge).processor)
    for lesson in lessons:
        if lesson.annotation.reasoned_by == "judge":
            assert lesson.reasoning == "my words" and not lesson.is_written
            batch = collate([(lesson,)])
            assert not batch["written"].any()
            assert float(batch["scores"]) == lesson.annotation.score_mean
    assert {lesson.is_written for lesson in lessons} == {True, False}


def test_words_of_another_judge_or_about_another_picture_are_not_taken_over(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "some.jsonl", tmp_path / "own.jsonl"
    write_annotations(path, SOME[:8])
    command = ["reward", "reason", str(judge), f"annotations=[{{path: {path}}}]", "--out", str(out)]
    assert main([*command, "runtime.device=cpu"]) == 0
    before = len(read_ledger(tmp_path / "own-rows", "rationales"))
    # The same ids, other pictures.
    others = [images.encode_png(Image.new("RGB", (32, 32), (3 + 20 * n,) * 3)) for n in range(8)]
    write_annotations(path, [replace(a, output=o) for a, o in zip(SOME, others, strict=False)])
    assert main([*command, "runtime.device=cpu"]) == 0
    assert len(read_ledger(tmp_path / "own-rows", "rationales")) == 2 * before
    capsys.readouterr()
    (judge / "rubrics" / "alignment.md").write_text("Is it dark?")
    assert main([*command, "runtime.device=cpu"]) == 2
    assert "weights and rubrics as they were when" in capsys.readouterr().err


def test_what_cannot_be_written_is_one_line(
    judge: Path,
    small_judge: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    copy_with: Callable[[dict[str, object]], Path],
) -> None:
    path = tmp_path / "some.jsonl"
    write_annotations(path, SOME)
    given = f"annotations=[{{path: {path}}}]"

    def refused(*arguments: str) -> str:
        assert main(["reward", "reason", *arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    assert "need a .jsonl or .parquet file" in refused(
        str(judge), given, "--out", str(tmp_path / "own.csv")
    )
    assert "without `split`" in refused(str(small_judge), given)
    assert "need the folder of a judge" in refused(str(tmp_path), given)
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    assert "need a new file for --out" in refused(str(judge), given, "--out", str(taken))
    assert taken.read_text() == "mine"
    other = refused(str(judge), given, "dimensions=[alignment]", "--out", str(path))
    assert "need a new file" in other and len(read_annotations(path)) == len(SOME)
    strange = tmp_path / "strange.jsonl"
    write_annotations(strange, [replace(SOME[0], dimension="portrait")])
    said = refused(str(judge), f"annotations=[{{path: {strange}}}]")
    assert "need dimensions of the judge (alignment), got portrait" in said
    everything = copy_with({"split": {"held_out": 0.999999, "seed": 0}})
    assert "got none among 40" in refused(str(everything), given)
    path.write_text(path.read_text().replace('"raters"', '"nobody"', 1))
    said = refused(str(judge), given)
    assert "reasoned_by: need raters or judge, got 'nobody'" in said
