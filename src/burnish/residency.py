"""Many teachers, one of them on the device.

Teachers stay on disk. The one in use is copied into the one transformer that is resident on the
device; the next is read into host memory, pinned for a GPU, by a thread while the current one
computes. Neither device nor host memory grows with the number of teachers. Where weights are spread
over processes, each reads and keeps its share of a teacher.

Where the student trains a LoRA, and all teachers are LoRAs on the very weights that stand beside
it, none of them is copied: they borrow those weights, and differ by their adapters.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from burnish.adapters import Adapter, by_weight, read_adapter
from burnish.borrowing import borrowed
from burnish.config import ConfigError
from burnish.headers import weight_files
from burnish.policies.base import Policy
from burnish.runtime import ALONE, Runtime
from burnish.sharding import frozen, local, rows
from burnish.wording import brief


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
        rt: Runtime = ALONE,
        *,
        may_borrow: bool = False,
    ) -> None:
        """Check that every teacher can stand in for another.

        Args:
            student: whose encoder, VAE, scheduler and architecture all must share.
            sources: by label.
            rt: whether weights are spread, and over which processes.
            may_borrow: the student's weights will stay what they are, beside a LoRA.

        Raises:
            ConfigError: a teacher that does not.
        """
        self._sources = dict(sources)
        self._active: str | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")
        self._next: tuple[str, Future[dict[str, Tensor]]] | None = None
        for source in dict.fromkeys(self._sources.values() if rt.is_main else ()):
            read_kin(student, source)
        self._wanted: dict[str, tuple[slice, torch.dtype]] = {}
        self._adapters: dict[str, dict[str, Adapter]] = {}
        if may_borrow and _are_adapters_of(student, self._sources.values()):
            self._adapters = {n: read_adapter(_lora(s)) for n, s in self._sources.items()}
            modules = {name for adapters in self._adapters.values() for name in adapters}
            self._resident = borrowed(student, sorted(modules))
        else:
            self._resident = frozen(student, rt)
            self._wanted = {
                name: (rows(tensor), tensor.dtype)
                for name, tensor in self._resident.transformer.state_dict().items()
            }

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all teachers, sorted: the order in which a run takes turns."""
        return tuple(sorted(self._sources))

    def activate(self, label: str) -> Policy[Any, Any]:
        """The teacher of a label, on the device, in eval mode and without gradient; to be asked
        inside `burnish.sharding.whole`.

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
                _fill(transformer, self._reading(label))
            self._active = label
        return self._resident

    def prefetch(self, label: str) -> None:
        """Begin to read the teacher that is wanted next; a wrong guess only costs time."""
        if self._adapters:
            return
        if label != self._active and (self._next is None or self._next[0] != label):
            self._next = label, self._reader.submit(self._staged, label)

    def _reading(self, label: str) -> Callable[[str], Tensor]:
        """Gives the weights of a teacher by name: those that were read ahead, if it is the one."""
        if self._next is not None and self._next[0] == label:
            weights = self._next[1].result()
            self._next = None
            return weights.__getitem__
        stored = Stored(self._sources[label])
        return lambda name: stored.read(name, self._wanted[name][0])

    def _staged(self, label: str) -> dict[str, Tensor]:
        """Weights, or this process's share of them, as the policy that stands for all teachers has
        them."""
        stored = Stored(self._sources[label])
        is_pinned = self._resident.device.type == "cuda"
        found = {}
        for name, (own, dtype) in self._wanted.items():
            share = stored.read(name, own).to(dtype)
            found[name] = share.pin_memory() if is_pinned else share
        return found


def _are_adapters_of(student: Policy[Any, Any], sources: Iterable[Source]) -> bool:
    """Whether all are LoRAs on the weights that a student has now."""
    if any(source.lora is None for source in sources):
        return False
    mine = student.transformer.state_dict()
    for folder in {source.folder for source in sources}:
        stored = Stored(Source(folder))
        if any(not torch.equal(stored.read(n).to(t.dtype), t.cpu()) for n, t in mine.items()):
            return False
    return True


def _lora(source: Source) -> Path:
    assert source.lora is not None
    return source.lora


@torch.no_grad()
def _fill(transformer: Any, weight: Callable[[str], Tensor]) -> None:
    """Copy weights into a transformer, or this process's share of them into its share."""
    for name, tensor in transformer.state_dict().items():
        local(tensor).copy_(weight(name))


class Stored:
    """The transformer of a pipeline folder, with its LoRA added if there is one; mapped from its
    files, of which only what is asked for is read."""

    def __init__(self, source: Source) -> None:
        """Open the files.

        Raises:
            ConfigError: there are none, or one is damaged, or the LoRA is another model's.
        """
        self._plain: dict[str, Tensor] = {}
        for file in weight_files(source.folder / "transformer"):
            try:
                self._plain |= load_file(file)
            except (OSError, SafetensorError) as error:
                reason = brief(error)
                raise ConfigError(f"need readable weights in {file}, got {reason}") from None
        self._adapters: dict[str, Adapter] = {}
        if source.lora is not None:
            adapters = read_adapter(source.lora)
            self._adapters = by_weight(adapters, self._plain, where=str(source.lora))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of all weights, by name."""
        return {name: tensor.shape for name, tensor in self._plain.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all weights as they are stored."""
        return reduce(torch.promote_types, (tensor.dtype for tensor in self._plain.values()))

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a weight."""
        plain, adapter = self._plain[name], self._adapters.get(name)
        if adapter is not None:
            return adapter.added_to(plain, rows)
        return plain[rows] if plain.ndim else plain


def read_kin(policy: Policy[Any, Any], source: Source) -> Stored:
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
    stored = Stored(source)
    theirs = stored.shapes
    mine = {name: tensor.shape for name, tensor in policy.transformer.state_dict().items()}
    wrong = [n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)]
    if wrong:
        raise ConfigError(
            f"need models of one architecture, got {len(wrong)} other tensors in {source.folder}, "
            f"first {sorted(wrong)[0]}; take models that were trained from the same base"
        )
    return stored
