"""The memory and disk that a stage needs, part by part, and whether a device has it.

Parts live in phases: some all the time, others only while groups are drawn or weights are updated.
What is needed is the largest sum over the phases, with an allowance for what no count of tensors
sees. Nothing here knows models or settings; `burnish.planning.forecast` measures the parts.

Not counted apart, and covered by the allowance: fragmentation of the allocator, workspaces of
matrix products and convolutions, the loss on velocities that are there. Not counted at all: other
jobs of the run that share the memory at the same time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from burnish.config import ConfigError

Phase = Literal[
    "loading", "reading", "drawing", "decoding", "credit", "update", "optimizer step", "last look"
]
"""Of a training stage: models are read; a prompt is read; a micro-batch is drawn; its pictures are
decoded; states get their targets; forward and backward pass; the step; what was written is read
again."""
PHASES: tuple[Phase, ...] = get_args(Phase)

FRAGMENTATION = 1.1
"""Factor on all tensors for what an allocator cannot fill, and for workspaces."""
GIBIBYTE = 1 << 30
PROCESS_BYTES: Mapping[str, int] = {"cuda": GIBIBYTE, "cpu": round(0.75 * GIBIBYTE)}
"""What a process holds before the first tensor: the CUDA context with its kernels, and the
workspaces of cuBLAS; on a CPU, Python with the libraries."""


@dataclass(frozen=True)
class Sharding:
    """Over how many devices a model is spread, in the manner of FSDP2."""

    world_size: int = 1

    def share(self, part: "Part") -> int:
        """Bytes of a part on each device."""
        return -(-part.num_bytes // self.world_size) if part.is_sharded else part.num_bytes


@dataclass(frozen=True, kw_only=True)
class Part:
    """Something that needs memory."""

    name: str
    num_bytes: int
    """Of the whole, over all devices."""
    during: tuple[Phase, ...] = PHASES
    is_sharded: bool = False
    """Whether each device holds only its share."""
    is_common: bool = False
    """Whether the processes of a machine have it once, and not each."""
    advice: str = ""
    """What to change where this is too large."""

    @property
    def when(self) -> str:
        """The phases, for readers."""
        return "always" if self.during == PHASES else ", ".join(self.during)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one stage, or the evaluation, needs on each device."""

    stage: str
    key: str
    """Of its settings in a recipe."""
    device: str
    """`cuda` or `cpu`."""
    parts: Sequence[Part]
    """On the device."""
    host: Sequence[Part] = ()
    """Beside a GPU, in the memory of the machine."""
    disk: Sequence[Part] = ()
    sharding: Sharding = Sharding()

    def held(self, phase: Phase) -> int:
        """Bytes of all tensors on a device in a phase."""
        return sum(self.sharding.share(part) for part in self.parts if phase in part.during)

    def beside(self, phase: Phase) -> int:
        """Bytes of the machine's memory in a phase, of all processes on it together."""
        return sum(part.num_bytes for part in self.host if phase in part.during)

    @property
    def host_peak(self) -> Phase:
        """The phase that needs most of the machine's memory."""
        return max(PHASES, key=self.beside)

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(PHASES, key=self.held)

    @property
    def needed(self) -> int:
        """Bytes that a device must have."""
        return self.needed_in(self.peak)

    def needed_in(self, phase: Phase) -> int:
        """Likewise, for one phase alone."""
        return round(FRAGMENTATION * self.held(phase)) + PROCESS_BYTES[self.device]

    @property
    def largest(self) -> Part:
        """The largest part of the peak."""
        there = [part for part in self.parts if self.peak in part.during]
        return max(there, key=self.sharding.share)

    def shortage(self, available: int) -> str | None:
        """One line about what is missing and what to change; None where all of it fits."""
        if self.needed <= available:
            return None
        worst = self.largest
        advice = worst.advice or "take a device with more memory, or more devices"
        return (
            f"{self.key}: need {shown(self.needed)} on the device, got "
            f"{shown(available)}; most of it is {worst.name} "
            f"({shown(self.sharding.share(worst))}): {advice}"
        )

    def host_shortage(self, available: int) -> str | None:
        """Likewise, of the memory of the machine beside a GPU."""
        phase = self.host_peak
        if self.beside(phase) <= available:
            return None
        worst = max((p for p in self.host if phase in p.during), key=lambda part: part.num_bytes)
        return (
            f"{self.key}: need {shown(self.beside(phase))} of memory beside the GPU, got "
            f"{shown(available)}; most of it is {worst.name} ({shown(worst.num_bytes)}): "
            f"{worst.advice or 'take a machine with more memory, or fewer processes on one'}"
        )

    def as_json(self, available: int | None) -> dict[str, Any]:
        """All of it as plain data, in bytes."""
        return {
            **asdict(self),
            "held": {phase: self.held(phase) for phase in PHASES},
            "peak": self.peak,
            "needed": self.needed,
            "host_needed": self.beside(self.host_peak),
            "available": available,
        }


def check(plans: Iterable[Plan], available: int | None, beside: int | None = None) -> None:
    """Look whether a device, and the machine beside it, have what stages need.

    Args:
        plans: of the stages.
        available: bytes of the device; None is a device that nobody knows.
        beside: bytes of the machine, likewise.

    Raises:
        ConfigError: they have not; the largest part and what to change are named.
    """
    missing = []
    for plan in plans:
        missing.append(None if available is None else plan.shortage(available))
        missing.append(None if beside is None else plan.host_shortage(beside))
    if said := [line for line in missing if line]:
        raise ConfigError(*said)


def shown(num_bytes: int) -> str:
    """Bytes for readers.

    >>> shown(3 << 20), shown(11 << 29)
    ('3.0 MiB', '5.50 GiB')
    """
    if num_bytes < GIBIBYTE:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIBIBYTE:.2f} GiB"


def table(plan: Plan, available: int | None) -> str:
    """A plan as text, a line for each part."""
    devices = plan.sharding.world_size
    spread = f", each of {devices} devices" if devices > 1 else ""
    lines = [f"{plan.stage} ({plan.device}{spread})"]
    lines += [_row(part.name, plan.sharding.share(part), part.when) for part in plan.parts]
    process = PROCESS_BYTES[plan.device]
    allowance = plan.needed - plan.held(plan.peak) - process
    lines += [
        _row(f"allowance, {FRAGMENTATION - 1:.0%} of the peak", allowance, "always"),
        _row("the process itself", process, "always"),
    ]
    has = "" if available is None else f", the device has {shown(available)}"
    lines.append(_row("needed", plan.needed, f"at its peak, {plan.peak}{has}"))
    lines += [_row(part.name, part.num_bytes, f"{part.when}, in RAM") for part in plan.host]
    if plan.host:
        peak = plan.host_peak
        lines.append(_row("needed beside the device", plan.beside(peak), f"at its peak, {peak}"))
    lines += [_row(part.name, part.num_bytes, "on disk") for part in plan.disk]
    return "\n".join(lines)


def _row(name: str, num_bytes: int, when: str) -> str:
    return f"  {name:<54}{shown(num_bytes):>12}  {when}"
