"""Checkpoints: whole or not there, hashed, without pickle, and exact enough to resume bit for bit.

A checkpoint is a folder `step-000012` of safetensors files and one JSON state. It is written under
another name, its files are listed with their hashes in `manifest.json`, `COMPLETE` comes last, and
only then it gets its name. Reading checks every hash and falls back, with a warning, to the newest
checkpoint that is whole. Nothing here knows models: tensors come and go as mappings.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor

from burnish.runtime import ALONE, Runtime
from burnish.tracking import RunError, write_atomic, write_json, writing
from burnish.wording import brief

FORMAT = 1
"""Version of the layout; another version is refused by name."""

Tensors = Mapping[str, Shaped[Tensor, "..."]]
"""Named tensors, as a `state_dict` has them."""

JSON = Any
"""What JSON holds: mappings with text keys, lists, text, numbers, booleans, None."""

_MARKER = "COMPLETE"
_SHARE = "shard-"
"""How names of files of spread tensors begin."""
_NAME = re.compile(r"step-(\d{6,})|\.step-(\d{6,})\.old")
_GROUP = re.compile(r"[a-z0-9][a-z0-9_-]*")


class CheckpointError(RunError):
    """A checkpoint that cannot be written or read; the message is one line."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    folder: Path
    tensors: Mapping[str, Mapping[str, Shaped[Tensor, "..."]]]
    """By group; none of a spread one."""
    state: JSON
    is_sharded: bool = False
    """Whether its tensors are shares, which `burnish.sharded_checkpoint` reads."""


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensors], state: JSON, *, keep: int = 3
) -> Path:
    """Write the checkpoint of a step, then drop all but the newest `keep`.

    Checkpoints of later steps go too: they are damaged, or of a future that was given up, and
    `latest` would prefer them.

    Args:
        folder: the folder of all checkpoints, made if missing.
        step: optimizer steps done; a checkpoint of the same step is replaced.
        tensors: one safetensors file for each group, such as `policy` and `optimizer`.
        state: whatever else resuming needs, as JSON.
        keep: checkpoints to keep, this one included.

    Raises:
        CheckpointError: it cannot be written; the checkpoints before it are as they were.
    """
    if step < 0 or keep < 1:
        raise CheckpointError(f"need step >= 0 and keep >= 1, got {step} and {keep}; correct them")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise CheckpointError(f"need a group name like `policy`, got {group!r}; rename it")
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    with placing(folder, step, num_bytes=needed, keep=keep) as place:
        for group, named in tensors.items():
            _write(named, place / f"{group}.safetensors")
        complete(place, step, facts(sorted(place.iterdir())), state)
    return folder / f"step-{step:06d}"


@contextlib.contextmanager
def placing(folder: Path, step: int, *, num_bytes: int, keep: int) -> Iterator[Path]:
    """An empty folder for the files of a checkpoint, which gets the name of its step at the end.

    Args:
        folder, step, keep: as for `save`.
        num_bytes: that will be written.

    Raises:
        CheckpointError: as `save`.
    """
    target, place = folder / f"step-{step:06d}", unfinished(folder, step)
    with saving(target):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        free = shutil.disk_usage(folder).free
        if num_bytes > free:
            raise CheckpointError(
                f"need {num_bytes >> 20} MiB to write {target}, {free >> 20} MiB are free; free "
                "some disk space and start the same command again"
            )
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            yield place
            _put_in_place(place, target)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        past = [old for old in steps(folder) if old <= step]
        drop(folder, set(steps(folder)) - set(past[-keep:]))


def unfinished(folder: Path, step: int) -> Path:
    """Where a checkpoint is while it is written."""
    return folder / f".step-{step:06d}.tmp"


def facts(files: Iterable[Path]) -> dict[str, Any]:
    """Size and hash of files that were written, by name; they are on the disk then."""
    found = {}
    for path in files:
        _sync(path)
        found[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    return found


def complete(place: Path, step: int, files: Mapping[str, Any], state: JSON) -> None:
    """Write down what a checkpoint is made of, and that it is whole.

    Args:
        place: where it is while it is written.
        step: of it.
        files: that hold its tensors, see `facts`.
        state: as for `save`.
    """
    write_json(place / "state.json", state)
    every = {**files, **facts([place / "state.json"])}
    write_json(place / "manifest.json", {"format": FORMAT, "step": step, "files": every})
    write_atomic(place / _MARKER, _hash(place / "manifest.json") + "\n")
    _sync(place)


def drop(folder: Path, steps: Iterable[int]) -> None:
    """Remove the checkpoints of some steps."""
    for step in steps:
        # Renamed first, so that a kill in between leaves no half of one under its name.
        doomed = folder / f".step-{step:06d}.tmp"
        (folder / f"step-{step:06d}").replace(doomed)
        shutil.rmtree(doomed)


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in the folder, in order, whole or not."""
    return sorted(_places(folder))


def latest(folder: Path, rt: Runtime = ALONE) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none at all.

    Args:
        folder: of all checkpoints.
        rt: processes, all of which must come here; each checks a part of the files.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    problems: list[str] = []
    # It only reads, so that one may look into the folder of a run that is still writing. All go by
    # what the main process sees there.
    places = [(step, str(path)) for step, path in _places(folder).items()]
    for step, path in sorted(rt.gather(places)[0], reverse=True):
        try:
            checkpoint = load(Path(path), rt)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems and rt.is_main:
            message = f"{problems[0]} -- falling back to the checkpoint of step {step}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)
        return checkpoint
    if problems:
        raise CheckpointError(
            f"need one whole checkpoint in {folder}, all {len(problems)} are damaged"
            f" ({problems[0]}); remove the folder to start from the beginning"
        )
    return None


def load(path: Path, rt: Runtime = ALONE) -> Checkpoint:
    """Read one checkpoint and check every byte of it against its manifest.

    Args:
        path: of the checkpoint.
        rt: as for `latest`.

    Raises:
        CheckpointError: missing, incomplete, changed, or written by another version; on all
            processes, whichever saw it.
    """
    found, problem = None, ""
    try:
        found = _read(path, rt)
    except CheckpointError as error:
        problem = str(error)
    for told in rt.gather(problem):
        if told:
            raise CheckpointError(told)
    assert found is not None, "who reads nothing tells why"
    return found


def _read(path: Path, rt: Runtime) -> Checkpoint:
    """A checkpoint, of whose files this process has checked its part."""
    manifest = _verified_manifest(path, rt)
    is_sharded = any(name.startswith(_SHARE) for name in manifest["files"])
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors") and not is_sharded:
            try:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(
                    path / name
                )
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(path, f"{name} cannot be read ({brief(error)})") from None
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        # Another process has checked its hash, or will.
        raise _damaged(path, f"state.json cannot be read ({brief(error)})") from None
    return Checkpoint(
        step=manifest["step"], folder=path, tensors=tensors, state=state, is_sharded=is_sharded
    )


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """One class of error for all that can go wrong while files are written."""
    try:
        with writing(target):
            yield
    except CheckpointError:
        raise
    except RunError as error:
        raise CheckpointError(str(error)) from error.__cause__


def _write(named: Tensors, path: Path) -> None:
    try:
        safetensors.torch.save_file(_separate(named), path)
    except SafetensorError as error:
        # The library hides the number of the system's error in its text.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename to the final name; what had the name before is there until the new one is whole."""
    before = target.with_name(f".{target.name}.old")
    if target.exists():
        target.replace(before)
    temporary.replace(target)
    _sync(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _places(folder: Path) -> dict[int, Path]:
    """Where the checkpoint of each step is: under its name, or set aside for its replacement."""
    places: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            # Sorted, so that names without the leading dot come last and win.
            places[int(match[1] or match[2])] = path
    return places


def _tidy(folder: Path) -> None:
    """Remove what a killed process left, and give a replaced checkpoint its name back."""
    for path in list(folder.glob(".step-*.old")):
        target = folder / path.name[1:].removesuffix(".old")
        if target.exists():
            shutil.rmtree(path)
        else:
            path.replace(target)
    for path in list(folder.glob(".step-*.tmp")):
        shutil.rmtree(path)


def _separate(named: Tensors) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own, which the format demands."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _verified_manifest(path: Path, rt: Runtime) -> dict[str, Any]:
    try:
        marker = (path / _MARKER).read_text(encoding="utf-8").strip()
        if marker != _hash(path / "manifest.json"):
            raise _damaged(path, "manifest.json was changed")
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"need a checkpoint of format {FORMAT}, {path} has format {manifest['format']};"
                " use the version of Burnish that wrote it"
            )
        for name, facts in manifest["files"].items():
            if (path / name).stat().st_size != facts["bytes"]:
                raise _damaged(path, f"{name} was cut short or grew")
        for name, facts in rt.mine(list(manifest["files"].items())):
            if _hash(path / name) != facts["sha256"]:
                raise _damaged(path, f"{name} was changed")
    except FileNotFoundError as error:
        raise _damaged(path, f"{Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"it cannot be read ({brief(error)})") from None
    return manifest


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"need a whole checkpoint, in {path} {what}; take another or start again without it"
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
