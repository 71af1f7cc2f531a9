"""The lines of a JSONL file: the place of every line is kept, and one line is read at a time."""

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from burnish.config import ConfigError
from burnish.records import object_of, unreadable
from burnish.row_stores.base import Fields, RowStore, no_column


class JsonRows(RowStore):
    """The lines of a JSONL file."""

    def __init__(self, path: Path, fields: Fields) -> None:
        self.folder, self.name = path.parent, path.stem
        self._path, self._fields = path, fields
        self._starts, self._lines = array("q"), array("q")

    def where(self, row: int) -> str:
        return f"{self._path}:{self._lines[row]}"

    def number(self, row: int) -> int:
        """Of its line."""
        return self._lines[row]

    def scan(self) -> Iterator[dict[str, Any]]:
        self._starts, self._lines = array("q"), array("q")
        seen: dict[str, None] = {}
        place = 0
        try:
            # By newline alone: JSON text may hold other characters that end a line.
            with self._path.open("rb") as file:
                for count, line in enumerate(file, start=1):
                    if not line.isspace():
                        self._starts.append(place)
                        self._lines.append(count)
                        found = self._object(line, count)
                        seen.update(dict.fromkeys(found))
                        yield self._taken(found, count)
                    place += len(line)
        except OSError as error:
            raise unreadable(self._path, error) from None
        for name, column in self._fields.columns.items():
            if seen and column not in seen:
                raise no_column(str(self._path), name, column, list(seen))

    def row(self, row: int) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._starts[row])
                line = file.readline()
        except OSError as error:
            raise unreadable(self._path, error) from None
        return self._taken(self._object(line, self._lines[row]), self._lines[row])

    def _object(self, line: bytes, count: int) -> dict[str, Any]:
        where = f"{self._path}:{count}"
        try:
            # Some editors write a mark before the first line.
            return object_of(line.decode("utf-8-sig" if count == 1 else "utf-8"), where)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: need UTF-8 text, got {error}; fix the line") from None

    def _taken(self, found: Mapping[str, Any], count: int) -> dict[str, Any]:
        columns = self._fields.columns or {name: name for name in found}
        wanted = columns.get(self._fields.required)
        if wanted is not None and wanted not in found:
            where = f"{self._path}:{count}"
            raise no_column(where, self._fields.required, wanted, list(found))
        return {n: found[c] for n, c in columns.items() if found.get(c) is not None}
