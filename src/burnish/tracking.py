"""What a run leaves: its folder, its metrics, its timings, its samples.

`metrics.jsonl` holds what the seed decides and `timings.jsonl` what the machine decides, so the
first file of a run that was killed and resumed is byte-equal to that of a run that was not. A
folder belongs to one configuration: another one is refused, never mixed in. What must not be
half-written goes to a temporary file that is renamed; a full disk is one clear `RunError`.
"""

import contextlib
import errno
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from burnish import __version__
from burnish.config import Config, ConfigError, config_hash, dump_yaml, parse, parse_yaml
from burnish.images import encode_webp

if sys.platform != "win32":
    import fcntl

Value = int | float | str | bool | None
"""What a metric may be; NaN and infinities are written as null, which JSON has."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TIME = "time/"
# Locks of this process by folder: opening a folder twice in one process is no conflict.
_locks: dict[Path, int] = {}


class RunError(RuntimeError):
    """A run folder that cannot be used or written; the message is one line."""


class Run:
    """One run folder: configuration, environment, metrics, samples. Made by `create` or `open`."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self._seconds: dict[str, float] = defaultdict(float)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Config,
        *,
        command: str = "",
        environment: Mapping[str, Value] | None = None,
    ) -> "Run":
        """Start a run in `folder`, or take up the run of the same configuration that is there.

        Args:
            folder: made if missing; it may be empty.
            config: the resolved configuration; its hash decides whom the folder belongs to.
            command: the command line, for the reader of `run.json`.
            environment: facts for `environment.json`, from `runtime.describe()`.

        Raises:
            RunError: the folder is another run's, in use, not a run, or cannot be written.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            known = _read_facts(folder)
            _refuse_foreign(folder, config, known)
            lock(folder)
            facts = known or {
                "format": 1,
                "burnish": __version__,
                "config_hash": config_hash(config),
                "command": command,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            write_atomic(folder / "config.yaml", dump_yaml(config))
            if facts["config_hash"] != config_hash(config):
                facts = {**facts, "config_hash": config_hash(config)}
                write_json(folder / "run.json", facts)
            if not (folder / "environment.json").exists():
                here = {"burnish": __version__, "python": platform.python_version()}
                write_json(folder / "environment.json", here | dict(environment or {}))
            if known is None:
                # Last: it is what makes the folder a run.
                write_json(folder / "run.json", facts)
        return cls(folder, facts)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open the run that is in `folder`, to read it."""
        facts = _read_facts(Path(folder))
        if facts is None:
            raise RunError(f"need a run folder, got {folder} without run.json; check the path")
        return cls(Path(folder), facts)

    def rebind(self, config: Config) -> "Run":
        """Give the folder to another configuration; the caller vouches for what is in it."""
        facts = {**self.facts, "config_hash": config_hash(config)}
        write_atomic(self.folder / "config.yaml", dump_yaml(config))
        write_json(self.folder / "run.json", facts)
        return Run(self.folder, facts)

    @property
    def config_hash(self) -> str:
        """The hash of the configuration the folder belongs to."""
        return str(self.facts["config_hash"])

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data; `config.parse` makes the class of it."""
        path = self.folder / "config.yaml"
        try:
            return parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
        except OSError as error:
            raise RunError(f"need {path}, got {error.strerror}; restore or rerun it") from None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row: `time/*` to `timings.jsonl`, the rest to `metrics.jsonl`.

        What `timer` measured since the last row joins the timings. Log all of a step before its
        checkpoint is saved: a resumed run keeps the rows up to the step of its checkpoint.
        """
        row = {name: _plain(value) for name, value in metrics.items()}
        values = {name: value for name, value in row.items() if not name.startswith(_TIME)}
        times = {name: value for name, value in row.items() if name.startswith(_TIME)}
        times |= {_TIME + name: round(seconds, 6) for name, seconds in self._seconds.items()}
        self._seconds.clear()
        if values:
            self._append("metrics.jsonl", {"step": step, **values})
        if times:
            self._append("timings.jsonl", {"step": step, **times})

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, or cut short, before resuming; -1 drops all."""
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.folder / name
            if not path.exists():
                continue
            lines = path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line, step + 1) <= step]
            if len(kept) < len(lines):
                write_atomic(path, b"".join(kept))

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` in order; a last row that was cut short is left out."""
        return read_rows(self.folder / "metrics.jsonl")

    def timings(self) -> list[dict[str, Any]]:
        """The rows of `timings.jsonl` in order."""
        return read_rows(self.folder / "timings.jsonl")

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `time/<name>` of the next row."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def save_sample(
        self, step: int, name: str, image: Image.Image, record: Mapping[str, Any] | None = None
    ) -> Path:
        """Write `samples/step-<step>/<name>.webp`, with its scores and judge text beside it."""
        if not name or name != Path(name).name or name.startswith("."):
            raise RunError(f"need a plain file name for a sample, got {name!r}; drop the slashes")
        path = self.folder / "samples" / f"step-{step:06d}" / f"{name}.webp"
        write_atomic(path, encode_webp(image))
        if record is not None:
            write_json(path.with_suffix(".json"), record)
        return path

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path, line = self.folder / name, json.dumps(row, allow_nan=False) + "\n"
        # Opened for each row: rows are rare, and what is closed survives a kill.
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(line)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the failures of writing inside into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        advice = "check its place and its permissions"
        if error.errno in _DISK_FULL:
            advice = "free some disk space and start the same command again"
        raise RunError(f"need to write {path}, got {error.strerror or error}; {advice}") from error


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file, in a folder that is made if missing, so that it is there whole or not at all,
    even after a power cut.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write a folder so that it is there whole or not at all.

    Yields a place beside it, with nothing there yet; what is written there gets the name last, and
    is removed where something fails. At the end `folder` must not be there.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        with writing(folder):
            unfinished.replace(folder)
    except RunError as error:
        # Who reads it knows the folder, and not where it was before it was whole.
        raise RunError(str(error).replace(str(unfinished), str(folder))) from error.__cause__
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, indented for readers."""
    write_atomic(path, json.dumps(data, indent=2, default=str) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically, an object a line."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a missing file has none, a last row cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise RunError(f"{path}: need UTF-8 text, got other bytes; restore the file") from None
    rows = []
    # After the last line break stands nothing, or what a killed process left of a row.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RunError(
                f"{path}, line {number}: need a JSON object, got {line[:40]!r}; restore the file"
            )
        rows.append(row)
    return rows


def _plain(value: Any) -> Value:
    """A metric as JSON has it; 0-dimensional tensors and arrays become numbers."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes, if_broken: int) -> int:
    """The step of a row; `if_broken` for a row that was cut short."""
    if not line.endswith(b"\n"):
        return if_broken
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return if_broken


def _read_facts(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        str(facts["config_hash"])
        return facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"need a readable {path}, got {type(error).__name__}; choose another folder with --out"
        ) from None


def _refuse_foreign(folder: Path, config: Config, facts: Mapping[str, Any] | None) -> None:
    """Raise unless the folder is new or belongs to the run of this configuration."""
    if facts is None:
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        # A process killed while it made the folder leaves these two and nothing else.
        if foreign := sorted(names - {"config.yaml", "environment.json"}):
            raise RunError(
                f"need an empty or new folder, {folder} is no run and holds {foreign[0]};"
                " choose another folder with --out"
            )
    elif not _is_same(folder, config, facts):
        differences = _differences(Run(folder, facts).config(), config.model_dump(mode="json"))
        raise RunError(
            f"need the run of this configuration, {folder} belongs to another run"
            f" ({next(differences, 'its settings differ')}); choose another folder with --out,"
            " or give the same settings to resume"
        )


def _is_same(folder: Path, config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether the folder's configuration is this one, or was before a setting existed whose default
    it has now."""
    if facts["config_hash"] == config_hash(config):
        return True
    try:
        return parse(type(config), Run(folder, facts).config()) == config
    except ConfigError:
        return False


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(there.get(key), here.get(key), below)
    elif there != here:
        yield f"{path}: {json.dumps(there)} there, {json.dumps(here)} here"


def lock(folder: Path) -> None:
    """Keep other processes out of a folder while this one lives; a kill releases it.

    Args:
        folder: made if missing.

    Raises:
        RunError: another process is in it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if sys.platform == "win32":
        return
    if key in _locks and (folder / ".lock").exists():
        return
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunError(
            f"need {folder} for this process alone, another process is running in it; wait for it,"
            " stop it, or choose another folder with --out"
        ) from None
    _locks[key] = lock
