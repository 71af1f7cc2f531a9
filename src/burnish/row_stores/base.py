"""What is wanted of rows, and what every store of them offers: rows by number, and a scan that
leaves large values where they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.config import ConfigError
from burnish.wording import nearest

PRESENT = b"not read"
"""Stands in a scan for a large value that is there, a list of it for a list; known by identity."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What is wanted of every row."""

    names: tuple[str, ...]
    """All that a row may have."""
    required: str
    """What every row must have."""
    large: tuple[str, ...]
    """What a scan does not read, such as images."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of each name; only these are read then. Empty: columns are called as the names."""

    def among(self, columns: Sequence[str], where: str) -> dict[str, str]:
        """Column of each name, of a table with these columns.

        Raises:
            ConfigError: a column that is not there, or one that has no name here.
        """
        given = self.columns or {name: name for name in columns}
        needed = {self.required: self.required, **given}
        for name, column in needed.items():
            if column not in columns:
                raise no_column(where, name, column, columns)
        for name in given:
            if name not in self.names:
                raise ConfigError(
                    f"{where}: need columns of {', '.join(self.names)}, got {name!r}; did you mean "
                    f"{nearest(name, self.names) or self.required!r}? The setting `columns` names "
                    "those that are called otherwise, and leaves out all others"
                )
        return dict(given)


def no_column(where: str, name: str, column: str, columns: Sequence[str]) -> ConfigError:
    """The error that a missing column deserves."""
    meant = nearest(column, columns)
    advice = f"did you mean {meant!r}?" if meant else f"set columns.{name} to one of them"
    advice += " (a set without that setting: `burnish prompts write` gives it the usual names)"
    return ConfigError(
        f"{where}: need a column {column!r} for {name}, got the columns {', '.join(columns)}; "
        f"{advice}"
    )


class RowStore(ABC):
    """Rows by number. A row is plain data by name, without what is null."""

    folder: Path
    """What paths in rows are relative to."""
    name: str
    """Of the whole set."""

    @abstractmethod
    def where(self, row: int) -> str:
        """File and row, for messages; of a row that was scanned."""

    def number(self, row: int) -> int:
        """What a row is called by where it has no id: its place in the set, from 1."""
        return row + 1

    @abstractmethod
    def scan(self) -> Iterator[dict[str, Any]]:
        """Every row in order, with `PRESENT` for large values where those can be left unread.

        Raises:
            ConfigError: a file that cannot be read.
        """

    @abstractmethod
    def row(self, row: int) -> dict[str, Any]:
        """One whole row, of a store that was scanned.

        Raises:
            ConfigError: a file that cannot be read.
        """
