"""Rows of a long job outlive a kill, and every process reads those of all."""

from pathlib import Path

import pytest
import torch

from burnish import runtime
from burnish.ledger import Ledger, digest_of, pin, read_ledger
from burnish.tracking import RunError

CPU = runtime.Runtime(device=torch.device("cpu"), dtype=torch.float32)


def test_rows_of_a_killed_process_are_read_and_the_next_stand_on_lines_of_their_own(
    tmp_path: Path,
) -> None:
    assert read_ledger(tmp_path, "rows") == []
    Ledger(tmp_path / "job", "rows", CPU).add([{"a": 1}, {"a": 2}])
    path = tmp_path / "job" / "rows-0.jsonl"
    # What a kill in the middle of a write leaves.
    path.write_text(path.read_text() + '{"a": 3')
    (tmp_path / "job" / "rows-1.jsonl").write_text('{"a": 10}\n')
    assert read_ledger(tmp_path / "job", "rows") == [{"a": 1}, {"a": 2}, {"a": 10}]
    Ledger(tmp_path / "job", "rows", CPU).add([{"a": 4}])
    assert [row["a"] for row in read_ledger(tmp_path / "job", "rows")] == [1, 2, 4, 10]


def test_a_job_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    files = [tmp_path / "a.txt", tmp_path / "missing"]
    begun = digest_of(files)
    for _ in range(2):
        pin(tmp_path / "job", "inputs", {"the files": digest_of(files), "words": "same"})
    (tmp_path / "a.txt").write_text("two")
    assert digest_of(files) != begun
    with pytest.raises(RunError, match=r"need the files as they were when .* was begun"):
        pin(tmp_path / "job", "inputs", {"the files": digest_of(files), "words": "same"})


def test_a_line_that_is_no_row_and_a_place_that_is_no_folder_stop_the_job(tmp_path: Path) -> None:
    (tmp_path / "rows-0.jsonl").write_text("broken\n")
    with pytest.raises(RunError, match="line 1"):
        read_ledger(tmp_path, "rows")
    with pytest.raises(RunError, match="need to write"):
        Ledger(tmp_path / "rows-0.jsonl", "rows", CPU)
