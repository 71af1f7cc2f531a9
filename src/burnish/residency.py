"""Many teachers, one of them on the device.

Teachers stay on disk. The one in use is copied into the one transformer that is resident on the
device; the next is read into host memory, pinned for a GPU, by a thread while the current one
computes. Neither device nor host memory grows with the number of teachers.

Where the student trains a LoRA, and all teachers are LoRAs on the very weights that stand beside
it, none of them is copied: they borrow those weights, and differ by their adapters.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from burnish.adapters import Adapter, adapted, read_adapter
from burnish.borrowing import borrowed
from burnish.config import ConfigError
from burnish.policies.base import Policy


@dataclass(frozen=True)
class Source:
    """Where a teacher is: a pipeline folder, and a LoRA on it if it is one."""

    folder: Path
    lora: Path | None = None


class Teachers:
    """All teachers by label, of which one at a time is on the device."""

    def __init__(
        self,
        student: Policy[Any, Any],
        sources: Mapping[str, Source],
        *,
        may_borrow: bool = False,
    ) -> None:
        """Check that every teacher can stand in for another.

        Args:
            student: whose encoder, VAE, scheduler and architecture all must share.
            sources: by label.
            may_borrow: the student's weights will stay what they are, beside a LoRA.

        Raises:
            ConfigError: a teacher that does not.
        """
        self._sources = dict(sources)
        self._active: str | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None
        for source in dict.fromkeys(self._sources.values()):
            read_kin(student, source)
        self._adapters: dict[str, dict[str, Adapter]] = {}
        if may_borrow and _are_adapters_of(student, self._sources.values()):
            self._adapters = {n: read_adapter(_lora(s)) for n, s in self._sources.items()}
            modules = {name for adapters in self._adapters.values() for name in adapters}
            self._resident = borrowed(student, sorted(modules))
        else:
            self._resident = student.sibling()

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all teachers, sorted: the order in which a run takes turns."""
        return tuple(sorted(self._sources))

    def activate(self, label: str) -> Policy[Any, Any]:
        """The teacher of a label, on the device, in eval mode and without gradient.

        Raises:
            ConfigError: no teacher has this label.
        """
        if label not in self._sources:
            raise ConfigError(
                f"need a teacher for {label!r}, got teachers for {', '.join(self.labels)}; "
                f"add algorithm.teachers.{label} or leave out its prompts"
            )
        if label != self._active:
            # What is half copied must never pass for a teacher.
            self._active = None
            transformer: Any = self._resident.transformer
            if self._adapters:
                transformer.put_in(self._adapters[label])
            else:
                transformer.load_state_dict(self._read(label))
            self._active = label
        return self._resident

    def prefetch(self, label: str) -> None:
        """Begin to read the teacher that is wanted next; a wrong guess only costs time."""
        if self._adapters:
            return
        if label != self._active and (self._next is None or self._next[0] != label):
            self._next = label, self._reader.submit(_staged, self._sources[label], self._resident)

    def _read(self, label: str) -> dict[str, Tensor]:
        if self._next is not None and self._next[0] == label:
            weights = self._next[1].result()
            self._next = None
            return weights
        return _weights(self._sources[label])


def _are_adapters_of(student: Policy[Any, Any], sources: Iterable[Source]) -> bool:
    """Whether all are LoRAs on the weights that a student has now."""
    if any(source.lora is None for source in sources):
        return False
    mine = student.transformer.state_dict()
    for folder in {source.folder for source in sources}:
        weights = _weights(Source(folder))
        if any(not torch.equal(weights[n].to(t.dtype), t.cpu()) for n, t in mine.items()):
            return False
    return True


def _lora(source: Source) -> Path:
    assert source.lora is not None
    return source.lora


def read_kin(policy: Policy[Any, Any], source: Source) -> dict[str, Tensor]:
    """The weights of a model that was trained from the base of another one.

    Args:
        policy: whose encoder, VAE, scheduler and architecture the model must share.
        source: of the model.

    Raises:
        ConfigError: it does not share them.
    """
    expected = policy.fingerprint()
    # Its transformer may be as large as all else together, and is not read twice.
    model = type(policy).load(
        source.folder,
        resolution=policy.resolution,
        dtype=policy.dtype,
        frozen_dtype=policy.frozen_dtype,
        is_hollow=True,
    )
    for part, digest in model.fingerprint().items():
        if digest != expected[part]:
            raise ConfigError(
                f"need models of one base, got another {part} in {source.folder}; take models that "
                "were trained from the same base"
            )
    weights, mine = _weights(source), policy.transformer.state_dict()
    wrong = [n for n in mine.keys() | weights.keys() if n not in mine or n not in weights]
    wrong += [n for n in mine.keys() & weights.keys() if mine[n].shape != weights[n].shape]
    if wrong:
        raise ConfigError(
            f"need models of one architecture, got {len(wrong)} other tensors in {source.folder}, "
            f"first {sorted(wrong)[0]}; take models that were trained from the same base"
        )
    return weights


def _staged(source: Source, policy: Policy[Any, Any]) -> dict[str, Tensor]:
    """Weights as the policy that stands for all teachers has them."""
    weights = {n: t.to(policy.dtype) for n, t in _weights(source).items()}
    is_pinned = policy.device.type == "cuda"
    return {n: t.pin_memory() for n, t in weights.items()} if is_pinned else weights


def _weights(source: Source) -> dict[str, Tensor]:
    """The transformer of a pipeline folder, with its LoRA added if there is one."""
    files = sorted((source.folder / "transformer").glob("*.safetensors"))
    weights: dict[str, Tensor] = {}
    try:
        for file in files:
            weights |= load_file(file)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"need readable weights in {source.folder}, got {reason}") from None
    if not weights:
        raise ConfigError(
            f"need a transformer as safetensors in {source.folder}, got none; save it again"
        )
    if source.lora is None:
        return weights
    return adapted(weights, read_adapter(source.lora), where=str(source.lora))
