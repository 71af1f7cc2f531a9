"""What a long job writes down so that it can go on: its rows, and what it was begun with.

Rows are a line for each piece of work as it is done, in a file for each process. A job that was
killed reads what all its processes wrote, however many there were, and does the rest. That is right
only while its inputs are what they were: a run folder knows its settings, and settings name files
by path, whose content may change.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from burnish.runtime import Runtime
from burnish.tracking import RunError, read_rows, write_atomic, write_json, writing


class Ledger:
    """The file to which this process adds its rows."""

    def __init__(self, folder: Path, name: str, rt: Runtime) -> None:
        """Open it, without the line on which a process was killed.

        Args:
            folder: of the job; made if missing.
            name: of the files, `name-0.jsonl` and so on.
            rt: whose rank this is; every rank must come here.
        """
        self._path = folder / f"{name}-{rt.rank}.jsonl"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                data = self._path.read_text(encoding="utf-8")
                if not data.endswith("\n"):
                    write_atomic(self._path, data[: data.rfind("\n") + 1])
        rt.barrier()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; once this returns, a kill leaves them there."""
        lines = [json.dumps(row) + "\n" for row in rows]
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def read_ledger(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows that all processes wrote under a name; none if nobody did.

    Raises:
        RunError: a line that is no row.
    """
    return [row for path in sorted(folder.glob(f"{name}-*.jsonl")) for row in read_rows(path)]


def pin(folder: Path, name: str, facts: Mapping[str, str]) -> None:
    """Write down what a job is begun with, or refuse to go on with something else.

    Args:
        folder: of the job; made if missing.
        name: of the file, without suffix.
        facts: digests by what they are of, in the words of a message.

    Raises:
        RunError: the job was begun with other ones.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        write_json(path, facts)
        return
    known = read_pin(folder, name)
    changed = sorted(key for key in known.keys() | facts.keys() if known.get(key) != facts.get(key))
    if changed:
        raise RunError(
            f"need {', '.join(changed)} as they were when {folder} was begun, got changed ones; "
            "choose another folder with --out"
        )


def pin_files(folder: Path, name: str, files: Mapping[str, Iterable[Path]]) -> None:
    """Likewise of files whose content decides what a job leaves.

    Args:
        folder: as for `pin`.
        name: likewise.
        files: by the key of those that read them.

    Raises:
        RunError: their content is another one.
    """
    pin(folder, name, {f"the files of {key}": digest_of(paths) for key, paths in files.items()})


def read_pin(folder: Path, name: str) -> dict[str, str]:
    """What a job was begun with; nothing if it was not.

    Raises:
        RunError: the file cannot be read.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        raise RunError(f"{path}: need one JSON object, got something else; restore the file")
    return known


def digest_of(paths: Iterable[Path]) -> str:
    """One digest of the names and contents of files; folders and missing files are left out."""
    found = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            found.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]
