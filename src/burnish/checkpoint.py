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
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from torch import Tensor

from burnish.tracking import RunError, write_atomic, write_json, writing

FORMAT = 1
"""Version of the layout; another version is refused by name."""

Tensors = Mapping[str, Shaped[Tensor, "..."]]
"""Named tensors, as a `state_dict` has them."""

JSON = Any
"""What JSON holds: mappings with text keys, lists, text, numbers, booleans, None."""

_MARKER = "COMPLETE"
_TABLES = ("qmap", "absmax")
"""How names of what moments in 8 bits are read by begin, which has other shapes than its weight."""
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
    state: JSON


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
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{target.name}.tmp"
    with _saving(target):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"need {needed >> 20} MiB to write {target}, {free >> 20} MiB are free; free some"
                " disk space and start the same command again"
            )
        try:
            _write(temporary, step, tensors, state)
            _put_in_place(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        past = [old for old in steps(folder) if old <= step]
        drop(folder, set(steps(folder)) - set(past[-keep:]))
    return target


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


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    problems: list[str] = []
    # It only reads, so that one may look into the folder of a run that is still writing.
    for step, path in sorted(_places(folder).items(), reverse=True):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            message = f"{problems[0]} -- falling back to the checkpoint of step {step}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)
        return checkpoint
    if problems:
        raise CheckpointError(
            f"need one whole checkpoint in {folder}, all {len(problems)} are damaged"
            f" ({problems[0]}); remove the folder to start from the beginning"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint and check every byte of it against its manifest.

    Raises:
        CheckpointError: missing, incomplete, changed, or written by another version.
    """
    manifest = _verified_manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(
                    path / name
                )
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(path, f"{name} cannot be read ({error})") from None
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(step=manifest["step"], folder=path, tensors=tensors, state=state)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], JSON]:
    """The state of AdamW and its like as tensors `<parameter>.<name>` and JSON."""
    packed = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in packed["state"].items():
        for name, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    groups = [{k: _number(v) for k, v in group.items()} for group in packed["param_groups"]]
    return tensors, {"param_groups": groups, "values": values}


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of one parameter; some optimizers keep tensors of other shapes than its own in a group."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Tensors, state: JSON) -> None:
    """Put back what `optimizer_state` gave into an optimizer of the same parameters in order.

    Raises:
        CheckpointError: the parameters of the optimizer have other numbers or shapes.
    """
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    entries: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in state["values"].items()
    }
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        shape = parameters[int(index)].shape if int(index) < len(parameters) else None
        is_moment = value.ndim > 0 and not name.startswith(_TABLES)
        if shape is None or (is_moment and value.shape != shape):
            raise CheckpointError(
                f"need the optimizer of the checkpoint, parameter {index} has shape"
                f" {shape and tuple(shape)} and its saved {name} {tuple(value.shape)};"
                " resume with the settings it was saved with"
            )
        entries.setdefault(int(index), {})[name] = value
    # JSON has no tuples, and Adam's betas are one.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(
            f"need the optimizer of the checkpoint, {' '.join(str(error).split())}; resume with the"
            " settings it was saved with"
        ) from None


def random_state(
    generators: Mapping[str, torch.Generator] | None = None,
) -> tuple[dict[str, Tensor], JSON]:
    """The state of the global random generators and of the named ones, as tensors and JSON."""
    tensors = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    for name, generator in (generators or {}).items():
        tensors[f"generator.{name}"] = generator.get_state()
    _, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    state = {
        "numpy": [int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }
    return tensors, state


def load_random_state(
    tensors: Tensors, state: JSON, generators: Mapping[str, torch.Generator] | None = None
) -> None:
    """Put back what `random_state` gave, the named generators in place."""
    torch.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    for name, generator in (generators or {}).items():
        if f"generator.{name}" not in tensors:
            raise CheckpointError(
                f"need the random generator {name!r} in the checkpoint, it holds none of that name;"
                " resume with the version and the settings it was saved with"
            )
        generator.set_state(tensors[f"generator.{name}"])
    position, has_gauss, gauss = state["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))


def _number(value: Any) -> Any:
    """A setting of a parameter group as JSON has it; a learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _saving(target: Path) -> Iterator[None]:
    """One class of error for all that can go wrong while files are written."""
    try:
        with writing(target):
            yield
    except CheckpointError:
        raise
    except RunError as error:
        raise CheckpointError(str(error)) from error.__cause__


def _write(temporary: Path, step: int, tensors: Mapping[str, Tensors], state: JSON) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for group, named in tensors.items():
        path = temporary / f"{group}.safetensors"
        try:
            safetensors.torch.save_file(_separate(named), path)
        except SafetensorError as error:
            # The library hides the number of the system's error in its text.
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error)) from error
        _sync(path)
    write_json(temporary / "state.json", state)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(temporary.iterdir())
    }
    write_json(temporary / "manifest.json", {"format": FORMAT, "step": step, "files": files})
    write_atomic(temporary / _MARKER, _hash(temporary / "manifest.json") + "\n")
    _sync(temporary)


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


def _verified_manifest(path: Path) -> dict[str, Any]:
    try:
        marker = (path / _MARKER).read_text(encoding="utf-8").strip()
        if marker != _hash(path / "manifest.json"):
            raise _damaged(path, "manifest.json was changed")
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"need a checkpoint of format {FORMAT}, {path} has format {manifest['format']};"
                " use the version of Burnish that wrote it"
            )
        for name, facts in manifest["files"].items():
            if (path / name).stat().st_size != facts["bytes"]:
                raise _damaged(path, f"{name} was cut short or grew")
            if _hash(path / name) != facts["sha256"]:
                raise _damaged(path, f"{name} was changed")
    except FileNotFoundError as error:
        raise _damaged(path, f"{Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from None
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
