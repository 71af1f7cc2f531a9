"""Prompt sets: what is written reads back, what is broken is named, and draws are fair."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from burnish import images
from burnish.config import ConfigError, parse
from burnish.images import encode_png
from burnish.prompts import GroupSampler, PromptsConfig, read_prompts, write_prompts
from burnish.records import table_rows
from burnish.types import Prompt

SOURCE = encode_png(Image.new("RGB", (8, 8), "red"))
OTHER = encode_png(Image.new("RGB", (16, 8), "blue"))


def some(count: int, task: str = "t2i") -> list[Prompt]:
    sources = (SOURCE,) if task == "edit" else ()
    names = [f"{task}-{number}" for number in range(count)]
    return [Prompt(id=name, text=name, task=task, sources=sources) for name in names]  # type: ignore


def file_with(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_a_written_set_reads_back(tmp_path: Path) -> None:
    prompts = [
        *some(2),
        *some(2, "edit"),
        Prompt(id="both", text="put them together", task="edit", sources=(SOURCE, OTHER, SOURCE)),
        Prompt(id="full", text="line\u2028end", category="portrait", tags=("a",), facts={"k": [1]}),
        Prompt(id="wide", text="a lake", aspect="16:9"),
    ]
    write_prompts(tmp_path / "set.jsonl", prompts)
    assert list(read_prompts(tmp_path / "set.jsonl")) == prompts
    lines = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    # One source is written as it always was.
    kinds = [type(line.get("source")) for line in lines]
    assert kinds == [type(None), type(None), str, str, list, type(None), type(None)]


def test_a_source_may_be_a_path_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(SOURCE)
    path = file_with(tmp_path / "set.jsonl", {"text": "make it blue", "source": "red.png"})
    (prompt,) = read_prompts(path)
    assert prompt.task == "edit" and len(prompt.sources) == 1 and prompt.id == "set-1"
    # In a list beside others, in any mixture.
    row = {"text": "join them", "source": [images.data_url(OTHER), "red.png"]}
    (several,) = read_prompts(file_with(tmp_path / "several.jsonl", row))
    assert several.task == "edit" and several.sources == (OTHER, *prompt.sources)


def test_rows_without_an_id_have_one_whatever_their_file_is_called(tmp_path: Path) -> None:
    names = ["set.jsonl", "my prompts.jsonl", "my_prompts.jsonl", "é.jsonl", "ü.jsonl", ".x.jsonl"]
    names += ["a" * 240 + "b.jsonl", "a" * 240 + "c.jsonl"]
    paths = [str(file_with(tmp_path / name, {"text": "a"}, {"text": "b"})) for name in names]
    found = [prompt.id for prompt in PromptsConfig(path=tuple(paths)).open()]
    assert len(set(found)) == 2 * len(names)
    assert found[:2] == ["set-1", "set-2"] and found[4] == "my_prompts-1"


def test_a_mark_before_the_first_line_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "a", "id": "one"}\n{"text": "b", "id": "two"}\n', "utf-8-sig")
    assert [prompt.id for prompt in read_prompts(path)] == ["one", "two"]
    assert [row["id"] for _, row in table_rows(path)] == ["one", "two"]
    (tmp_path / "list.json").write_text('[{"id": "one"}]', "utf-8-sig")
    assert [row["id"] for _, row in table_rows(tmp_path / "list.json")] == ["one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "need one JSON object"),
        ({"txt": "a"}, "need an object with a"),
        ({"text": "half \ud83d"}, "text: need whole characters"),
        ({"text": "a", "category": "\ud83d"}, "category: need whole characters"),
        ({"text": "a", "categry": "x"}, "did you mean 'category'"),
        ({"text": "a", "task": "draw"}, "need task t2i or edit"),
        ({"text": "a", "task": "edit"}, "need a source image for an edit only"),
        ({"text": "a", "source": "gone.png"}, "need a readable image file"),
        ({"text": "a", "source": "data:image/png;base64,@@@"}, "need base64"),
        ({"text": "a", "source": "data:image/png;base64,\u00e9"}, "need base64"),
        ({"text": "a", "source": "data:image/png;base64,\ud83d"}, "need base64"),
        ({"text": "a", "source": "data:image/png;base64,aGFsbG8="}, "need"),
        ({"text": "a", "source": [None, "red.png"]}, "need a readable image file"),
        ({"text": "a", "source": ["gone.png"] * 9}, "need at most 8 source images, got 9"),
        ({"text": "a", "id": "../up"}, "need an id of letters"),
        ({"text": "a", "aspect": "wide"}, "need an aspect of width to height .*, got 'wide'"),
        ({"text": "a", "aspect": 1.5}, "need an aspect of width to height .*, got '1.5'"),
        ({"text": "a", "tags": "abc"}, "need a list of tags"),
        ({"text": "a", "id": "one"}, "need distinct ids"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(line: Any, message: str, tmp_path: Path) -> None:
    path = file_with(tmp_path / "set.jsonl", {"text": "fine", "id": "one"}, line)
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        list(read_prompts(path))
    assert "set.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


def test_several_sets_are_drawn_from_as_one_task_by_task(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")
    write_prompts(Path(first), some(2))
    write_prompts(Path(second), [*some(2, "edit"), Prompt(id="third", text="third")])
    names = [prompt.id for prompt in PromptsConfig(path=(first, second)).read()]
    assert names == ["t2i-0", "t2i-1", "third", "edit-0", "edit-1"]
    assert len(PromptsConfig(path=(first, second), limit=1).read()) == 2
    assert list(PromptsConfig(path=first, tasks=("t2i",)).read()) == some(2)
    with pytest.raises(ConfigError, match="need prompts for the task 'edit', got none in"):
        PromptsConfig(path=first).read()
    with pytest.raises(ConfigError, match="tasks: need each task once, got t2i, t2i; leave"):
        parse(PromptsConfig, {"path": first, "tasks": ["t2i", "t2i"]})
    with pytest.raises(ConfigError, match="need at least one set of prompts"):
        PromptsConfig(path=()).read()
    portraits = PromptsConfig(
        path="embedded:prompts/train.jsonl", categories=("portrait",), limit=5
    )
    assert [(p.task, p.category) for p in portraits.read()] == [
        *[("t2i", "portrait")] * 5, *[("edit", "portrait")] * 5,
    ]  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"\(general, landscape, portrait, typography\), got 'portraits'; did you"
    ):
        PromptsConfig(path="embedded:prompts/train.jsonl", categories=("portraits",)).read()
    with pytest.raises(ConfigError, match="need distinct ids in all sets"):
        PromptsConfig(path=(first, first), tasks=("t2i",)).read()


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    sampler = GroupSampler(some(12), per_step=3, seed=0)
    epochs = [
        [p.id for step in range(e * 4, e * 4 + 4) for p in sampler.prompts(step)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.id for p in some(12))
    assert epochs[0] != epochs[1]


def test_draws_are_a_function_of_seed_and_step() -> None:
    one, two, other = (GroupSampler(some(12), per_step=4, seed=s) for s in (0, 0, 1))
    assert one.prompts(5) == two.prompts(5)
    assert [one.prompts(s) for s in range(3)] != [other.prompts(s) for s in range(3)]


def test_alternating_steps_have_one_task_each() -> None:
    sampler = GroupSampler(some(6) + some(6, "edit"), per_step=2, seed=0, pool=lambda p: p.task)
    tasks = [{prompt.task for prompt in sampler.prompts(step)} for step in range(6)]
    assert tasks == [{"edit"}, {"t2i"}] * 3


def test_too_few_prompts_for_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="need at least 5 prompts"):
        GroupSampler(some(4), per_step=5, seed=0)
