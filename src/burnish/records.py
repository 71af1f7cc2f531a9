"""Rows out of JSON lines, JSON lists, CSV and Parquet, and single fields and images out of rows.

Data sets come from strangers, so every fault is a `ConfigError` of one line that names the file,
the line or row, and the field. Rows come one after the other: the first thousand of a large set
cost no more than that. Parquet needs `pyarrow`, the extra `burnish[parquet]`.
"""

import csv
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from burnish import images
from burnish.config import ConfigError
from burnish.wording import brief, shown

Row = Mapping[str, Any]
"""One row as plain data, by column."""

_CHUNK = 1 << 16
_LONGEST = 1 << 22
"""Characters of one entry of a JSON list; a list that is cut or broken is noticed this early."""
_BATCH = 64
"""Rows of Parquet that are in memory at once: each may hold several images."""
_NO_SPACE = re.compile(r"[^ \t\r\n]")


def wrong(where: str, key: str, needed: str, given: object, advice: str) -> ConfigError:
    """The error that one field of one row deserves."""
    return ConfigError(f"{where}: {key}: need {needed}, got {shown(given)}; {advice}")


def text(
    row: Row, key: str, where: str, *, default: str | None = None, may_be_empty: bool = False
) -> str:
    """The text under a key.

    Args:
        row: where to look.
        key: what for.
        where: file and row, for messages.
        default: what an absent key stands for; None where it must be there.
        may_be_empty: whether blank text is an answer.

    Raises:
        ConfigError: no text, or blank text.
    """
    given = row.get(key, default)
    if not isinstance(given, str) or not (may_be_empty or given.strip()):
        raise wrong(where, key, "some text", given, "write it")
    return encodable(given, key, where)


def encodable(given: str, key: str, where: str) -> str:
    """A text as it is, if it can be written: JSON can hold half a character, which no file can.

    Raises:
        ConfigError: it cannot.
    """
    try:
        given.encode()
    except UnicodeEncodeError:
        raise wrong(where, key, "whole characters", given, "write it in UTF-8") from None
    return given


def number(row: Row, key: str, where: str, *, low: float, high: float = math.inf) -> float | None:
    """The number under a key, None where there is none.

    Raises:
        ConfigError: not a number, NaN or infinite, or outside [low, high].
    """
    given = row.get(key)
    if given is None:
        return None
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    # NaN is in no range; a whole number may be too large for a float.
    if not is_number or not low <= given <= min(high, sys.float_info.max):
        span = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise wrong(where, key, f"a number {span}", given, "fix it or leave it out")
    return float(given)


def whole(row: Row, key: str, where: str, *, low: int) -> int | None:
    """The whole number under a key, None where there is none.

    Raises:
        ConfigError: not a whole number, or below `low`.
    """
    given = row.get(key)
    if given is None:
        return None
    if not isinstance(given, int) or isinstance(given, bool) or not low <= given < 2**63:
        needed = f"a whole number of at least {low}"
        raise wrong(where, key, needed, given, "fix it or leave it out")
    return given


def image_file(folder: Path, row: Row, key: str, where: str) -> bytes:
    """The bytes of the image whose path stands under a key.

    Args:
        folder: what the path is relative to; it may not lead out of it.
        row: where the path stands.
        key: under which name.
        where: file and row, for messages.

    Raises:
        ConfigError: no path, a path that leads elsewhere, or a file that cannot be read.
    """
    given = text(row, key, where)
    path = Path(given)
    if path.is_absolute() or ".." in path.parts:
        advice = f"move the image below {folder}"
        raise wrong(where, key, "a relative path without '..'", given, advice)
    try:
        with (folder / path).open("rb") as file:
            # One byte more, so that the cap of `images.decode` is what refuses it.
            return file.read(images.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        advice = f"it is looked up in {folder} ({problem})"
        raise wrong(where, key, "the path of an image", given, advice) from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place for messages.

    Raises:
        ConfigError: no readable UTF-8 file, or a line that is no JSON object.
    """
    try:
        # By newline alone: JSON text may hold other characters that end a line. Some editors
        # write a mark before the first.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for count, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{count}", object_of(line, f"{path}:{count}")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def json_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file that is one list, each with its place for messages.

    Raises:
        ConfigError: no readable UTF-8 file, no list, or an entry that is no JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _elements(file, path)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def json_object(path: Path) -> dict[str, Any]:
    """The one object of a JSON file.

    Raises:
        ConfigError: no readable UTF-8 file, or something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: need one JSON object, got something else; copy the file again")
    return found


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV file with a header, each with its place for messages.

    Raises:
        ConfigError: no readable UTF-8 file, or a row with more or fewer fields than the header.
    """
    try:
        # Spreadsheets write a mark before the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for count, row in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in row or None in row.values():
                    raise ConfigError(
                        f"{path}, row {count}: need as many fields as the header names, got "
                        f"{'more' if None in row else 'fewer'}; fix the row"
                    )
                yield f"{path}, row {count}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(path, error) from None


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file in the form that its name tells: .csv, .parquet, .jsonl, or .json.

    Files that end in .json are lists or, as many data sets have them, JSON lines.

    Raises:
        ConfigError: as the readers of those forms.
    """
    if path.suffix == ".csv":
        return csv_rows(path)
    if path.suffix == ".parquet":
        return parquet_rows(path)
    return json_entries(path) if _is_list(path) else json_lines(path)


def _is_list(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return path.suffix == ".json" and file.read(_CHUNK).lstrip().startswith("[")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None


def parquet_rows(
    path: Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file, each with its place for messages, a few in memory at once.

    Args:
        path: the file.
        columns: read only those of these columns that are there; None reads all.

    Raises:
        ConfigError: `pyarrow` is not installed, or no readable Parquet file.
    """
    pyarrow, parquet = parquet_modules()
    count = 0
    try:
        with opened_by_arrow(path) as data, parquet.ParquetFile(data) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in columns if name in names]
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                for row in batch.to_pylist():
                    count += 1
                    yield f"{path}, row {count}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error, kind="Parquet") from None


def write_parquet(path: Path, kinds: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Write rows as Parquet, a few at a time.

    Args:
        path: the file; it is replaced only once all rows are written.
        kinds: for each column `text`, `number`, `whole`, `image` or `images`.
        rows: a value for each column, or None.

    Raises:
        ConfigError: `pyarrow` is not installed.
    """
    pyarrow, parquet = parquet_modules()
    types = {
        "text": pyarrow.string(),
        "number": pyarrow.float64(),
        "whole": pyarrow.int64(),
        "image": pyarrow.binary(),
        "images": pyarrow.list_(pyarrow.binary()),
    }
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])
    partial = path.with_name(path.name + ".partial")
    with parquet.ParquetWriter(partial, schema) as file:
        batch: list[Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _BATCH:
                file.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            file.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    partial.replace(path)


def parquet_modules() -> tuple[Any, Any]:
    """`pyarrow` and its Parquet module.

    Raises:
        ConfigError: not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            "need pyarrow for Parquet files, got no such package; "
            "run `pip install 'burnish[parquet]'` or use .jsonl"
        ) from None


def opened_by_arrow(path: Path) -> Any:
    """A file for pyarrow: open, so that nothing in its path is taken for an address, and pyarrow's
    own. Its threads may let go of a file of Python's when Python has ended, and abort the process.
    """
    pyarrow, _ = parquet_modules()
    with path.open("rb"):
        # Python has the plainer words for a file that cannot be opened.
        return pyarrow.OSFile(str(path))


def unreadable(path: Path, error: Exception, kind: str = "UTF-8 text") -> ConfigError:
    """The error that a file deserves that cannot be opened or read."""
    problem = brief(error)
    return ConfigError(f"{path}: need a readable file of {kind}, got {problem}; check the path")


def object_of(line: str, where: str) -> dict[str, Any]:
    """The object that one line of JSON is.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where}: need one JSON object a line, got {shown(line.strip())}; fix the line"
        )
    return found


def _elements(file: TextIO, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of one JSON list, parsed as the file is read."""
    decoder = json.JSONDecoder()
    passage, place, expected, count = "", 0, "[", 1
    while True:
        where = f"{path}, entry {count}"
        solid = _NO_SPACE.search(passage, place)
        place = solid.start() if solid else len(passage)
        character = passage[place : place + 1]
        if character and character not in expected:
            raise _no_entry(where, passage[place:])
        if character == "]":
            return
        if character in ("[", ","):
            place, expected = place + 1, "{]" if character == "[" else "{"
            continue
        if character:
            try:
                entry, place = decoder.raw_decode(passage, place)
            except (ValueError, RecursionError):
                # Broken, or only not read to its end yet.
                pass
            else:
                yield where, entry
                count, expected = count + 1, ",]"
                continue
        more = file.read(_CHUNK)
        if not more or len(passage) - place > _LONGEST:
            raise _no_entry(where, passage[place:])
        passage, place = passage[place:] + more, 0


def _no_entry(where: str, rest: str) -> ConfigError:
    return ConfigError(
        f"{where}: need a JSON list of objects, got {shown(rest[:60])}; fix or copy the file again"
    )
