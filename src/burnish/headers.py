"""What safetensors files say of their tensors, without reading one."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from burnish.config import ConfigError
from burnish.wording import brief

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_INDEX = "*.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of it, as stored."""
        return math.prod(self.shape) * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model's folder: the shards that its index names, or every file there but
    variants (`model.fp16.safetensors`) of others.

    Raises:
        ConfigError: a shard is missing, or there is no file, or a broken index.
    """
    every = sorted(folder.glob("*.safetensors"))
    files = [file for file in every if "." not in file.stem] or every
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


def tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of a model's folder.

    Raises:
        ConfigError: files that cannot be read.
    """
    for file in weight_files(folder):
        try:
            # Nothing is read, and torch would ask for memory as large as the file.
            with safe_open(file, framework="np") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no mapping.
                    one = stored.get_slice(name)
                    yield Stored(name, tuple(one.get_shape()), _TYPES[one.get_dtype()])
        except (OSError, SafetensorError, KeyError) as error:
            reason = brief(error)
            raise ConfigError(
                f"need readable weights in {file}, got {reason}; copy the model again"
            ) from None


def stored_bytes(folder: Path) -> Counter[torch.dtype]:
    """Bytes of all weights of a model's folder, by the type they are stored in.

    Raises:
        ConfigError: files that cannot be read.
    """
    found: Counter[torch.dtype] = Counter()
    for tensor in tensors(folder):
        found[tensor.dtype] += tensor.num_bytes
    return found
