"""Many teachers, one of them on the device.

Teachers stay on disk. The one in use is copied into the one transformer that is resident on the
device; the next is read into host memory, pinned for a GPU, by a thread while the current one
computes. Neither device nor host memory grows with the number of teachers.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from burnish.adapters import adapted, read_adapter
from burnish.config import ConfigError
from burnish.policies.base import Policy


@dataclass(frozen=True)
class Source:
    """Where a teacher is: a pipeline folder, and a LoRA on it if it is one."""

    folder: Path
    lora: Path | None = None


class Teachers:
    """All teachers by label, of which one at a time is on the device."""

    def __init__(self, student: Policy[Any, Any], sources: Mapping[str, Source]) -> None:
        """Check that every teacher can stand in for another.

        Args:
            student: whose encoder, VAE, scheduler and architecture all must share.
            sources: by label.

        Raises:
            ConfigError: a teacher that does not.
        """
        self._resident = student.sibling()
        self._sources = dict(sources)
        self._active: str | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None
        for source in dict.fromkeys(self._sources.values()):
            read_kin(student, source)

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
            self._resident.transformer.load_state_dict(self._read(label))
            self._active = label
        return self._resident

    def prefetch(self, label: str) -> None:
        """Begin to read the teacher that is wanted next; a wrong guess only costs time."""
        if label != self._active and (self._next is None or self._next[0] != label):
            self._next = label, self._reader.submit(_staged, self._sources[label], self._pins)

    @property
    def _pins(self) -> bool:
        return self._resident.device.type == "cuda"

    def _read(self, label: str) -> dict[str, Tensor]:
        if self._next is not None and self._next[0] == label:
            weights = self._next[1].result()
            self._next = None
            return weights
        return _weights(self._sources[label])


def read_kin(policy: Policy[Any, Any], source: Source) -> dict[str, Tensor]:
    """The weights of a model that was trained from the base of another one.

    Args:
        policy: whose encoder, VAE, scheduler and architecture the model must share.
        source: of the model.

    Raises:
        ConfigError: it does not share them.
    """
    expected = policy.fingerprint()
    model = type(policy).load(source.folder, resolution=policy.resolution, dtype=policy.dtype)
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


def _staged(source: Source, is_pinned: bool) -> dict[str, Tensor]:
    weights = _weights(source)
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
