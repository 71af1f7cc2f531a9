"""What a pipeline's folder must hold, looked at before any weight of it is read.

A pipeline that lacks a part may load all the same, and read every word as an unknown one; or fail
after hours, when the part is asked for the first time.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.config import EMBEDDED, ConfigError, located
from burnish.headers import tensors, weight_files
from burnish.tracking import RunError
from burnish.wording import brief, nearest

INDEX = "model_index.json"
"""Of a pipeline's parts, in its folder."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_READERS = ("Tokenizer", "Processor", "FeatureExtractor")
_READS = ("tokenizer.json", "vocab.json", "*.model", "preprocessor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
_SHARED = ("scheduler/scheduler_config.json", "vae/config.json", "transformer/config.json")


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of its parts: library and class by name.

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ConfigError(
            f"need a diffusers pipeline folder with {INDEX}, got {folder}; check the path"
        )
    return _read_json(path)


def check_there(key: str, path: str) -> None:
    """Raise unless a path is a pipeline's folder.

    Args:
        key: that names it in a recipe.
        path: as it is named.
    """
    place = located(path)
    if (place / INDEX).is_file():
        return
    advice = f"pass {key}=DIR"
    if path.startswith(EMBEDDED):
        advice = f"make it with `burnish miniature build`, then {advice}"
    elif place.is_file():
        advice = "a single file has no encoders: download the whole model as diffusers saves it"
    elif not place.exists() and _HUB_NAME.fullmatch(path):
        advice = f"download it first, `hf download {path} --local-dir DIR`, then {advice}"
    raise ConfigError(
        f"{key}: need a folder that a diffusers pipeline was saved in, got {path!r}; {advice}"
    )


def check_parts(folder: Path) -> None:
    """Raise unless every part that a pipeline names has its files, and its weights are whole."""
    for name, entry in read_index(folder).items():
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            _check_part(folder / name, entry[1])


def _check_part(place: Path, kind: str) -> None:
    if "Scheduler" in kind:
        wanted: tuple[str, ...] = ("scheduler_config.json",)
    elif any(word in kind for word in _READERS):
        wanted = _READS
    else:
        wanted = ("config.json",)
    if not any(found for pattern in wanted for found in place.glob(pattern)):
        raise ConfigError(
            f"need the {kind} of the pipeline in {place}, got no {wanted[0]} there; copy the whole "
            "model again"
        )
    if wanted == ("config.json",):
        found = _read_json(place / "config.json").get("_class_name", kind)
        if found != kind:
            raise ConfigError(
                f"need the settings of {kind} in {place / 'config.json'}, got those of {found}; "
                "copy the whole model again"
            )
        for _ in tensors(place):
            # Only headers are read; that of a file that was cut off says so.
            pass


def copy_part(source: Path, target: Path) -> None:
    """Copy a part of a pipeline as it is stored: weights unrounded, and what reads text in words
    that every release of transformers knows which knows those of the source. Of weights only those
    that are read are copied, and of no file its mode.

    Raises:
        RunError: the source is gone.
    """
    if not source.is_dir():
        raise RunError(
            f"need {source}, which was read at the start, to write what was not trained, got no "
            "such folder; restore it and start the same command again"
        )
    is_network = any(source.glob("*.safetensors"))
    read = {file.name for file in weight_files(source)} if is_network else set()
    for file in source.rglob("*"):
        is_weights = file.suffix in _WEIGHTS or ".index." in file.name
        is_read = file.name in read or file.name.endswith(".safetensors.index.json")
        if file.is_file() and (is_read or not is_weights):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def check_kin(key: str, folder: Path, base: Path) -> None:
    """Raise where a teacher's settings already tell that it has another base; its weights are
    compared when it is loaded.

    Args:
        key: that names it in a recipe.
        folder: of the teacher.
        base: of the student.
    """
    for part in _SHARED:
        ours, theirs = (_settings(place / part) for place in (base, folder))
        if ours is not None and theirs is not None:
            # A file of an older version lacks what is the default now.
            wrong = sorted(n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n])
            if not wrong:
                continue
            raise ConfigError(
                f"{key}: need models of one base, got another {part.split('/')[0]} in {folder} "
                f"({', '.join(wrong[:3])}); take models that were trained from the same base"
            )


def check_targets(key: str, targets: tuple[str, ...], base: Path) -> None:
    """Raise unless every target of a LoRA is the end of a linear module's name in a transformer.

    Args:
        key: of the LoRA in a recipe.
        targets: of it.
        base: the pipeline's folder.
    """
    modules = [
        name.removesuffix(".weight")
        for name, shape, _ in tensors(base / "transformer")
        if name.endswith(".weight") and len(shape) == 2
    ]
    for target in targets:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules} - {"0", "1", "2"})
            raise ConfigError(
                f"{key}.targets: need ends of names of linear modules, got {target!r}, which "
                f"matches none; did you mean {nearest(target, known) or known[0]!r}?"
            )


def _settings(path: Path) -> Mapping[str, Any] | None:
    """What a part's file says of it, but for who wrote it."""
    if not path.is_file():
        return None
    return {name: value for name, value in _read_json(path).items() if not name.startswith("_")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = brief(error)
        raise ConfigError(f"need JSON in {path}, got {reason}; copy the model again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"need keys and values in {path}, got others; copy the model again")
    return found
