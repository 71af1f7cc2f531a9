"""Annotations: laws of the schema, one contract for every public set, and every refusal."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from burnish.annotations.base import (
    Reader,
    normal_prompt,
    pairs,
    public_sets,
    read_annotations,
    reader,
    split,
    write_annotations,
)
from burnish.annotations.schema import KINDS, Annotation
from burnish.config import ConfigError
from burnish.images import encode_png, encode_webp
from burnish.records import json_entries

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = importlib.import_module("pyarrow.parquet")

SETS = public_sets()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))


def image(seed: int) -> bytes:
    return encode_png(picture(seed))


def annotation(number: int = 0, **fields: Any) -> Annotation:
    """A valid annotation; `fields` change it."""
    whole: dict[str, Any] = {
        "id": f"a-{number}",
        "prompt": f"prompt {number}",
        "output": image(number),
        "dimension": "alignment",
        "score_mean": 3.5,
        "licence": "MIT",
        "origin": "tests/made",
    }
    return Annotation(**{**whole, **fields})


def ranked(*ranks: int | None, scores: Sequence[float | None] = ()) -> list[Annotation]:
    """A pair group with these ranks, and scores where given."""
    means = [*scores, *[None] * (len(ranks) - len(scores))]
    return [
        annotation(n, prompt="one", pair_group="g", rank=rank, score_mean=mean)
        for n, (rank, mean) in enumerate(zip(ranks, means, strict=True))
    ]


FULL = [
    annotation(0),
    annotation(
        1,
        prompt="Fuchs \u2028 \U0001f98a",
        dimension="portrait",
        score_mean=1.0,
        score_std=0.25,
        num_raters=7,
        reasoning="First,\nthen \u2028 so 4.",
        category="portrait",
    ),
    annotation(2, task="edit", sources=(image(20), image(21)), output=encode_webp(picture(2))),
    annotation(3, prompt="p", score_mean=None, pair_group="pair", rank=1),
    annotation(4, prompt="p", score_mean=None, pair_group="pair", rank=1, output=image(3)),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
class TestBothFormats:
    def test_what_is_written_reads_back_equal(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / "new" / f"a.set{suffix}"
        write_annotations(path, FULL)
        assert read_annotations(path) == FULL
        first = path.read_bytes()
        write_annotations(path, read_annotations(path))
        assert path.read_bytes() == first
        assert not list(tmp_path.rglob("*.partial"))

    def test_more_rows_than_a_batch(self, suffix: str, tmp_path: Path) -> None:
        many = [annotation(n, output=image(n % 3)) for n in range(150)]
        write_annotations(tmp_path / f"many{suffix}", many)
        assert read_annotations(tmp_path / f"many{suffix}") == many

    def test_nothing_is_written_of_what_would_not_be_read(
        self, suffix: str, tmp_path: Path
    ) -> None:
        for wrong in (
            [annotation(0, score_mean=9.0)],
            [annotation(0), annotation(0)],
            [annotation(0, output=b"no image")],
            [],
        ):
            with pytest.raises(ConfigError, match="need"):
                write_annotations(tmp_path / f"a{suffix}", wrong)
        assert not list(tmp_path.iterdir())


def test_jsonl_keeps_each_image_once_as_given_beside_the_file(tmp_path: Path) -> None:
    write_annotations(tmp_path / "set.jsonl", FULL)
    kept = list((tmp_path / "set").iterdir())
    assert sorted(path.suffix for path in kept) == [".png"] * 5 + [".webp"]
    given = {data for one in FULL for data in (one.output, *one.sources)}
    assert {path.read_bytes() for path in kept} == given
    row = json.loads((tmp_path / "set.jsonl").read_text().splitlines()[0])
    assert (tmp_path / row["output"]).read_bytes() == FULL[0].output


def test_the_columns_are_the_fields() -> None:
    assert list(KINDS) == list(inspect.signature(Annotation).parameters)


def ids(annotations: Sequence[Annotation]) -> set[str]:
    return {one.id for one in annotations}


def test_a_split_is_stable_and_independent_of_order_and_company() -> None:
    many = [annotation(n, output=FULL[0].output) for n in range(400)]
    train, held_out = split(many, held_out=0.25)
    assert len(train) + len(held_out) == 400 and 70 < len(held_out) < 130
    assert [one.id for one in train] == [one.id for one in many if one in train]
    backwards = split(many[::-1], held_out=0.25)
    assert (ids(backwards[0]), ids(backwards[1])) == (ids(train), ids(held_out))
    assert ids(split(many[:50], held_out=0.25)[1]) == ids(held_out) & ids(many[:50])
    assert ids(split(many, held_out=0.25, seed=1)[1]) != ids(held_out)
    # What was held out stays so when more is.
    assert ids(split(many, held_out=0.5)[1]) > ids(held_out)
    # The hash is written down here, because a release that moved prompts would spoil every study.
    assert [one.id for one in split(many[:40])[1]] == ["a-9", "a-13", "a-22", "a-26", "a-27"]


def test_a_prompt_is_never_on_both_sides() -> None:
    many = [
        annotation(n, prompt=form.format(n % 40), output=FULL[0].output)
        for n, form in enumerate(["a red fox {}", " A  Red\tFOX {}\n"] * 60)
    ]
    train, held_out = split(many, held_out=0.3)
    sides = [{normal_prompt(one.prompt) for one in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and sides[1]
    assert split(many, held_out=0.0) == (many, [])


def test_pairs_respect_ranks_and_leave_out_ties() -> None:
    found = pairs(ranked(3, 1, 2, 1))
    assert [(better.id, worse.id) for better, worse in found] == [
        ("a-1", "a-0"),
        ("a-2", "a-0"),
        ("a-3", "a-0"),
        ("a-1", "a-2"),
        ("a-3", "a-2"),
    ]


@pytest.mark.parametrize(
    ("ranks", "scores", "better"),
    [
        ((1, 2), (2.0, 4.0), "a-0"),
        ((1, 1), (2.0, 4.0), None),
        ((None, None), (2.0, 4.0), "a-1"),
        ((None, None), (4.0, 4.0), None),
        ((2, None), (2.0, 4.0), "a-1"),
        ((1, None), (None, 4.0), None),
    ],
)
def test_ranks_decide_before_scores(ranks: Any, scores: Any, better: str | None) -> None:
    assert [one.id for one, _ in pairs(ranked(*ranks, scores=scores))] == [better] * bool(better)


def test_only_one_group_and_one_dimension_are_compared() -> None:
    one, other = ranked(1, 2)
    assert pairs([one, replace(other, pair_group="h")]) == []
    assert pairs([one, replace(other, dimension="aesthetic")]) == []
    assert pairs([annotation(0), annotation(1, prompt="prompt 0", score_mean=1.0)]) == []


# The public sets, from here on: small files in the format of each.

Compared = tuple[str, bytes, bytes]
"""A prompt, the better image and the worse one."""


def listed(path: Path, entries: Sequence[Any]) -> Path:
    path.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    return path


def saved(folder: Path, name: str, data: bytes) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return name


def hpdv3(folder: Path, compared: Sequence[Compared]) -> Path:
    entries = [
        {
            "prompt": prompt,
            "choice_dist": [12, 7] if n % 2 else None,
            "confidence": 0.99 if n % 2 else None,
            "path1": saved(folder, f"images/{n}-1.png", better),
            "path2": saved(folder, f"images/{n}-2.png", worse),
            "model1": "flux",
            "model2": "infinity",
        }
        for n, (prompt, better, worse) in enumerate(compared)
    ]
    return listed(folder / "train.json", entries)


def editreward(folder: Path, compared: Sequence[Compared]) -> Path:
    entries = [
        {
            "prompt": prompt,
            "choice_dist": None,
            "confidence": None,
            "path_src": saved(folder, f"{n}/source.png", image(n)),
            "path1": saved(folder, f"{n}/1.png", better),
            "path2": saved(folder, f"{n}/2.png", worse),
            "model1": "ovis_u1",
            "model2": "step1x",
            "model1_dim1_score": 4,
            "model1_dim2_score": 4,
            "model1_overall_score": 8,
            "model2_dim1_score": 1,
            "model2_dim2_score": 2.5,
            "model2_overall_score": 3.5,
            "tie_case": False,
        }
        for n, (prompt, better, worse) in enumerate(compared)
    ]
    return listed(folder / "train.json", entries)


def pickapic(folder: Path, compared: Sequence[Compared]) -> Path:
    rows = [
        {
            "are_different": True,
            "caption": prompt,
            "has_label": True,
            "jpg_0": better,
            "jpg_1": worse,
            "label_0": 1.0,
            "label_1": 0.0,
            "ranking_id": n,
            "user_id": 1,
        }
        for n, (prompt, better, worse) in enumerate(compared)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    return folder / "train.parquet"


def imagerewarddb(folder: Path, compared: Sequence[Compared]) -> Path:
    entries = [
        {
            "image_path": "images/train/train_1/" + saved(folder, f"{n}-{rank}.png", data),
            "prompt_id": f"{n:06}-0061",
            "prompt": prompt,
            "classification": "People",
            "image_amount_in_total": 2,
            "rank": rank,
            "overall_rating": 8 - rank,
            "image_text_alignment_rating": 4,
            "fidelity_rating": 1,
        }
        for n, (prompt, *both) in enumerate(compared)
        for rank, data in enumerate(both, start=1)
    ]
    return listed(folder / "train_1.json", entries)


WRITERS: dict[str, Callable[[Path, Sequence[Compared]], Path]] = {
    "hpdv3": hpdv3,
    "editreward": editreward,
    "pickapic": pickapic,
    "imagerewarddb": imagerewarddb,
}
COMPARED = [(f"prompt {n}", image(2 * n), image(2 * n + 1)) for n in range(30)]


def preferences(annotations: Sequence[Annotation]) -> list[Annotation]:
    return [one for one in annotations if one.dimension == "preference"]


@pytest.mark.parametrize("key", SETS)
class TestEveryPublicSet:
    def test_the_file_says_what_it_is(self, key: str) -> None:
        module = importlib.import_module(f"burnish.annotations.{key}")
        assert reader(key) is module.read
        shape = inspect.signature(Reader.__call__).parameters
        assert list(inspect.signature(module.read).parameters) == [*shape][1:]
        assert module.LICENCE and "/" in module.ORIGIN
        for words in ("never downloaded", "Licence:", "arXiv", "were checked against"):
            assert words in " ".join((module.__doc__ or "").split())

    def test_the_preferences_come_out(self, key: str, tmp_path: Path) -> None:
        path = WRITERS[key](tmp_path, COMPARED)
        found = reader(key)(path)
        assert found == reader(key)(path)
        module = importlib.import_module(f"burnish.annotations.{key}")
        assert {(one.licence, one.origin) for one in found} == {(module.LICENCE, module.ORIGIN)}
        chosen = [(b.prompt, b.output, w.output) for b, w in pairs(preferences(found))]
        assert chosen == COMPARED

    def test_position_and_names_tell_nothing(self, key: str, tmp_path: Path) -> None:
        for name in ("as-is", "turned"):
            (tmp_path / name).mkdir()
        turned = [(prompt, worse, better) for prompt, better, worse in COMPARED]
        one = preferences(reader(key)(WRITERS[key](tmp_path / "as-is", COMPARED)))
        other = preferences(reader(key)(WRITERS[key](tmp_path / "turned", turned)))
        # All but the label is the same when the label is the other way round.
        bare = [replace(a, rank=None, score_mean=None) for a in one]
        assert bare == [replace(a, rank=None, score_mean=None) for a in other]
        first = [a.rank for a in one[::2]]
        assert 8 <= first.count(1) <= 22
        assert [a.rank for a in other[::2]] == [3 - (rank or 0) for rank in first]

    def test_a_limit_counts_comparisons(self, key: str, tmp_path: Path) -> None:
        path = WRITERS[key](tmp_path, COMPARED)
        some = reader(key)(path, limit=7)
        assert some == reader(key)(path)[: len(some)]
        assert len(pairs(preferences(some))) == 7
        with pytest.raises(ConfigError, match="limit: need at least 1, got 0"):
            reader(key)(path, limit=0)

    def test_what_is_read_can_be_written(self, key: str, tmp_path: Path) -> None:
        found = reader(key)(WRITERS[key](tmp_path, COMPARED[:5]))
        write_annotations(tmp_path / "copy.jsonl", found)
        assert read_annotations(tmp_path / "copy.jsonl") == found

    def test_a_broken_image_is_named(self, key: str, tmp_path: Path) -> None:
        path = WRITERS[key](tmp_path, [COMPARED[0], ("second", image(1), b"broken")])
        with pytest.raises(ConfigError, match="need a whole PNG") as caught:
            reader(key)(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_missing_file_is_named(self, key: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"gone: need a readable file of .* No such file"):
            reader(key)(tmp_path / "gone")


def test_every_set_has_its_writer_here() -> None:
    assert set(SETS) == set(WRITERS)


def rewritten(path: Path, **fields: Any) -> Path:
    """A JSON list with its last entry changed; None as a string takes a key away."""
    entries = json.loads(path.read_text())
    entries[-1] = {k: v for k, v in {**entries[-1], **fields}.items() if v != "absent"}
    return listed(path, entries)


def test_votes_are_the_raters_of_hpdv3(tmp_path: Path) -> None:
    found = reader("hpdv3")(hpdv3(tmp_path, COMPARED[:2]))
    assert [one.num_raters for one in found] == [1, 1, 19, 19]


def test_scores_of_editreward_are_on_one_scale(tmp_path: Path) -> None:
    path = editreward(tmp_path, COMPARED[:1])
    scores = {(one.dimension, one.output): one.score_mean for one in reader("editreward")(path)}
    _, better, worse = COMPARED[0]
    assert scores == {
        ("preference", better): 5.0,
        ("instruction", better): 5.0,
        ("aesthetic", better): 5.0,
        ("preference", worse): 2.0,
        ("instruction", worse): 1.0,
        ("aesthetic", worse): 3.0,
    }
    found = reader("editreward")(path)
    assert {(one.task, one.sources) for one in found} == {("edit", (image(0),))}
    assert len(pairs(found)) == 3


def test_a_tie_of_editreward_is_a_tie(tmp_path: Path) -> None:
    none = {f"model{n}_{name}_score": None for n in (1, 2) for name in ("dim1", "dim2", "overall")}
    found = reader("editreward")(
        rewritten(editreward(tmp_path, COMPARED[:1]), tie_case=True, **none)
    )
    assert [(one.dimension, one.rank) for one in found] == [("preference", 1)] * 2


def test_ties_and_missing_labels_of_pickapic(tmp_path: Path) -> None:
    rows = parquet.read_table(pickapic(tmp_path, COMPARED[:3])).to_pylist()
    rows[0] |= {"label_0": 0.5, "label_1": 0.5}
    rows[1] |= {"has_label": False, "label_0": None, "label_1": None}
    rows[2] |= {"label_0": 0.0, "label_1": 1.0}
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    found = reader("pickapic")(tmp_path / "b.parquet")
    assert [one.rank for one in found[:2]] == [1, 1] and len(found) == 4
    assert [(b.output, w.output) for b, w in pairs(found)] == [COMPARED[2][:0:-1]]


def test_ratings_and_category_of_imagerewarddb(tmp_path: Path) -> None:
    found = reader("imagerewarddb")(imagerewarddb(tmp_path, COMPARED[:1]))
    scores = {(one.dimension, one.rank): one.score_mean for one in found}
    assert scores == {
        ("preference", 1): 5.0,
        ("preference", 2): pytest.approx(1 + 4 * 5 / 6),
        ("alignment", None): 3.0,
        ("fidelity", None): 1.0,
    }
    assert {one.category for one in found} == {"people"}


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        ("hpdv3", {"prompt": 3}, "prompt: need some text, got 3"),
        ("hpdv3", {"path1": "absent"}, "path1: need some text, got nothing"),
        ("hpdv3", {"path2": "../up.png"}, r"path2: need a relative path without '\.\.'"),
        ("hpdv3", {"path2": "gone.png"}, "path2: need the path of an image, got 'gone.png'"),
        ("hpdv3", {"choice_dist": [1]}, "choice_dist: need two numbers of votes"),
        ("hpdv3", {"choice_dist": [1, -2]}, "choice_dist: need a whole number of at least 0"),
        ("editreward", {"tie_case": 1}, "tie_case: need true or false, got 1"),
        ("editreward", {"model2_dim1_score": 5}, "model2_dim1_score: need a number from 1 to 4"),
        ("editreward", {"model1_overall_score": 0.9}, "need a number from 2 to 8, got 0.9"),
        ("imagerewarddb", {"rank": None}, "rank: need a whole number of at least 1, got nothing"),
        ("imagerewarddb", {"rank": 1.5}, "rank: need a whole number of at least 1, got 1.5"),
        ("imagerewarddb", {"fidelity_rating": 8}, "need a number from 1 to 7, got 8"),
        ("imagerewarddb", {"overall_rating": "absent"}, "need a number from 1 to 7, got nothing"),
        ("imagerewarddb", {"prompt": "other"}, "need the prompt of the others with prompt_id"),
    ],
)
def test_an_entry_in_another_format_is_refused(
    key: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = rewritten(WRITERS[key](tmp_path, COMPARED[:2]), **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        reader(key)(path)
    assert f"{path}, entry " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_0": None}, "label_0: need a number from 0 to 1, got nothing"),
        ({"label_1": float("nan")}, "label_1: need a number from 0 to 1, got nan"),
        ({"jpg_1": None}, "jpg_1: need an encoded image, got nothing"),
        ({"caption": ""}, "caption: need some text, got ''"),
    ],
)
def test_a_row_in_another_format_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = parquet.read_table(pickapic(tmp_path, COMPARED[:2])).to_pylist()
    rows[1] |= fields
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=f"b.parquet, row 2: {message}"):
        reader("pickapic")(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("text", "entry", "given"),
    [
        ("", 1, "''"),
        ('{"a": 1}', 1, "'{"),
        ("[3]", 1, "'3]'"),
        ('[{"a" 1}]', 1, "'{"),
        ("[{}, ]", 2, "']'"),
        ("[{} {}]", 2, "'{}]'"),
        ('[{}, {"a": 1', 2, "'{"),
        ("[{}", 2, "''"),
        ('[{"a": ' + "[" * 100_000, 1, "'{"),
    ],
)
def test_a_broken_json_list_is_named(text: str, entry: int, given: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        list(json_entries(tmp_path / "a.json"))
    message = f"{tmp_path / 'a.json'}, entry {entry}: need a JSON list of objects, got {given}"
    assert str(caught.value).startswith(message)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json: need at least one annotation, got none"):
        reader("hpdv3")(listed(tmp_path / "a.json", []))


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path) -> None:
    path = hpdv3(tmp_path, COMPARED[:2])
    entry = json.loads(path.read_text())[0] | {"note": "x" * 70_000}
    # What follows the wanted entries is never looked at.
    path.write_text("[" + ",\n".join([json.dumps(entry)] * 3) + ", broken")
    assert len(reader("hpdv3")(path, limit=3)) == 6
    with pytest.raises(ConfigError, match="entry 4: need a JSON list of objects, got 'broken'"):
        reader("hpdv3")(path)


# Every refusal of the schema.

ROW = {
    "id": "one",
    "prompt": "a red fox",
    "output": "red.png",
    "dimension": "alignment",
    "score_mean": 4,
    "licence": "MIT",
    "origin": "tests/made",
}
PAIRED = {"score_mean": None, "pair_group": "g", "rank": 1}


def file_with(folder: Path, *rows: Any) -> Path:
    (folder / "red.png").write_bytes(image(0))
    (folder / "text.png").write_bytes(b"text")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "set.jsonl"


def test_defaults_may_be_left_out(tmp_path: Path) -> None:
    (one,) = read_annotations(file_with(tmp_path, ROW))
    assert (one.task, one.sources, one.category, one.num_raters) == ("t2i", (), "general", 1)
    assert isinstance(one.score_mean, float)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": "x"}, "need keys of .*, got 'prompts'; did you mean 'prompt'"),
        ({"zzz": 1}, "need keys of .*, got 'zzz'; leave it out"),
        ({"id": None}, "id: need some text, got nothing; write it"),
        ({"prompt": " \n"}, "prompt: need some text, got ' "),
        ({"prompt": "\ud800"}, "prompt: need whole characters"),
        ({"dimension": 3}, "dimension: need some text, got 3"),
        ({"licence": ""}, "licence: need some text"),
        ({"origin": ""}, "origin: need some text"),
        ({"category": []}, "category: need some text"),
        ({"reasoning": 1}, "reasoning: need some text"),
        ({"task": "draw"}, "task: need t2i or edit, got 'draw'"),
        ({"task": "edit"}, "sources: need source images for an edit only, got '0 for edit'"),
        ({"sources": ["red.png"]}, "sources: need source images .* got '1 for t2i'"),
        ({"sources": ["red.png"] * 9, "task": "edit"}, "sources: need at most 8 images, got '9 im"),
        ({"sources": "red.png"}, "sources: need a list of images, got 'red.png'"),
        ({"sources": [3], "task": "edit"}, "sources: need some text, got 3"),
        ({"sources": ["text.png"], "task": "edit"}, "sources: need a whole PNG"),
        ({"output": None}, "output: need some text, got nothing"),
        ({"output": "gone.png"}, r"output: need the path of an image.*No such file"),
        ({"output": "../red.png"}, r"output: need a relative path without '\.\.'"),
        ({"output": "/red.png"}, "output: need a relative path"),
        ({"output": "text.png"}, "output: need a whole PNG, JPEG, WEBP image"),
        ({"score_mean": 5.5}, "score_mean: need a number from 1 to 5, got 5.5"),
        ({"score_mean": 0}, "score_mean: need a number from 1 to 5, got 0"),
        ({"score_mean": float("nan")}, "score_mean: need a number from 1 to 5, got nan"),
        ({"score_mean": "4"}, "score_mean: need a number from 1 to 5, got '4'"),
        ({"score_mean": True}, "score_mean: need a number from 1 to 5, got True"),
        ({"score_std": -0.1}, "score_std: need a number of at least 0, got -0.1"),
        ({"score_std": float("inf")}, "score_std: need a number of at least 0, got inf"),
        ({"score_std": 10**400}, "score_std: need a number of at least 0, got 1000"),
        ({"num_raters": 0}, "num_raters: need a whole number of at least 1, got 0"),
        ({"num_raters": None}, "num_raters: need a whole number of at least 1, got nothing"),
        ({"num_raters": 2.5}, "num_raters: need a whole number of at least 1, got 2.5"),
        ({**PAIRED, "rank": 0}, "rank: need a whole number of at least 1, got 0"),
        ({**PAIRED, "rank": 2**63}, "rank: need a whole number of at least 1, got 9"),
        ({"rank": 1}, "pair_group: need a group for the rank, got nothing"),
        ({"score_mean": None}, "score_mean: need a score, or a pair_group and a rank"),
        ({**PAIRED, "rank": None}, "score_mean: need a score, or a pair_group and a rank"),
        ({"pair_group": ""}, "pair_group: need some text, got ''"),
        ({"id": "first"}, "id: need an id that no other row has, got 'first'; rename"),
    ],
)
def test_a_wrong_field_is_named_by_file_line_and_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = file_with(tmp_path, ROW | {"id": "first"}, ROW | fields)
    with pytest.raises(ConfigError, match=message) as caught:
        read_annotations(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and "\n" not in text and ";" in text


@pytest.mark.parametrize("key", ["id", "prompt", "output", "dimension", "licence", "origin"])
def test_a_missing_field_is_named(key: str, tmp_path: Path) -> None:
    path = file_with(tmp_path, {name: value for name, value in ROW.items() if name != key})
    with pytest.raises(ConfigError, match=rf"set\.jsonl:1: {key}: need .*, got nothing; write it"):
        read_annotations(path)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "[" * 100_000])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set\.jsonl:2: need one JSON object a line, got"):
        read_annotations(file_with(tmp_path, ROW, line))


def test_a_group_has_one_prompt_and_the_same_sources(tmp_path: Path) -> None:
    one, two = ROW | PAIRED, ROW | PAIRED | {"id": "two", "rank": 2}
    path = file_with(tmp_path, one, two | {"prompt": "else"})
    with pytest.raises(ConfigError, match="need one prompt in pair_group 'g', got others in 'one'"):
        read_annotations(path)
    torn = [annotation(0, pair_group="g"), annotation(1, pair_group="g")]
    for use in (split, pairs):
        with pytest.raises(ConfigError, match="need one prompt in pair_group 'g'"):
            cast(Any, use)(torn)
    edits = [
        annotation(n, prompt="p", pair_group="g", task="edit", sources=(image(n),)) for n in (0, 1)
    ]
    with pytest.raises(ConfigError, match="need one sources in pair_group 'g'"):
        write_annotations(tmp_path / "a.jsonl", edits)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "text.parquet").write_text("no Parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (
        ("a.csv", "need a .jsonl or .parquet file, got .*a.csv; give it that suffix"),
        ("gone.jsonl", "gone.jsonl: need a readable file of UTF-8 text, got No such file"),
        ("gone.parquet", "gone.parquet: need a readable file of Parquet, got No such file"),
        ("latin.jsonl", "latin.jsonl: need a readable file of UTF-8 text"),
        ("text.parquet", "text.parquet: need a readable file of Parquet"),
        ("empty.jsonl", "empty.jsonl: need at least one annotation, got none"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read_annotations(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outptu": b""}, "got 'outptu'; did you mean 'output'"),
        ({"output": "path.png"}, "output: need an encoded image, got 'path.png'"),
        ({"score_mean": float("nan")}, "score_mean: need a number from 1 to 5, got nan"),
        ({"sources": [None], "task": "edit"}, "sources: need an encoded image, got nothing"),
    ],
)
def test_a_wrong_row_of_parquet_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    table = pyarrow.Table.from_pylist([ROW | {"output": image(0)} | fields])
    parquet.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(ConfigError, match=rf"set\.parquet, row 1: .*{message}"):
        read_annotations(tmp_path / "set.parquet")


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = r"need pyarrow for Parquet files, .*pip install 'burnish\[parquet\]'"
    with pytest.raises(ConfigError, match=message):
        read_annotations(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=message):
        write_annotations(tmp_path / "a.parquet", FULL)
    write_annotations(tmp_path / "a.jsonl", FULL)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_the_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out: need a share of at least 0 and below 1"):
        split(FULL, held_out=share)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("hpdv2", "got 'hpdv2'; did you mean 'hpdv3'"),
        ("base", "need a public set of editreward, hpdv3, imagerewarddb, pickapic, got 'base'"),
        ("files", "got 'files'"),
    ],
)
def test_an_unknown_set_names_the_nearest(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(key)
