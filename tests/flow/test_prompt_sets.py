"""One set in every form: equal prompts, equal draws, little memory, and faults by file and row.

What `datasets` has saved is the truth here, see `tests/saved_prompts.py`; the other forms are
written from its rows.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tests import saved_prompts
from tests.saved_prompts import COUNT, FOLDER

from burnish import cli, images, records
from burnish.config import ConfigError, parse
from burnish.prompt_sets import PromptSet
from burnish.prompts import GroupSampler, PromptsConfig, read_prompts, write_prompts
from burnish.row_stores import arrow
from burnish.types import MAX_SOURCES, Prompt

Row = dict[str, Any]


@pytest.fixture(scope="module")
def table() -> Any:
    """All rows, as `datasets` has written them."""
    files = sorted(FOLDER.glob("*.arrow"))
    return pyarrow.concat_tables(
        [pyarrow.ipc.open_stream(f.read_bytes()).read_all() for f in files]
    )


def rows_of(table: Any) -> list[Row]:
    return table.to_pylist()


def as_lines(table: Any, place: Path) -> Path:
    """JSON lines beside a folder of images."""
    (place / "images").mkdir()
    lines = []
    for row in rows_of(table):
        for key in ("source", "target"):
            if row[key] is not None:
                data = row[key]["bytes"]
                row[key] = f"images/{row['id']}-{key}.{images.media_type(data).split('/')[1]}"
                (place / row[key]).write_bytes(data)
        facts = json.loads(row.pop("facts"))
        lines.append(json.dumps({k: v for k, v in row.items() if v is not None} | {"facts": facts}))
    (place / "set.jsonl").write_text("\n".join(lines) + "\n\n")
    return place / "set.jsonl"


def as_file(table: Any, place: Path) -> Path:
    parquet.write_table(table, place / "set.parquet", row_group_size=7)
    return place / "set.parquet"


def as_plain_bytes(table: Any, place: Path) -> Path:
    """Images as binary, and no statistics that would tell which rows have one."""
    for key in ("source", "target"):
        data = [None if v is None else v["bytes"] for v in table[key].to_pylist()]
        table = table.set_column(table.schema.get_field_index(key), key, pyarrow.array(data))
    parquet.write_table(table, place / "p.parquet", row_group_size=16, write_statistics=False)
    return place / "p.parquet"


def as_shards(table: Any, place: Path) -> Path:
    for number, start in enumerate(range(0, COUNT, 20)):
        name = place / f"train-{number:05d}-of-00003.parquet"
        parquet.write_table(table.slice(start, 20), name, row_group_size=9)
    return place


def as_pattern(table: Any, place: Path) -> Path:
    parquet.write_table(table.slice(0, 1), place / "test-00000-of-00001.parquet")
    return as_shards(table, place) / "train-*.parquet"


def as_saved(table: Any, place: Path) -> Path:
    return FOLDER


def as_stream(table: Any, place: Path) -> Path:
    """As `datasets` saves it."""
    (place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pyarrow.ipc.new_stream(place / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    return place


def as_written(table: Any, place: Path) -> Path:
    """By ourselves, images inside."""
    write_prompts(place / "own.jsonl", read_prompts(FOLDER))
    return place / "own.jsonl"


BROKEN = [as_lines, as_file, as_plain_bytes, as_shards, as_pattern, as_stream]
FORMS = [*BROKEN, as_saved, as_written]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
Form = Callable[[Any, Path], Path]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return list(read_prompts(FOLDER))


# --- Laws ------------------------------------------------------------------------------------


def test_a_saved_set_is_what_was_saved(table: Any, prompts: list[Prompt]) -> None:
    assert len(prompts) == COUNT and len({p.id for p in prompts}) == COUNT
    for row, prompt in zip(rows_of(table), prompts, strict=True):
        assert (prompt.id, prompt.text, prompt.task) == (row["id"], row["text"], row["task"])
        assert prompt.category == row["category"] and list(prompt.tags) == row["tags"]
        assert prompt.facts == json.loads(row["facts"])
        for given, found in (
            (row["source"], next(iter(prompt.sources), None)),
            (row["target"], prompt.target),
        ):
            assert (given is None) == (found is None)
            if given is not None and found is not None:
                first, second = (images.decode(d, where="x") for d in (given["bytes"], found))
                assert first.tobytes() == second.tobytes() and first.size == (9, 7)


@forms
def test_every_form_gives_equal_prompts_in_order(
    form: Form, table: Any, prompts: list[Prompt], tmp_path: Path
) -> None:
    found = read_prompts(form(table, tmp_path))
    labels = [(entry.id, entry.task, entry.category) for entry in found.entries]
    assert labels == [(p.id, p.task, p.category) for p in prompts]
    assert list(found) == prompts
    assert [found[row] for row in (49, 0, 33, -1)] == [prompts[row] for row in (49, 0, 33, -1)]


@forms
def test_every_form_is_drawn_from_alike_and_goes_on_alike(
    form: Form, table: Any, prompts: list[Prompt], tmp_path: Path
) -> None:
    config = PromptsConfig(path=str(form(table, tmp_path)))

    def opened(every: Sequence[Prompt]) -> GroupSampler:
        return GroupSampler(every, per_step=5, seed=3, pool=lambda p: p.task)

    truth = opened([p for task in ("t2i", "edit") for p in prompts if p.task == task])
    sampler = opened(config.read())
    whole = [sampler.prompts(step) for step in range(8)]
    assert whole == [truth.prompts(step) for step in range(8)]
    again = opened(config.read())
    assert [again.prompts(step) for step in range(5, 8)] == whole[5:]


def test_a_selection_reads_nothing_and_keeps_its_order(prompts: list[Prompt]) -> None:
    found = read_prompts(FOLDER)
    edits = found.select(lambda p: p.task == "edit")
    assert list(edits[-3:]) == [p for p in prompts if p.task == "edit"][-3:]
    held = PromptSet.of(prompts)
    assert PromptSet.of(found) is found
    assert list(held.select(lambda p: p.id == "p-4")) == [prompts[4]]


def test_prompts_in_common_are_found_under_any_id(table: Any, tmp_path: Path) -> None:
    file = as_lines(table, tmp_path)
    every = [json.loads(line) for line in file.read_text().splitlines() if line]
    edits, texts = ([row for row in every if ("source" in row) == is_edit] for is_edit in (1, 0))
    other = [
        texts[0] | {"id": "renamed"},
        texts[1] | {"text": "what nobody has asked for"},
        edits[0] | {"id": "renamed-edit", "source": f"../{tmp_path.name}/{edits[0]['source']}"},
        edits[1] | {"id": "other-edit", "source": edits[0]["source"]},
    ]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    first, second = read_prompts(file), read_prompts(tmp_path / "other.jsonl")
    assert [e.id for e in second.shared(first).entries] == ["renamed", "renamed-edit"]
    assert {e.id for e in first.shared(second).entries} == {texts[0]["id"], edits[0]["id"]}
    # Images that stand in the rows are the same to nobody, but ids are: as in a copy of a set.
    write_prompts(tmp_path / "copy.jsonl", first)
    copy = read_prompts(tmp_path / "copy.jsonl")
    assert len(copy.shared(first)) == len(first.shared(copy)) == COUNT
    # Bytes are not read, so that an edit is known by its id.
    renamed = pyarrow.array([f"x-{name}" for name in table["id"].to_pylist()])
    theirs = table.set_column(table.schema.get_field_index("id"), "id", renamed)
    parquet.write_table(theirs, tmp_path / "renamed.parquet")
    held, anew = read_prompts(as_file(table, tmp_path)), read_prompts(tmp_path / "renamed.parquet")
    assert len(held.shared(held)) == COUNT
    assert [e.task for e in anew.shared(held).entries] == ["t2i"] * len(texts)
    in_memory = PromptSet.of(list(held))
    assert len(in_memory.shared(PromptSet.of(list(reversed(in_memory))))) == COUNT


def ours(found: Sequence[Prompt], task: str, count: int) -> list[Prompt]:
    return [prompt for prompt in found if prompt.task == task][:count]


def test_columns_of_another_name_are_mapped_and_others_left_out(
    table: Any, prompts: list[Prompt], tmp_path: Path
) -> None:
    names = {"text": "caption", "source": "input_image", "id": "key"}
    theirs = table.rename_columns([names.get(name, name) for name in table.column_names])
    theirs = theirs.append_column("score", pyarrow.array([0.5] * COUNT))
    parquet.write_table(theirs, tmp_path / "their set.parquet")
    found = PromptsConfig(path=str(tmp_path / "their set.parquet"), columns=names).read()
    wanted = [p for task in ("t2i", "edit") for p in prompts if p.task == task]
    assert [(p.id, p.text, p.sources) for p in found] == [(p.id, p.text, p.sources) for p in wanted]
    assert {p.category for p in found} == {"general"} and not any(p.target for p in found)
    # Written anew it has the usual ones, which sets that measure must have.
    given = [f"columns.{name}={column}" for name, column in names.items()]
    out = tmp_path / "ours.jsonl"
    write = ["prompts", "write", str(tmp_path / "their set.parquet"), *given, "--out", str(out)]
    assert cli.main([*write, "limit=3"]) == 0
    assert list(read_prompts(out)) == [p for task in ("t2i", "edit") for p in ours(found, task, 3)]
    assert cli.main(write) == 2
    # A set may have one task.
    parquet.write_table(theirs.slice(0, 1), tmp_path / "one.parquet")
    write = ["prompts", "write", str(tmp_path / "one.parquet"), *given[:1], "--out"]
    assert cli.main([*write, str(tmp_path / "one.jsonl")]) == 0
    assert len(read_prompts(tmp_path / "one.jsonl")) == 1
    assert cli.main([*write, str(out / "one.jsonl")]) == 2
    # Nothing is left of what could not be written.
    (tmp_path / "cut.png").write_bytes(b"no picture")
    rows = [{"text": "make it red"} | source for source in ({"task": "t2i"}, {"source": "cut.png"})]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write = ["prompts", "write", str(tmp_path / "cut.jsonl"), "--out", str(tmp_path / "no.jsonl")]
    assert cli.main(write) == 2 and not list(tmp_path.glob("no.jsonl*"))
    lines = [json.dumps({"caption": p.text, "key": p.id, "score": 1}) for p in prompts]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    found = read_prompts(tmp_path / "theirs.jsonl", {"text": "caption", "id": "key"})
    assert [(p.id, p.text) for p in found] == [(p.id, p.text) for p in prompts]


def image_columns(place: Path) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Columns of three rows with images, most without in the second, and which is the source."""
    data = saved_prompts.picture(1, "PNG")
    (place / "a.png").write_bytes(data)
    plain, paths = [data, None, data], ["a.png", None, "a.png"]
    records = [{"bytes": data, "path": "a.png"}, None, {"bytes": data, "path": None}]
    named = {"source": "image.png"}
    # Names with dots, as files of WebDataset have them.
    yield {"image.png": plain}, named
    yield {"image.png": records}, named
    yield {"image": [{"png": 1}] * 3, "image.png": plain, "image.png.png": [1] * 3}, named
    yield {"source": pyarrow.array(paths).dictionary_encode()}, {"source": "source"}
    # Lists of one, and of several; records may have a path or not.
    images = [records[0]] * 3, [], [records[2]]
    for lists in (images, (images[2], None, images[2]), images[:1] * 3):
        in_bytes = [None if own is None else [one["bytes"] for one in own] for own in lists]
        for kind in (pyarrow.list_, pyarrow.large_list):
            yield {"source": pyarrow.array(in_bytes, kind(pyarrow.binary()))}, {"source": "source"}
        yield {"source": list(lists)}, {"source": "source"}
    pairs = pyarrow.list_(pyarrow.binary(), 2)
    yield {"source": pyarrow.array([[data] * 2, None, [data] * 2], pairs)}, {"source": "source"}
    yield {"source": [[data]] * 3}, {"source": "source"}


@pytest.mark.parametrize("has_statistics", [True, False, None], ids=["told", "untold", "saved"])
def test_a_set_is_opened_by_the_images_that_its_rows_have(
    has_statistics: bool | None, tmp_path: Path
) -> None:
    for own, named in image_columns(tmp_path):
        table = pyarrow.table({"text": ["a", "b", "c"], **own})
        if has_statistics is None:
            path = as_stream(table, tmp_path)
        else:
            path = tmp_path / "set.parquet"
            parquet.write_table(table, path, write_statistics=has_statistics)
        found = read_prompts(path, {"text": "text", **named})
        labels = [(entry.task, entry.num_sources) for entry in found.entries]
        assert [task for task, _ in labels][::2] == ["edit", "edit"]
        assert labels == [(prompt.task, len(prompt.sources)) for prompt in found]


def test_rows_without_an_id_are_called_by_their_place(table: Any, tmp_path: Path) -> None:
    """However many files they are in."""
    bare = table.select(["text"])
    (tmp_path / "bare").mkdir()
    found = read_prompts(as_shards(bare, tmp_path / "bare"))
    assert [p.id for p in found] == [f"bare-{number}" for number in range(1, COUNT + 1)]


# --- Memory ----------------------------------------------------------------------------------

_DRAW = """
import os, random, resource, sys
from pathlib import Path
from burnish.prompts import GroupSampler, read_prompts
import pyarrow.parquet
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = resident()
prompts = read_prompts(Path(sys.argv[1]))
drawn = GroupSampler(prompts, per_step=12, seed=0).prompts(0)
print(len(prompts), len({p.sources for p in drawn}), resident() - before, flush=True)
# Pyarrow's threads may abort a process that ends.
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read there")
@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_hundred_thousand_prompts_stay_on_disk(form: str, tmp_path: Path) -> None:
    """Their images are 800 MB; opening the set and drawing twelve takes less than half of that.

    It takes 50 to 80, and more where the allocator keeps what was freed.
    """
    # Most of a picture's bytes follow its end, where no decoder looks, so that they cost no time.
    head = images.encode_png(images.to_pil(_noise()))
    schema = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.binary())])
    if form == "saved":
        path = tmp_path / "data.arrow"
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        writer = pyarrow.ipc.new_stream(path, schema)
    else:
        path = tmp_path / "data.parquet"
        writer = parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False)
    with writer:
        for start in range(0, 100_000, 500):
            texts = [f"make it {number}" for number in range(start, start + 500)]
            data = [head + b"%8000d" % number for number in range(start, start + 500)]
            writer.write_batch(pyarrow.record_batch([texts, data], schema=schema))
    assert path.stat().st_size > 800e6
    given = path if form == "parquet" else tmp_path
    done = subprocess.run(
        [sys.executable, "-c", _DRAW, str(given)], capture_output=True, text=True, check=True
    )
    count, different, grown = map(int, done.stdout.split())
    assert count == 100_000 and different == 1, "twelve equal pictures"
    assert grown < 400e6, f"{grown / 1e6:.0f} MB"


def test_an_image_of_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    data = images.encode_png(images.to_pil(_noise(300)))
    one = pyarrow.array([0, None, *[0] * 998], pyarrow.int32())
    table = pyarrow.table(
        {
            "text": [f"make it {number}" for number in range(1000)],
            "source": pyarrow.DictionaryArray.from_arrays(one, [data]),
        }
    )
    path = tmp_path / "shared.parquet"
    # Rows that are there are looked for, in a column that is not known as a dictionary.
    parquet.write_table(table, path, write_statistics=False, store_schema=False)
    # Nobody else uses this pool, which outlives all that is in it.
    usual, pool = pyarrow.default_memory_pool(), pyarrow.system_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        found = read_prompts(path)
        assert images.decode(found[7].sources[0], where="x").size == (300, 300)
    finally:
        pyarrow.set_memory_pool(usual)
    assert [entry.num_sources for entry in found.entries[:3]] == [1, 0, 1]
    assert pool.max_memory() < 20 * len(data)


def _noise(size: int = 8) -> Any:
    import torch

    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))


# --- Faults ----------------------------------------------------------------------------------


def refused(path: Path, columns: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_prompts(path, columns))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_set_is_refused(table: Any, tmp_path: Path) -> None:
    said = refused(Path("someone/some-prompts"))
    assert "hf download someone/some-prompts --repo-type dataset" in said
    assert "which is none; check the path" in refused(tmp_path / "gone.jsonl")
    assert "got neither; check the path" in refused(tmp_path)
    for place in ("data", "train"):
        (tmp_path / place).mkdir()
    as_file(table, tmp_path / "data")
    assert f"give {tmp_path / 'data'}" in refused(tmp_path)
    shutil.copytree(FOLDER, tmp_path / "train", dirs_exist_ok=True)
    (tmp_path / "data" / "set.parquet").unlink()
    assert f"give {tmp_path / 'train'}" in refused(tmp_path)
    one = tmp_path / "train" / "data-00000-of-00003.arrow"
    assert f"give {tmp_path / 'train'}" in refused(one)


def test_shards_are_of_one_split_and_all_there(table: Any, tmp_path: Path) -> None:
    as_pattern(table, tmp_path)
    assert "got test, train; give" in refused(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    assert "need 3 files of train, as their names tell, got 2" in refused(tmp_path)


@pytest.mark.parametrize("form", [as_file, as_saved], ids=["parquet", "saved"])
def test_columns_are_known_before_rows_are_read(form: Form, table: Any, tmp_path: Path) -> None:
    path = form(table, tmp_path)
    there = "got the columns id, text, task, category, source, target, tags, facts"
    said = refused(path, {"text": "txt"})
    assert f"need a column 'txt' for text, {there}; did you mean 'text'?" in said
    said = refused(path, {"text": "text", "source": "picture_in"})
    assert f"need a column 'picture_in' for source, {there}" in said


def test_strange_columns_are_refused(table: Any, tmp_path: Path) -> None:
    for old, new, words in (
        ("text", "caption", "need a column 'text' for text, got the columns id, caption, task"),
        ("category", "categry", "got 'categry'; did you mean 'category'?"),
    ):
        names = [new if name == old else name for name in table.column_names]
        parquet.write_table(table.rename_columns(names), tmp_path / "x.parquet")
        assert words in refused(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"caption": "a"}\n')
    said = refused(tmp_path / "x.jsonl", {"text": "captoin"})
    assert "x.jsonl:1: need a column 'captoin' for text, got the columns caption; did" in said
    said = refused(tmp_path / "x.jsonl", {"text": "caption", "source": "image"})
    assert "x.jsonl: need a column 'image' for source, got the columns caption" in said
    for given, words in (
        ({"txt": "caption"}, "columns: need keys of id, text, .*; did you mean 'text'"),
        ({"id": "key"}, "columns: need the column of text"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(PromptsConfig, {"path": "x", "columns": given})


def test_rows_are_refused_when_a_set_is_opened(table: Any, tmp_path: Path) -> None:
    for key, value, words in (
        ("id", "p-0", "row 12: need distinct ids, got 'p-0' twice"),
        ("id", "a/b", "row 12: need an id of letters"),
        ("text", None, 'row 12: need an object with a "text"'),
        ("task", "t2i", "row 12: need a source image for an edit only, got a source image for t2i"),
        ("source", None, "row 12: need a source image for an edit only, got no source image"),
        ("source", {"bytes": None, "path": None}, "row 12: need a source image for an edit only"),
        ("facts", "{", "row 12: facts: need one JSON object"),
    ):
        rows = rows_of(table)
        rows[29][key] = value
        parts = [rows[:18], rows[18:]]
        for name, part in zip("ab", parts, strict=True):
            own = pyarrow.Table.from_pylist(part, schema=table.schema)
            parquet.write_table(own, tmp_path / f"{name}.parquet", row_group_size=5)
        with pytest.raises(ConfigError) as caught:
            read_prompts(tmp_path)
        assert f"{tmp_path / 'b.parquet'}, {words}" in str(caught.value)


def test_facts_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    facts = [{"when": date(2020, 1, 1)}]
    parquet.write_table(pyarrow.table({"text": ["a"], "facts": facts}), tmp_path / "f.parquet")
    said = refused(tmp_path / "f.parquet")
    assert "row 1: need facts that JSON can hold, got Object of type date" in said


def test_too_many_sources_are_refused_when_a_set_is_opened(tmp_path: Path) -> None:
    records = [{"bytes": saved_prompts.picture(1, "PNG"), "path": None}] * (MAX_SOURCES + 1)
    for sources in (records, [record["bytes"] for record in records]):
        table = pyarrow.table({"text": ["a", "b"], "source": [sources[:1], sources]})
        parquet.write_table(table, tmp_path / "many.parquet")
        for path in (tmp_path / "many.parquet", as_stream(table, tmp_path)):
            with pytest.raises(ConfigError, match=f"row 2: need at most {MAX_SOURCES} source imag"):
                read_prompts(path)


@pytest.mark.parametrize("form", BROKEN, ids=lambda form: form.__name__)
def test_a_broken_image_is_named_when_it_is_drawn_or_looked_for(
    form: Form, table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = rows_of(table)[1]
    row["source"]["bytes"] = row["source"]["bytes"][:60]
    cut = pyarrow.Table.from_pylist([row], schema=table.schema)
    path = form(pyarrow.concat_tables([table.slice(0, 1), cut, table.slice(2)]), tmp_path)
    found = read_prompts(path)
    assert [entry.id for entry in found.entries][1] == "p-1" and found[2].id == "p-2"
    for read in (found.__getitem__, found.check):
        with pytest.raises(ConfigError, match=r"(:2|, row 2): .*need a whole PNG") as caught:
            read(1)
        assert "\n" not in str(caught.value)
    assert cli.main(["prompts", "check", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("broken: ") and "edit/general: 16 prompts" in out
    assert "got 1 broken ones of 50" in err and err.count("burnish: ") == 1


def test_a_whole_set_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prompts", "check", str(FOLDER), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["prompts"] == COUNT and said["by"]["t2i/portrait"] == 8


def test_damaged_files_are_refused(table: Any, tmp_path: Path) -> None:
    whole = as_file(table, tmp_path).read_bytes()
    (tmp_path / "set.parquet").write_bytes(whole[:-100])
    assert "need a readable file of Parquet" in refused(tmp_path / "set.parquet")
    shutil.copytree(FOLDER, tmp_path / "saved")
    last = tmp_path / "saved" / "data-00002-of-00003.arrow"
    data = last.read_bytes()
    # Before the mark of its end, so that nothing but the mark is missing.
    for part in (data[:-8], data[: len(data) // 2], b""):
        last.write_bytes(part)
        assert "need a readable file of Arrow" in refused(tmp_path / "saved")
    last.unlink()
    assert "need a readable file of Arrow" in refused(tmp_path / "saved")


def test_row_groups_that_would_fill_the_memory_are_refused(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_file(table, tmp_path)
    monkeypatch.setattr(arrow, "MAX_GROUP", 1000)
    assert "need row groups of at most" in refused(path) and "row_group_size" in refused(path)
    theirs = table.rename_columns([{"source": "in.png"}.get(n, n) for n in table.column_names])
    parquet.write_table(theirs, path)
    named = {"text": "text", "source": "in.png"}
    monkeypatch.setattr(arrow, "MAX_GROUP", theirs["in.png"].nbytes)
    assert "need row groups of at most" in refused(path, named)


def test_a_file_is_read_by_arrow_itself(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never through a file of Python's: a thread of arrow's that lets go of one after Python has
    ended aborts the process."""
    opened: list[Any] = []

    class Noted(parquet.ParquetFile):
        def __init__(self, source: Any, **settings: Any) -> None:
            opened.append(source)
            super().__init__(source, **settings)

    monkeypatch.setattr(parquet, "ParquetFile", Noted)
    path = as_file(table, tmp_path)
    found = read_prompts(path)
    assert found[3].text and len(list(records.parquet_rows(path))) == COUNT
    assert len(opened) >= 3
    for source in opened:
        assert isinstance(source, pyarrow.NativeFile) and not isinstance(source, pyarrow.PythonFile)


def test_a_set_that_changes_under_a_run_is_refused(table: Any, tmp_path: Path) -> None:
    path = as_lines(table, tmp_path)
    found = read_prompts(path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0].replace('"p-0"', '"q-0"'), *lines[1:]]))
    assert found[1].id == "p-1"
    with pytest.raises(ConfigError, match="got 'q-0' in the place of 'p-0'; start again"):
        found[0]
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        found[1]
