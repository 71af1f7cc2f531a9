"""Where the numbers are computed: device, dtype, threads, seeds, processes.

The only file that knows ranks; all other code is written for one device. Every random draw of the
project comes from `generator(seed, *names)`, so it is a pure function of the seed and the names: a
resumed run, or one with other batch sizes or another order of work, draws the same numbers.
"""

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed
from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from burnish.config import Config, ConfigError
from burnish.precision import choose_dtype

_GIBIBYTE = 1 << 30
_PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: one may measure or write alone."""
_MESSAGE = 1 << 25
"""Elements of one message."""
ItemT = TypeVar("ItemT")
_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "peft", "safetensors", "numpy")


class RuntimeConfig(Config):
    """Device, precision and threads of a run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; `auto` is bfloat16 where the device has instructions for
    it: on GPUs, and on processors with AVX512-BF16 or AMX. Elsewhere it is float32."""

    processes: int = Field(default=1, ge=1)
    """Of each training stage, on a GPU each if there are any; the groups of a step are dealt out to
    them. A run may go on with another number."""

    sharding: Literal["none", "full"] = "none"
    """`full` spreads the weights of what is trained over the processes of a stage (FSDP2)."""

    check_memory: bool = True
    """Refuse a run that is planned to need more than its device has; a plan may count too much."""

    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on the CPU; None keeps OMP_NUM_THREADS, or else takes the usable cores."""

    def build(self) -> "Runtime":
        """Set up this process, and join the others if torchrun started it."""
        return start(self)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The device of this process and its place among the processes of the run."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes on this machine."""
    is_sharded: bool = False
    """Whether what is trained is spread over the processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Run the networks inside in `dtype`; does nothing where `dtype` is float32."""
        is_on = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=is_on), self.attention():
            yield

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Take the kernel of attention that `autocast` takes: a backward pass that computes blocks
        again, outside of it, must compute them alike."""
        is_slow = self.dtype != torch.float32 and self.device.type == "cpu"
        # The backward of the CPU's fused attention is several times slower in bfloat16.
        with sdpa_kernel(SDPBackend.MATH) if is_slow else contextlib.nullcontext():
            yield

    def mine(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """The part of this process: items are dealt out in turn."""
        return items[self.rank :: self.world_size]

    def together(self, items: Sequence[Any]) -> list[Any]:
        """What every process has of items that were dealt out, in the order of the whole."""
        parts = self.gather(list(items))
        return [
            part[row]
            for row in range(max(len(part) for part in parts))
            for part in parts
            if row < len(part)
        ]

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, in the order of their ranks; it travels as JSON."""
        if self.world_size == 1:
            return [value]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.world_size)]
        torch.distributed.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        torch.distributed.all_gather(found, padded)
        return [
            json.loads(bytes(part[: int(size)].tolist()))
            for part, size in zip(found, sizes, strict=True)
        ]

    def all_reduce_sum(self, value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of `value` over all processes; the same tensor where there is one process."""
        if self.world_size == 1:
            return value
        total = value.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def all_reduce_mean(self, value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The mean of `value` over all processes; the same tensor where there is one process."""
        return value if self.world_size == 1 else self.all_reduce_sum(value) / self.world_size

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Average the gradients over all processes; a missing one counts as zero, and one that all
        lack stays missing."""
        if self.world_size == 1:
            return
        has = torch.tensor([int(p.grad is not None) for p in parameters], device=self.device)
        wanted = [
            p for p, n in zip(parameters, self.all_reduce_sum(has).tolist(), strict=True) if n
        ]
        while wanted:
            # In messages of a bounded size, as each is a copy.
            sizes = itertools.accumulate(p.numel() for p in wanted)
            count = max(1, sum(size <= _MESSAGE for size in sizes))
            bucket, wanted = wanted[:count], wanted[count:]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            mean = self.all_reduce_mean(torch.cat([grad.flatten() for grad in grads]))
            parts = mean.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def broadcast(self, parameters: Sequence[Tensor]) -> None:
        """Give every rank the values of the first one, in place; ranks must start alike."""
        if self.world_size == 1:
            return
        with torch.no_grad():
            for parameter in parameters:
                torch.distributed.broadcast(parameter, 0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The process that writes goes through before all others, which find what it has left."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One after another of a machine's processes: what is large passes its memory once."""
        turns = 1 + max(self.gather(self.local_rank))
        for _ in range(self.local_rank):
            self.barrier()
        yield
        for _ in range(turns - self.local_rank):
            self.barrier()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the others; not after an error: they would tell of that before it is told why."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def describe(self) -> dict[str, str | int]:
        """What `environment.json` says: hardware and versions that can change the numbers."""
        facts: dict[str, str | int] = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "processes": self.world_size,
            "cores": usable_cores(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
        }
        if self.device.type == "cuda":
            facts["gpu"] = torch.cuda.get_device_name(self.device)
            facts["cuda"] = str(torch.version.cuda)
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                facts[package] = importlib.metadata.version(package)
        return facts


ALONE = Runtime(device=torch.device("cpu"), dtype=torch.float32)
"""One process on the CPU."""


def quick() -> Runtime:
    """Likewise, in the precision in which this processor is fastest."""
    return replace(ALONE, dtype=choose_dtype("auto", ALONE.device))


def start(config: RuntimeConfig | None = None) -> Runtime:
    """Set up threads, allocator, device and processes, once at the start of a program."""
    config = config or RuntimeConfig()
    set_threads(config.threads)
    keep_freed_memory()
    rank, world_size = _torchrun_place()
    device = own_device(config.device)
    runtime = Runtime(
        device=device,
        dtype=choose_dtype(config.dtype, device),
        rank=rank,
        world_size=world_size,
        local_rank=_from_environment("LOCAL_RANK", 0),
        is_sharded=config.sharding == "full" and world_size > 1,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu() else "gloo", timeout=_PATIENCE
        )
    return runtime


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The torch device of a name in `auto`, `cpu`, `cuda`; each local process has its own GPU."""
    if name == "cpu" or (name == "auto" and not has_gpu()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if has_gpu() else 0
    if local_rank >= count:
        raise ConfigError(
            f"need {local_rank + 1} CUDA devices for device={name}, found {count};"
            " use device=cpu or start fewer processes"
        )
    return torch.device("cuda", local_rank)


def own_device(name: str = "auto") -> torch.device:
    """Likewise, for this process."""
    return choose_device(name, _from_environment("LOCAL_RANK", 0))


def memory(device: torch.device) -> int | None:
    """Bytes that a device has; of a CPU those of the machine, cut by the limit of its container;
    None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return None
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


# --- Seeds -----------------------------------------------------------------------------------


def derived_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed that depends on every name and on their order, the same on every machine.

    >>> derived_seed(0, "rollout", 3) == derived_seed(0, "rollout", 3)
    True
    >>> derived_seed(0, "rollout", 3) == derived_seed(0, "rollout", "3")
    False
    """
    # JSON keeps 3 apart from "3" and ("ab", "c") apart from ("a", "bc").
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh random generator for the draw that the names describe.

    Draw on the CPU and move the result, unless speed forbids it: the streams of GPUs differ from
    those of CPUs, and with them the images of a run.
    """
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *names))


@contextlib.contextmanager
def seeded(seed: int, *names: int | str) -> Iterator[None]:
    """Seed the global generators inside, for libraries that take none, and put them back after."""
    value = derived_seed(seed, *names)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if has_gpu() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value % (1 << 32))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


# --- Threads and memory ----------------------------------------------------------------------


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, cut by the quota of its container."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def set_threads(count: int | None = None) -> int:
    """Set the threads of torch; more than there are free cores make everything much slower."""
    if count is None and "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    torch.set_num_threads(count or usable_cores())
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Make glibc keep the memory it frees; whether that could be done.

    A training step frees and takes the same large blocks again and again. Returned to the system
    each time and then cleared page by page, they cost a quarter of the time at miniature size.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    # Some versions of glibc take at most 32 MiB for the second; a refused call changes nothing.
    for size in (_GIBIBYTE, 32 << 20):
        if libc.mallopt(mmap_threshold, size):
            return bool(libc.mallopt(trim_threshold, _GIBIBYTE))
    return False


# --- Processes -------------------------------------------------------------------------------


def _torchrun_place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun puts them into the environment."""
    world_size = _from_environment("WORLD_SIZE", 1)
    rank = _from_environment("RANK", 0)
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"need 0 <= RANK < WORLD_SIZE, got RANK={rank} and WORLD_SIZE={world_size};"
            " start the processes with torchrun"
        )
    return rank, world_size


def _from_environment(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"need a whole number in {name}, got {text!r}; start with torchrun")
    return int(text)


def has_gpu() -> bool:
    """Whether torch sees one."""
    return torch.cuda.is_available()
