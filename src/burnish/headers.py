"""What safetensors files say of their tensors, without reading one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from burnish.config import ConfigError

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_INDEX = "*.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model's folder: the shards that its index names, or every file there.

    Raises:
        ConfigError: a shard is missing, or there is no file, or a broken index.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob(_INDEX))[:1]:
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise ConfigError(
                f"need the names of weights and their files in {index}, got something else; copy "
                "the folder again"
            ) from None
        files = [folder / Path(name).name for name in sorted(set(named))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ConfigError(
            f"need weights as safetensors in {folder}, got {missing[0] if missing else 'no file'}"
            f"{' missing' if missing else ''}; copy the folder again"
        )
    return files


def tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and bytes of every tensor of a model's folder, as stored.

    Raises:
        ConfigError: files that cannot be read.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no mapping.
                    one = stored.get_slice(name)
                    shape = tuple(one.get_shape())
                    yield name, shape, math.prod(shape) * _BYTES[one.get_dtype()]
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ConfigError(
                f"need readable weights in {file}, got {reason}; copy the model again"
            ) from None


def stored_bytes(folder: Path) -> int:
    """All weights of a model's folder, as stored."""
    return sum(size for *_, size in tensors(folder))
