"""Rows of a long job: a line for each piece of work as it is done, a file for each process.

A job that was killed reads what all its processes wrote, however many there were, and does the
rest.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from burnish.runtime import Runtime
from burnish.tracking import read_rows, write_atomic, writing


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
