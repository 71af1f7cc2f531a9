"""Every bench keeps the contract of `burnish.bench.base`, and counts as its official code does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.checkouts import CHECKOUTS, reference

from burnish import images
from burnish.bench import qwen_image_bench
from burnish.bench.base import OVERALL, BenchConfig, Node, ancestors
from burnish.bench_tree import Scores, means, read
from burnish.benching import BenchChoice, ChosenBench, released
from burnish.config import ConfigError, parse, shelf
from burnish.questions import Slot
from burnish.types import Failed

KINDS = sorted(
    config.__module__.rpartition(".")[2] for config in shelf("burnish.bench", BenchConfig)
)


def taken(folder: Path, kind: str, **changes: Any) -> ChosenBench:
    settings = CHECKOUTS[kind](folder) | changes
    return ChosenBench.of(parse(BenchChoice, {"bench": settings}).bench)


def values(
    found: ChosenBench, replies: Mapping[tuple[str, int, str], str | Failed]
) -> dict[Node, float]:
    """The mean of every node that has one."""
    scores = read(found.bench, found.items, found.config.num_images, replies)
    numbers = means(found.bench, scores, _ones(scores))
    return {
        node: float(number)
        for node, number in zip(found.bench.nodes(), numbers, strict=True)
        if number == number
    }


def _ones(scores: Scores) -> Any:
    import numpy as np

    return np.ones(len(scores.total))


GOOD: dict[str, str] = {
    "gedit": '{"score": [10, 10], "reasoning": "done"}',
    "geneval": '{"correct": true}',
    "imgedit": "Brief reasoning: fine\nA: 5\nB: 5\nC: 5",
    "miniature": '{"Quality/Detail/Noise": 1.0}',
    "qwen_image_bench": '{"x": {"Noise": {"score": 2}, "Color": {"score": 2}}}',
}


def good(kind: str, found: ChosenBench, item: Any) -> str:
    """The best reply to a question about an item."""
    if kind == "unigenbench":
        count = len(item.facts["points"])
        return f"<analysis>{['fine'] * count}</analysis><score>{[1] * count}</score>"
    return GOOD[kind]


# --- The contract ----------------------------------------------------------------------------


def test_every_bench_has_a_checkout_to_be_tested_with() -> None:
    assert sorted(CHECKOUTS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_places_of_their_own_below_the_folder(kind: str, tmp_path: Path) -> None:
    found = taken(tmp_path, kind, num_images=3)
    paths = [path for _, _, path in found.places()]
    assert len(set(paths)) == len(paths) == 3 * len(found.items)
    assert not any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths)
    others = [path for path, _ in found.bench.companions(found.items)]
    assert not set(others) & set(paths)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_has_every_node_after_its_parent(kind: str, tmp_path: Path) -> None:
    nodes = list(taken(tmp_path, kind).bench.nodes())
    assert nodes[0] == OVERALL and len(set(nodes)) == len(nodes)
    for place, node in enumerate(nodes[1:], start=1):
        assert node[:-1] in nodes[:place]


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_asked_with_their_source_and_others_without(kind: str, tmp_path: Path) -> None:
    found = taken(tmp_path, kind)
    for item in found.items:
        parts = [part for q in found.bench.questions(item) for part in q.parts]
        sources = found.bench.sources(item)
        assert len(sources) == (item.prompt.task == "edit")
        if Slot.SOURCE in parts:
            assert all(images.decode(data, where=item.id).size[0] > 1 for data in sources)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_replies_give_the_best_score_and_none_give_none(kind: str, tmp_path: Path) -> None:
    found = taken(tmp_path, kind)
    replies = {
        (item.id, number, question.name): good(kind, found, item)
        for item, number, _ in found.places()
        for question in found.bench.questions(item)
    }
    best = values(found, replies)
    assert set(best.values()) == {found.bench.scale}
    scores = read(found.bench, found.items, found.config.num_images, {})
    assert scores.coverage == 0 and values(found, {}) == {}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"miniature", "geneval"}))
@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I would rather not say.",
        "[" * 10_000,
        '{"score": [11, 5]}',
        '{"score": ["ten", 5]}',
        '{"sorry": "I cannot"}',
        '{"x": {"y": {"score": "great"}}}',
        "{" * 200_000,
        "<analysis>" * 20_000,
        "A: 6\nB: 1\nC: 1",
        "A: 5\nB: 5",
        "<analysis>['a']</analysis><score>[1, 1, 1, 1, 1, 1]</score>",
        "<analysis>[</analysis><score>__import__('os')</score>",
    ],
)
def test_what_cannot_be_read_is_a_failure_and_no_number(
    kind: str, reply: str, tmp_path: Path
) -> None:
    found = taken(tmp_path, kind)
    item = found.items[0]
    for question in found.bench.questions(item):
        assert isinstance(found.bench.parse(item, question.name, reply), Failed)


@pytest.mark.parametrize("key", ["../../out", "/tmp/out", "1000"])
def test_a_picture_stays_in_its_folder_and_has_a_place_of_its_own(key: str, tmp_path: Path) -> None:
    settings = CHECKOUTS["imgedit"](tmp_path)
    path = tmp_path / "Benchmark" / "Basic" / "basic_edit.json"
    edits = json.loads(path.read_text())
    first = edits.pop("1000")
    # A number of its own, and a place that another one has: `1000-1` is the second of `1000`.
    edits |= {key: first, "1000-1": first} if key == "1000" else {key: first}
    path.write_text(json.dumps(edits))
    with pytest.raises(ConfigError, match="need a place of its own for every picture"):
        ChosenBench.of(parse(BenchChoice, {"bench": settings | {"num_images": 2}}).bench)


def test_a_bench_without_items_is_refused(tmp_path: Path) -> None:
    settings = CHECKOUTS["qwen_image_bench"](tmp_path)
    (tmp_path / "released.jsonl").write_text("")
    with pytest.raises(ConfigError, match="need items, got none"):
        ChosenBench.of(parse(BenchChoice, {"bench": settings}).bench)


def test_items_of_one_id_are_refused(tmp_path: Path) -> None:
    settings = CHECKOUTS["qwen_image_bench"](tmp_path)
    path = tmp_path / "released.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="ids of their own, got '1' twice"):
        ChosenBench.of(parse(BenchChoice, {"bench": settings}).bench)


def test_a_part_of_a_bench_has_another_key_and_so_has_another_judge(tmp_path: Path) -> None:
    whole, part = (taken(tmp_path, "unigenbench", limit=limit) for limit in (None, 2))
    assert whole.key({"model": "a"}) == whole.key({"model": "a"})
    assert (
        len({whole.key({"model": "a"}), part.key({"model": "a"}), whole.key({"model": "b"})}) == 3
    )


# --- Qwen-Image-Bench ------------------------------------------------------------------------


def test_qwen_image_bench_gives_the_scores_of_the_official_code(tmp_path: Path) -> None:
    """Every form of reply that its parser repairs, over the released file's columns."""
    found, known = taken(tmp_path, "qwen_image_bench"), reference()["scores"]
    replies = released(found, tmp_path / "released.jsonl")
    assert sorted(replies) == sorted(known)
    for model, official in known.items():
        own = values(found, replies[model])
        wanted = {OVERALL: official["total"]}
        wanted |= {(pillar,): value for pillar, value in official["level1"].items()}
        wanted |= {
            (pillar, ability): value
            for pillar, tree in official["level2"].items()
            for ability, value in tree.items()
        }
        for node, value in wanted.items():
            assert own[node] == pytest.approx(value, abs=1e-9), node


def test_qwen_image_bench_asks_about_each_tagged_pillar_in_the_official_words(
    tmp_path: Path,
) -> None:
    found = taken(tmp_path, "qwen_image_bench")
    item, record = found.items[0], reference()["records"][0]
    questions = found.bench.questions(item)
    pillars = dict.fromkeys(tag.split(" / ")[0] for tag in record["dims_en"].split("; "))
    assert [question.name for question in questions] == list(pillars)
    before, slot, after = questions[0].parts
    # The prompt says <image>, too, and stays whole.
    assert (before, slot) == ("a picture <image> 1\n", Slot.OUTPUT)
    assert isinstance(after, str) and after.startswith(f"\n{questions[0].name}\n## ")
    assert after.endswith('Answer { "{ability}": 1 }')
    assert questions[0].system == "Grade pictures."


def test_qwen_image_bench_is_drawn_in_either_language(tmp_path: Path) -> None:
    found = taken(tmp_path, "qwen_image_bench", language="cn")
    assert found.items[3].prompt.text == "图 4"


def test_a_trimmed_checklist_is_refused(tmp_path: Path) -> None:
    settings = CHECKOUTS["qwen_image_bench"](tmp_path)
    from tests import checkouts

    checkouts.qwen_image_bench(tmp_path, trimmed=True)
    with pytest.raises(ConfigError, match=r"5, 23, 56 .* got 5, \d+, \d+ .*trimmed"):
        ChosenBench.of(parse(BenchChoice, {"bench": settings}).bench)


def test_large_pictures_are_squashed_and_small_ones_stay() -> None:
    assert qwen_image_bench.squashed(Image.new("RGB", (1025, 100))).size == (1024, 1024)
    assert qwen_image_bench.squashed(Image.new("RGB", (1024, 100))).size == (1024, 100)


# --- The others ------------------------------------------------------------------------------


def test_geneval_is_the_mean_of_its_tasks_and_misses_what_is_missing(tmp_path: Path) -> None:
    found = taken(tmp_path, "geneval")
    rows = []
    for item, number, path in found.places():
        tag = item.facts["tag"]
        is_right = {"single_object": True, "counting": number == 0}.get(tag, False)
        rows.append(
            {"filename": f"/x/{path}", "tag": tag, "prompt": item.prompt.text}
            | {"correct": is_right}
        )
    path = tmp_path / "model" / "results.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    replies = released(found, path)["model"]
    own = values(found, replies)
    assert own["single_object",] == 100 and own["counting",] == 25
    assert own[OVERALL] == pytest.approx(125 / 6)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    scores = read(found.bench, found.items, 4, released(found, path)["model"])
    assert scores.failed == {"no reply": 1} and scores.expected == 48


def test_geneval_lays_pictures_out_as_its_scorer_reads_them(tmp_path: Path) -> None:
    found = taken(tmp_path, "geneval")
    assert found.bench.layout(found.items[7], 2) == "00007/samples/0002.png"
    others = dict(found.bench.companions(found.items))
    assert json.loads(others["00007/metadata.jsonl"]) == found.items[7].facts


def test_geneval_refuses_the_results_of_other_prompts(tmp_path: Path) -> None:
    found = taken(tmp_path, "geneval")
    path = tmp_path / "results.jsonl"
    row = {"filename": "a/00000/samples/0000.png", "prompt": "another", "correct": True}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="need the prompt of item 00000, got another"):
        released(found, path)


def test_unigenbench_counts_test_points_over_all_pictures(tmp_path: Path) -> None:
    found = taken(tmp_path, "unigenbench", num_images=1)
    said = {"0": [1], "1": [0, 1], "2": [1, 0]}
    replies = {
        (name, 0, "test points"): f"<analysis>{['x'] * len(own)}</analysis> <score>{own}</score>"
        for name, own in said.items()
    }
    own = values(found, replies)
    assert own["Style",] == 50 and own["Attribute", "Color"] == 100
    # One test point stands twice in a prompt: both count.
    assert own["Attribute", "Size"] == 50 and own["Attribute",] == pytest.approx(200 / 3)
    assert own[OVERALL] == pytest.approx((50 + 200 / 3) / 2)


def test_unigenbench_asks_in_the_official_form(tmp_path: Path) -> None:
    found = taken(tmp_path, "unigenbench")
    slot, text = found.bench.questions(found.items[1])[0].parts
    assert slot is Slot.OUTPUT
    corner = "\N{LEFT CORNER BRACKET}", "\N{RIGHT CORNER BRACKET}"
    assert text == (
        "prompt, 1 ['Style', 'Attribute - Color'] "
        f"Means:{corner[0]}\nStyle: how\nAttribute - Color: hue\n{corner[1]} "
        f"Here:{corner[0]}\nStyle: Style here\nAttribute - Color: Attribute - Color here\n{corner[1]}"  # noqa: E501
    )


def test_gedit_is_the_root_of_the_lower_grades_and_the_mean_of_tasks(tmp_path: Path) -> None:
    found = taken(tmp_path, "gedit")
    assert [item.id for item in found.items] == [
        "subject-add/en/k1", "subject-add/en/k1_2", "text_change/en/k2"
    ]  # fmt: skip
    grades = {"subject-add/en/k1": ([9, 4], [9, 10]), "subject-add/en/k1_2": ([1, 1], [4, 4])}
    grades["text_change/en/k2"] = ([10, 10], [10, 10])
    names = ("Semantic consistency", "Perceptual quality")
    replies = {
        (item, 0, name): json.dumps({"score": own})
        for item, both in grades.items()
        for name, own in zip(names, both, strict=True)
    }
    own = values(found, replies)
    assert own["subject-add",] == pytest.approx((6 + 2) / 2)
    assert own[OVERALL] == pytest.approx((4 + 10) / 2)
    assert own["subject-add", names[0]] == pytest.approx((4 + 1) / 2)
    assert own["Other means", names[1]] == pytest.approx(((9 + 4) / 2 + 10) / 2)
    assert own["Other means", "Overall, intersection"] == pytest.approx(6)
    del replies["text_change/en/k2", 0, names[1]]
    assert ("text_change",) not in values(found, replies)


def test_gedit_lays_sources_beside_edits(tmp_path: Path) -> None:
    found = taken(tmp_path, "gedit")
    assert found.bench.layout(found.items[2], 0) == "fullset/text_change/en/k2.png"
    names = [name for name, _ in found.bench.companions(found.items)]
    assert names[2] == "fullset/text_change/en/k2_SRCIMG.png"


def test_imgedit_is_the_mean_of_three_grades_and_of_types(tmp_path: Path) -> None:
    found = taken(tmp_path, "imgedit")
    replies = {(item.id, 0, "grades"): "A: 1\nB: 1\nC: 1" for item in found.items}
    replies["1000", 0, "grades"] = "Brief reasoning: good: really\nA: 5\n B: 4\nC: 4"
    own = values(found, replies)
    assert own["add",] == pytest.approx((4.33 + 1) / 2)
    assert own[OVERALL] == pytest.approx((8 + (4.33 + 1) / 2) / 9)


def test_the_tree_of_the_miniature_has_three_levels_and_five_pillars(tmp_path: Path) -> None:
    nodes = taken(tmp_path, "miniature").bench.nodes()
    assert max(map(len, nodes)) == 3
    pillars = ["Quality", "Aesthetics", "Alignment", "Fidelity", "Creative"]
    assert [node[0] for node in nodes if len(node) == 1] == pillars


def test_ancestors_keep_siblings_together() -> None:
    leaves = [("a", "x"), ("b", "y"), ("a", "z")]
    assert ancestors(leaves) == [(), ("a",), ("a", "x"), ("a", "z"), ("b",), ("b", "y")]
