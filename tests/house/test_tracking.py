"""Run folders: whom they belong to, what is in them, and what a kill or a full disk leaves."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from burnish import tracking
from burnish.config import Config, config_hash, parse
from burnish.images import read
from burnish.progress import Progress, progress, track
from burnish.tracking import Run, RunError, atomic_folder, read_rows, write_atomic


class Inner(Config):
    """A section."""

    rate: float = 0.1


class Older(Config):
    """A small configuration."""

    steps: int = 2
    inner: Inner = Inner()


class Sample(Older):
    """The same with a setting that came later."""

    later: int = 1


def refused(folder: Path, config: Config) -> str:
    """The message of the error that the folder gives."""
    with pytest.raises(RunError) as caught:
        Run.create(folder, config)
    text = str(caught.value)
    assert "\n" not in text and ";" in text
    return text


def test_a_new_folder_holds_all_that_says_what_runs(tmp_path: Path) -> None:
    """Configuration, its hash, the command, the environment."""
    folder = tmp_path / "runs" / "first"
    run = Run.create(folder, Sample(), command="burnish run", environment={"threads": 1})
    assert parse(Sample, run.config()) == Sample()
    assert run.config_hash == config_hash(Sample())
    facts = json.loads((folder / "run.json").read_text())
    assert facts["command"] == "burnish run" and facts["format"] == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1 and environment["python"]
    assert Run.open(folder).config_hash == run.config_hash
    assert run.checkpoints == folder / "checkpoints"


def test_the_same_settings_take_a_run_up_again(tmp_path: Path) -> None:
    """Nothing of it is lost."""
    Run.create(tmp_path, Sample(), environment={"threads": 1}).log(1, {"loss": 1.0})
    before = (tmp_path / "run.json").read_bytes()
    run = Run.create(tmp_path, Sample(), environment={"threads": 9})
    assert run.metrics() == [{"step": 1, "loss": 1.0}]
    assert (tmp_path / "run.json").read_bytes() == before
    assert json.loads((tmp_path / "environment.json").read_text())["threads"] == 1


def test_a_folder_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    """The first setting that differs is named with both values, and nothing is written."""
    Run.create(tmp_path, Sample())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    text = refused(tmp_path, Sample(inner=Inner(rate=0.5)))
    assert "belongs to another run (inner.rate: 0.1 there, 0.5 here)" in text
    assert "--out" in text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_goes_on_after_a_setting_was_added_to_the_program(tmp_path: Path) -> None:
    """What did not exist had the default; any other value is another run."""
    Run.create(tmp_path, Older())
    assert "later: null there, 2 here" in refused(tmp_path, Sample(later=2))
    run = Run.create(tmp_path, Sample())
    assert run.config()["later"] == 1 and run.config_hash == config_hash(Sample())
    assert Run.open(tmp_path).config_hash == config_hash(Sample())


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A folder with holiday photos is no run, and stays as it is; a file is no folder."""
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert "holds photo.jpg" in refused(tmp_path, Sample())
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    assert "File exists" in refused(tmp_path / "photo.jpg", Sample())


def test_a_folder_whose_making_was_killed_is_taken(tmp_path: Path) -> None:
    """Before `run.json` there was no run."""
    Run.create(tmp_path, Sample())
    (tmp_path / "run.json").unlink()
    (tmp_path / ".config.yaml.tmp").write_text("half")
    assert Run.create(tmp_path, Sample(steps=9)).config()["steps"] == 9


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '"x"'])
def test_a_broken_run_file_is_one_line(tmp_path: Path, text: str) -> None:
    """It is neither overwritten nor trusted."""
    (tmp_path / "run.json").write_text(text)
    assert "need a readable" in refused(tmp_path, Sample())
    with pytest.raises(RunError, match="need a readable"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match=r"without run\.json"):
        Run.open(tmp_path / "none")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused while the first lives, and a kill lets it in."""
    code = (
        "import sys, time\nfrom burnish.config import Config\nfrom burnish.tracking import Run\n"
        "class Sample(Config):\n    steps: int = 2\n"
        f"Run.create({str(tmp_path / 'run')!r}, Sample())\nprint('up', flush=True)\ntime.sleep(99)"
    )

    class Sample(Config):
        steps: int = 2

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"up\n"
        text = refused(tmp_path / "run", Sample())
        other.kill()
    assert "another process is running in it" in text
    Run.create(tmp_path / "run", Sample())
    Run.create(tmp_path / "run", Sample())


def test_rows_go_to_two_files(tmp_path: Path) -> None:
    """What the seed decides apart from what the machine decides; timers end with their row."""
    run = Run.create(tmp_path, Sample())
    with run.timer("rollout"):
        time.sleep(0.01)
    with run.timer("rollout"):
        pass
    run.log(1, {"loss": torch.tensor(0.5), "time/step": 2.0, "note": "x", "bad": float("nan")})
    run.log(2, {"loss": 0.25})
    first = '{"step": 1, "loss": 0.5, "note": "x", "bad": null}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == first + '{"step": 2, "loss": 0.25}\n'
    (timings,) = run.timings()
    assert timings["time/step"] == 2.0 and 0.01 <= timings["time/rollout"] < 1


@settings(derandomize=True, max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(), min_size=1, max_size=8),
    checkpoint=st.integers(0, 7),
    torn=st.integers(0, 40),
)
def test_a_resumed_file_equals_one_that_was_not_broken(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], checkpoint: int, torn: int
) -> None:
    """Killed anywhere after a checkpoint, also in the middle of a row."""
    run = Run.create(tmp_path_factory.mktemp("run"), Sample())
    path = run.folder / "metrics.jsonl"
    for step, value in enumerate(values, start=1):
        run.log(step, {"loss": value, "time/step": value})
    whole = path.read_bytes()
    checkpoint = min(checkpoint, len(values))
    end = len(b"".join(whole.splitlines(keepends=True)[:checkpoint])) + torn
    path.write_bytes(whole[:end])
    run.rewind(checkpoint)
    assert [row["step"] for row in run.metrics()] == list(range(1, checkpoint + 1))
    assert len(run.timings()) <= checkpoint
    for step, value in enumerate(values, start=1):
        if step > checkpoint:
            run.log(step, {"loss": value})
    assert path.read_bytes() == whole
    run.rewind(-1)
    assert path.read_bytes() == b""


def test_a_row_without_its_line_break_is_dropped(tmp_path: Path) -> None:
    """The next row would be written behind it, on the same line."""
    run = Run.create(tmp_path, Sample())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    run.rewind(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_reading_rows_leaves_out_a_torn_one(tmp_path: Path) -> None:
    """And names the line of one that is broken in the middle; a missing file has no rows."""
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_rows(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2: need a JSON object"):
        read_rows(path)


def test_samples_lie_by_step_with_their_record(tmp_path: Path) -> None:
    """A name cannot lead out of the folder."""
    run = Run.create(tmp_path, Sample())
    path = run.save_sample(3, "t2i-0", Image.new("RGB", (8, 6), (9, 9, 9)), {"score": 0.5})
    assert path == tmp_path / "samples" / "step-000003" / "t2i-0.webp"
    assert read(path).size == (8, 6)
    assert json.loads(path.with_suffix(".json").read_text()) == {"score": 0.5}
    for name in ("../x", "a/b", "", ".hidden", ".."):
        with pytest.raises(RunError, match="plain file name"):
            run.save_sample(3, name, Image.new("RGB", (1, 1)))


def test_a_failed_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing half-written beside it; the error names the file and what to do."""
    path = tmp_path / "made" / "a.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        write_atomic(path, "new")
    assert "No space left on device; free some disk space" in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_folder_is_whole_or_not_at_all(tmp_path: Path) -> None:
    """Also after one that a kill left half-written, and where something stands in its place."""
    folder = tmp_path / "model"
    for name in ("before", "after"):
        with pytest.raises(KeyError), atomic_folder(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / name).touch()
            raise KeyError
        assert not list(tmp_path.iterdir())
    (tmp_path / ".model.tmp" / "left").mkdir(parents=True)
    with atomic_folder(folder) as unfinished:
        unfinished.mkdir()
        (unfinished / "whole").touch()
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["whole"]
    with pytest.raises(RunError, match=f"need to write {folder}"), atomic_folder(folder) as other:
        other.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics_is_one_line(tmp_path: Path) -> None:
    """With a real device that is full."""
    run = Run.create(tmp_path, Sample())
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl, got No space left on device; free some"):
        run.log(1, {"loss": 1.0})


def test_progress_without_a_terminal_is_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in ten seconds at most, nested or not, with the time left; short tasks say nothing."""
    clock = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    with progress("run", 100) as outer:
        for step in range(50):
            clock[0] += 0.5
            outer.advance(note=f"reward {step}")
            for _ in track(range(3), "inner"):
                clock[0] += 0.1
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == ""
    assert 3 <= len(lines) <= 5
    assert all("left" in line for line in lines[:-1] if line.startswith("run"))
    assert lines[-1] == "run: 50/100, 40 s, 40 s left"
    with progress("short", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    assert Progress._depth == 0


def test_progress_of_a_resumed_task_counts_only_its_own_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of a hundred in twenty seconds, after fifty done before: eighty seconds are left."""
    clock = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    with progress("run", 100, done=50) as bar:
        clock[0] = 20.0
        bar.advance(10)
    assert capsys.readouterr().err.splitlines()[0] == "run: 60/100, 20 s, 80 s left"


def test_progress_on_a_terminal_survives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars nest, and the screen is given back."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ValueError), progress("outer", 2) as outer:
        assert list(track(iter([1, 2]), "inner", total=2)) == [1, 2]
        outer.advance(note="reward 0.5")
        assert Progress._screen is not None
        raise ValueError
    assert Progress._screen is None and Progress._depth == 0
