"""Rows of Parquet, and of data sets that `datasets` has saved with `save_to_disk`.

A row group of Parquet is what can be read at once, so the last one read is kept in memory, and
groups that are too large for that are refused. The files of a saved data set are mapped into
memory, so that only the pages of a row are read.

Needs `pyarrow`, the extra `burnish[parquet]`, and never a network. The package `datasets` is not
used: it would first copy Parquet into a cache of its own.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from burnish.config import ConfigError
from burnish.records import json_object, opened_by_arrow, parquet_modules, unreadable
from burnish.row_stores.base import PRESENT, Fields, RowStore

MAX_GROUP = 512 << 20
"""Bytes of the wanted columns of a row group of Parquet, at most."""

_BATCH = 1024
_DICTIONARIES = {"PLAIN_DICTIONARY", "RLE_DICTIONARY"}
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""What a stream of Arrow ends with."""


class _Group(NamedTuple):
    """A row group of Parquet."""

    file: int
    number: int
    first: int
    """Row of the whole set that it begins with."""
    first_in_file: int


class _Leaves(NamedTuple):
    """What a column of Parquet is stored as."""

    places: range
    is_list: bool


class ParquetRows(RowStore):
    """The rows of Parquet files, one file after the other."""

    def __init__(self, folder: Path, files: Sequence[Path], fields: Fields) -> None:
        self.folder = folder
        self.name = files[0].stem if len(files) == 1 else folder.name
        self._files, self._large = list(files), fields.large
        self._pyarrow, self._parquet = parquet_modules()
        self._heads: list[Any] = []
        self._columns: list[dict[str, str]] = []
        self._leaves: list[dict[str, _Leaves]] = []
        self._groups: list[_Group] = []
        self._held: tuple[int, Any] | None = None
        rows = 0
        for place, path in enumerate(self._files):
            with _reading(path, self._pyarrow), opened_by_arrow(path) as data:
                file = self._parquet.ParquetFile(data)
                head, schema = file.metadata, file.schema_arrow
            columns = fields.among(schema.names, str(path))
            self._heads.append(head)
            self._columns.append(columns)
            self._leaves.append(_leaves(schema, self._pyarrow.types))
            first = 0
            for number in range(head.num_row_groups):
                _check_size(self._parts(place, number), str(path), number)
                self._groups.append(_Group(place, number, rows + first, first))
                first += head.row_group(number).num_rows
            rows += first
        self._starts = [group.first for group in self._groups]

    def where(self, row: int) -> str:
        group = self._groups[self._group_of(row)]
        own = group.first_in_file + row - group.first
        return f"{self._files[group.file]}, row {own + 1}"

    def scan(self) -> Iterator[dict[str, Any]]:
        for group in self._groups:
            columns = self._columns[group.file]
            small = {n: c for n, c in columns.items() if n not in self._large}
            marks = {n: self._marks(group, columns[n]) for n in columns if n in self._large}
            wanted = list(dict.fromkeys(small.values()))
            with self._opened(group) as file:
                batches = file.iter_batches(_BATCH, [group.number], wanted, use_threads=False)
                yield from _scanned(batches, small, marks)

    def row(self, row: int) -> dict[str, Any]:
        place = self._group_of(row)
        group = self._groups[place]
        if self._held is None or self._held[0] != place:
            # First let go, so that two are never held at once.
            self._held = None
            self._held = place, self._read(group, list(self._columns[group.file].values()))
        return _one(self._held[1], row - group.first, self._columns[group.file])

    def _group_of(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1

    @contextmanager
    def _opened(self, group: _Group, shared: Sequence[str] = ()) -> Iterator[Any]:
        """The file of a group, whose leaves of these paths stay dictionaries."""
        path, head = self._files[group.file], self._heads[group.file]
        with _reading(path, self._pyarrow), opened_by_arrow(path) as data:
            yield self._parquet.ParquetFile(data, metadata=head, read_dictionary=shared)

    def _read(self, group: _Group, columns: Sequence[str]) -> Any:
        # A value that many rows share is in memory once, as it is in the file.
        parts = self._parts(group.file, group.number)
        shared = [part.path_in_schema for part in parts if _is_dictionary(part)]
        with self._opened(group, shared) as file:
            return file.read_row_group(group.number, columns=columns, use_threads=False)

    def _parts(self, file: int, number: int) -> list[Any]:
        """What the wanted columns of a group are stored as."""
        head, leaves = self._heads[file].row_group(number), self._leaves[file]
        columns = dict.fromkeys(self._columns[file].values())
        return [head.column(place) for column in columns for place in leaves[column].places]

    def _marks(self, group: _Group, column: str) -> list[Any]:
        """As `_marks` of a group's column, from the statistics where they tell."""
        head, leaves = self._heads[group.file].row_group(group.number), self._leaves[group.file]
        own = [head.column(place) for place in leaves[column].places]
        nulls = [p.statistics.null_count if _has_nulls(p) else None for p in own]
        is_list = leaves[column].is_list
        if 0 in nulls and own[0].num_values == head.num_rows:
            return [[PRESENT] if is_list else PRESENT] * head.num_rows
        if is_list:
            # All that a record has are lists of the same lengths.
            smallest = min(own, key=lambda part: part.total_uncompressed_size)
            return _marks(self._read(group, [smallest.path_in_schema])[column])
        if all(count == part.num_values for count, part in zip(nulls, own, strict=True)):
            return [None] * head.num_rows
        # The path of an image is short, and enough where all records that are there have bytes.
        short = [p.path_in_schema for p in own if p.path_in_schema.endswith(".path")]
        if short:
            paths = self._read(group, short)[column]
            if paths.null_count in nulls:
                return _standing(paths.is_valid().to_pylist())
        return _marks(self._read(group, [column])[column])


def _has_nulls(part: Any) -> bool:
    return part.is_stats_set and part.statistics.has_null_count


def _leaves(schema: Any, types: Any) -> dict[str, _Leaves]:
    """What each column is stored as: paths do not tell, as names may hold dots."""
    found: dict[str, _Leaves] = {}
    first = 0
    for column in schema:
        places = range(first, first := first + _num_leaves(column.type))
        is_list = types.is_nested(column.type) and not types.is_struct(column.type)
        found[column.name] = _Leaves(places, is_list)
    return found


def _num_leaves(kind: Any) -> int:
    kind = getattr(kind, "storage_type", kind)
    return sum(_num_leaves(kind.field(place).type) for place in range(kind.num_fields)) or 1


def _is_dictionary(part: Any) -> bool:
    """Whether values are in a dictionary that can be kept: beside others as they are at most."""
    encodings = set(part.encodings)
    is_plain = encodings <= {"PLAIN", "RLE", "BIT_PACKED", *_DICTIONARIES}
    return part.physical_type == "BYTE_ARRAY" and is_plain and bool(encodings & _DICTIONARIES)


def _check_size(parts: Sequence[Any], path: str, number: int) -> None:
    size = sum(part.total_uncompressed_size for part in parts)
    if size > MAX_GROUP:
        raise ConfigError(
            f"{path}: need row groups of at most {MAX_GROUP >> 20} MiB, as one is read whole for a "
            f"row, got {size >> 20} MiB in group {number}; write it again with smaller ones (in "
            "pyarrow row_group_size=100)"
        )


class SavedRows(RowStore):
    """The rows of a data set that `datasets` has saved with `save_to_disk`."""

    def __init__(self, folder: Path, fields: Fields) -> None:
        self.folder, self.name = folder, folder.name
        self._large = fields.large
        self._pyarrow, _ = parquet_modules()
        state = json_object(folder / "state.json")
        if state.get("_indices_data_files"):
            raise ConfigError(
                f"{folder}: need rows in their own order, got an old data set with an index beside "
                "it; save it again with a newer version of `datasets`"
            )
        named = state.get("_data_files") or []
        names = [Path(str(entry.get("filename"))).name for entry in named]
        parts = [self._mapped(folder / name) for name in names]
        if not parts:
            raise ConfigError(
                f"{folder}: need files of rows, got none in state.json; save it again"
            )
        self._columns = fields.among(parts[0].schema.names, str(folder))
        with _reading(folder, self._pyarrow, "Arrow"):
            columns = list(dict.fromkeys(self._columns.values()))
            self._table = self._pyarrow.concat_tables([part.select(columns) for part in parts])
            # A damaged file must not be found by a crash.
            self._table.validate(full=True)

    def where(self, row: int) -> str:
        return f"{self.folder}, row {row + 1}"

    def scan(self) -> Iterator[dict[str, Any]]:
        small = {n: c for n, c in self._columns.items() if n not in self._large}
        marks = {
            name: _marks(self._table.column(c))
            for name, c in self._columns.items()
            if name in self._large
        }
        wanted = self._table.select(list(dict.fromkeys(small.values())))
        yield from _scanned(wanted.to_batches(_BATCH), small, marks)

    def row(self, row: int) -> dict[str, Any]:
        return _one(self._table, row, self._columns)

    def _mapped(self, path: Path) -> Any:
        with _reading(path, self._pyarrow, "Arrow"):
            with path.open("rb") as file:
                file.seek(-len(_END), 2)
                if file.read() != _END:
                    # What is left would be read as a smaller set.
                    raise ValueError("one that is cut off")
            return self._pyarrow.ipc.open_stream(self._pyarrow.memory_map(str(path))).read_all()


@contextmanager
def _reading(path: Path, pyarrow: Any, kind: str = "Parquet") -> Iterator[None]:
    """Faults of a file as errors of the user's."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error, kind) from None


def _scanned(
    batches: Iterable[Any], small: Mapping[str, str], marks: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    """Rows of small columns, with marks in the place of large values."""
    row = 0
    for batch in batches:
        for found in batch.to_pylist():
            large = {n: own[row] for n, own in marks.items() if own[row] is not None}
            yield _plain(found, small) | large
            row += 1


def _one(table: Any, row: int, columns: Mapping[str, str]) -> dict[str, Any]:
    (found,) = table.slice(row, 1).to_pylist()
    return _plain(found, columns)


def _plain(found: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row by name. A record of nothing is nothing, too: so is an image that is not there."""
    named = {name: found[column] for name, column in columns.items()}
    return {n: v for n, v in named.items() if not _is_nothing(v)}


def _marks(column: Any) -> list[Any]:
    """What stands in the place of each value of a column: `PRESENT`, a list of as many as a list
    has, or None for nothing, a record of nothing and an empty list."""
    return [mark for part in column.chunks for mark in _marks_of_part(part)]


def _marks_of_part(part: Any) -> list[Any]:
    # Dictionaries have a type of values, too.
    if hasattr(part, "value_lengths"):
        lengths = part.value_lengths().fill_null(0).to_pylist()
        lists = {length: [PRESENT] * length or None for length in set(lengths)}
        return [lists[length] for length in lengths]
    found = np.asarray(part.is_valid())
    if part.type.num_fields:
        parts = [np.asarray(own.is_valid()) for own in part.flatten()]
        found &= np.any(parts, axis=0)
    return _standing(found.tolist())


def _standing(found: Iterable[bool]) -> list[Any]:
    return [PRESENT if here else None for here in found]


def _is_nothing(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else (value,)
    return all(part is None for part in parts)
