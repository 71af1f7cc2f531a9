"""What the frozen parts of any family make of a prompt, and a memory of what was read.

A run meets its prompts many times. What was read is kept by content, in memory and, if wanted, on
disk; a prompt is always read alone, because what it becomes must not depend, not even in the last
bit, on what else was missing, or a resumed run would not repeat the one that was killed.
"""

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from burnish import images
from burnish.policies.parts.execution import visiting
from burnish.tracking import writing
from burnish.types import Prompt, Task

MEMORY_BYTES = 1 << 30
"""Most that the prompts may hold that a reader keeps."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt as a transformer reads it, without padding of ours."""

    on_host: ClassVar[frozenset[str]] = frozenset()
    """Tensors that stay on the CPU."""

    key: str
    """Hash of task, text and source images in order; equal keys are equal prompts."""
    embedding: Float[Tensor, "slot channel"]
    source: Float[Tensor, "token latent_channel"]
    """Normalised latents of the source images, one after the other; no tokens for text to image."""
    shapes: tuple[tuple[int, int, int], ...]
    """(frame, height, width) of every source image in latent tokens."""

    @property
    def layout(self) -> tuple[Any, ...]:
        """Prompts of equal layout can share a call of the transformer."""
        return self.shapes, len(self.embedding)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by field."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it costs."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


RowT = TypeVar("RowT", bound=EncodedPrompt)


@dataclass(frozen=True)
class Condition(Generic[RowT]):
    """Encoded prompts of one batch."""

    prompts: tuple[RowT, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: "Condition[RowT]") -> "Condition[RowT]":
        return Condition(self.prompts + other.prompts)

    def select(self, indices: Sequence[int]) -> "Condition[RowT]":
        """The prompts at `indices`, which may repeat."""
        return Condition(tuple(self.prompts[index] for index in indices))

    def repeated(self, count: int) -> "Condition[RowT]":
        """So many prompts like the first that nobody takes for equal ones."""
        first = self.prompts[0]
        return Condition(
            tuple(dataclasses.replace(first, key=f"{first.key} {n}") for n in range(count))
        )

    @property
    def num_bytes(self) -> int:
        """Memory that keeping it costs."""
        return sum(prompt.num_bytes for prompt in self.prompts)


class PromptReader(ABC, Generic[RowT]):
    """The frozen parts of one pipeline, and the prompts they have read."""

    row: type[RowT]
    """What a prompt becomes."""

    def __init__(self, pipeline: Any, *, resolution: int, folder: Path | None = None) -> None:
        """Keep encoded prompts in memory, and in `folder` if given."""
        self._pipeline = pipeline
        self._resolution = resolution
        self._folder = folder
        self._kept: OrderedDict[str, RowT] = OrderedDict()
        self._kept_bytes = 0
        self._weights: int | None = None
        self._identity = ""

    @abstractmethod
    def embed(self, prompts: Sequence[Prompt]) -> Condition[RowT]:
        """Read prompts of one task afresh, with gradient where the frozen weights ask for it."""

    @abstractmethod
    def template(self) -> Any:
        """Plain data that decides, besides weights, what a prompt becomes."""

    @property
    def encoders(self) -> list[Any]:
        """The frozen text encoders."""
        return [self._pipeline.text_encoder]

    @property
    def device(self) -> torch.device:
        """Where rows are."""
        return next(self._pipeline.transformer.parameters()).device

    def encode(self, prompts: Sequence[Prompt]) -> Condition[RowT]:
        """Without gradient; what was read before is not read again."""
        require_one_task(prompts)
        self._forget_if_weights_changed()
        keys = [self.key(prompt) for prompt in prompts]
        found = {key: row for key in set(keys) if (row := self._recall(key)) is not None}
        missing = {key: p for key, p in zip(keys, prompts, strict=True) if key not in found}
        networks = [*self.encoders, *([self._pipeline.vae] if prompts[0].task == "edit" else [])]
        with visiting(networks if missing else [], self.device):
            for key, prompt in missing.items():
                with torch.no_grad():
                    (row,) = self.embed([prompt]).prompts
                found[key] = row
                self._keep(row)
                if self._folder is not None:
                    _write(self._file(key), row)
        return Condition(tuple(found[key] for key in keys))

    def forget(self) -> None:
        """Read all prompts again that are not on disk."""
        self._kept.clear()
        self._kept_bytes = 0

    def key(self, prompt: Prompt) -> str:
        """What tells a prompt from others."""
        sources = prompt.sources if prompt.task == "edit" else ()
        return hash_json([prompt.task, prompt.text, images.digest(sources), self._resolution])

    def fingerprint(self) -> dict[str, str]:
        """Hashes of everything that decides what a prompt becomes; weights that are equal once
        rounded count as equal, as some are kept in float32 and some in bfloat16."""
        return self._digests(is_rounded=True)

    def _digests(self, *, is_rounded: bool) -> dict[str, str]:
        encoders = [hash_module(one, is_rounded=is_rounded) for one in self.encoders]
        return {
            "vae": hash_module(self._pipeline.vae, is_rounded=is_rounded),
            "encoder": hash_json(encoders),
            "template": hash_json(self.template()),
        }

    def _recall(self, key: str) -> RowT | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._folder is None:
            return None
        row = _read_file(self._file(key), key, self.row, self.device)
        if row is not None:
            self._keep(row)
        return row

    def _keep(self, row: RowT) -> None:
        self._kept[row.key] = row
        self._kept_bytes += row.num_bytes
        while self._kept_bytes > MEMORY_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes

    def _forget_if_weights_changed(self) -> None:
        # Torch counts every write to a tensor: an optimizer step or a loaded checkpoint is noticed.
        frozen = (*self.encoders, self._pipeline.vae)
        writes = sum(p._version for module in frozen for p in module.parameters())
        if writes != self._weights:
            self.forget()
            self._weights, self._identity = writes, ""

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        # Hashing the weights takes long at full size and is needed for files only.
        self._identity = self._identity or hash_json(self._digests(is_rounded=False))
        kind = self.device.type
        # What encoders say in another precision is something else.
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        return self._folder / f"{hash_json([self._identity, key, precision])}.safetensors"


def require_one_task(prompts: Sequence[Prompt]) -> Task:
    """The task that all prompts share.

    Raises:
        ValueError: there is none.
    """
    tasks = sorted({prompt.task for prompt in prompts})
    if len(tasks) != 1:
        given = " and ".join(tasks) or "no prompt"
        raise ValueError(f"need prompts of one task, got {given}; encode each task for itself")
    return prompts[0].task


def source_images(prompt: Prompt) -> list[Image.Image]:
    """The images that an edit changes, in order, with their transparency.

    Raises:
        ValueError: the prompt has none, or bytes that are no image.
    """
    if not prompt.sources:
        raise ValueError(
            f"need a source image for the edit {prompt.id!r}, got none; "
            "give one or make its task t2i"
        )
    where = f"source of prompt {prompt.id!r}"
    return [images.decode(data, where=where).convert("RGBA") for data in prompt.sources]


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a fast tokenizer does, as plain data."""
    # Padding and truncation remember the last call.
    facts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return facts | {"padding": None, "truncation": None}


def hash_json(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_module(module: nn.Module, *, is_rounded: bool = False) -> str:
    """SHA-256 of all weights and buffers, as they are or as they would be in bfloat16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        if is_rounded and flat.is_floating_point():
            flat = flat.to(torch.bfloat16)
        if flat.is_floating_point():
            # A LoRA that adds nothing makes 0.0 of -0.0.
            flat = flat + 0
        digest.update(f"{name} {flat.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: Path, row: EncodedPrompt) -> None:
    # Under another name first: several processes may share the folder, and any may be killed.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in row.tensors().items()},
            unfinished,
            metadata={"shapes": json.dumps(row.shapes)},
        )
        unfinished.replace(file)


def _read_file(file: Path, key: str, kind: type[RowT], device: torch.device) -> RowT | None:
    try:
        with safe_open(file, framework="pt") as stored:
            shapes = json.loads(stored.metadata()["shapes"])
            # Copied: a tensor that maps the file would crash the process once the file is damaged.
            tensors = {
                name: stored.get_tensor(name).to(
                    "cpu" if name in kind.on_host else device, copy=True
                )
                for name in stored.keys()  # noqa: SIM118 - it is no mapping.
            }
            told = tuple((frame, height, width) for frame, height, width in shapes)
            return kind(key=key, shapes=told, **tensors)
    except (FileNotFoundError, SafetensorError):
        # Not there, or damaged: it is encoded again and the file replaced.
        return None
