"""Time and memory of work on a device, and how fast a large matrix product is there."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timed(NamedTuple):
    """Of one piece of work."""

    first: float
    """Seconds of the first call, compiling included."""
    seconds: float
    """Median of the others."""
    memory: float
    """GiB on the device at the peak; of a CPU no number."""


def timed(
    work: Callable[[], None],
    device: torch.device,
    repeats: int,
    warm_up: Callable[[], None] | None = None,
) -> Timed:
    """Time and memory of some work; no numbers where a GPU has not so much memory."""
    try:
        return _timed(work, device, repeats, warm_up or work)
    except torch.OutOfMemoryError:
        return Timed(math.nan, math.nan, math.nan)


def _timed(
    work: Callable[[], None], device: torch.device, repeats: int, warm_up: Callable[[], None]
) -> Timed:
    is_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if is_gpu else (lambda: None)
    # On a CPU that of the process, so that other work on the machine counts little.
    clock = time.perf_counter if is_gpu else time.process_time

    def once(work: Callable[[], None]) -> float:
        wait()
        start = clock()
        work()
        wait()
        return clock() - start

    first = once(warm_up)
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(once(work) for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated() / (1 << 30) if is_gpu else math.nan
    return Timed(first, seconds, peak)


def peak_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    left, right = left.to(dtype), right.to(dtype)

    def work() -> None:
        for _ in range(10):
            left @ right

    return 10 * 2 * side**3 / timed(work, device, repeats).seconds
