"""A GPU that is not there, in this process: `device.cpp`, and what `torch.cuda` asks C for.

`make pretended` has every Python process import it at its start, with BURNISH_PRETENDED_GPU naming
the built library. Its numbers are the CPU's; what it shows is whether all tensors are where a GPU
needs them, how much memory it would have to have, and what autocast makes of every type.
"""

import ctypes
import os
import sys
from typing import Any

assert "torch" not in sys.modules, "torch asks once whether there is a GPU"
_LIBRARY = ctypes.CDLL(os.environ["BURNISH_PRETENDED_GPU"], mode=ctypes.RTLD_GLOBAL)
_LIBRARY.pretended_held.restype = _LIBRARY.pretended_peak.restype = ctypes.c_int64

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (before a GPU is there: it looks for more of one than this has)
import torch._inductor.utils  # noqa: E402
from torch import distributed  # noqa: E402

_TOTAL = 80 << 30
_COUNT = 2
Device = torch.device | str | int | None


def index(device: Device = None) -> int:
    """Of a device, or the current one."""
    if isinstance(device, int):
        return device
    own = None if device is None else torch.device(device).index
    return _LIBRARY.pretended_current() if own is None else own


def device_count() -> int:
    """As many as the environment lets this process see."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _COUNT if seen is None else min(_COUNT, len([n for n in seen.split(",") if n]))


def exchange(device: int) -> int:
    """Make a device the current one; the one before."""
    before = index()
    if device >= 0:
        _LIBRARY.pretended_set_current(device)
    return before


class Properties:
    """What is asked of a GPU's properties."""

    name = "a pretended GPU"
    total_memory = _TOTAL
    major, minor = 9, 0
    multi_processor_count = 132


class Stream:
    """The only one: everything is done at once."""

    def __init__(self, device: Device = None, priority: int = 0) -> None:
        self.device = torch.device("cuda", index(device))

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None: ...


class Event:
    """One that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class InStream:
    """Inside is in a stream."""

    def __init__(self, stream: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def _nothing(*_: Any, **__: Any) -> None: ...


def stand_in(cuda: Any, own: Any) -> None:
    """Make a pretended GPU of `torch.cuda` and of what it has of `torch._C`."""
    generators = tuple(torch.Generator(f"cuda:{n}") for n in range(_COUNT))
    for name in ("_lazy_init", "init", "synchronize", "empty_cache", "ipc_collect", "set_stream"):
        setattr(cuda, name, _nothing)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count, cuda.current_device = device_count, index
    cuda.set_device = lambda device: exchange(index(device))
    cuda._exchange_device = cuda._maybe_exchange_device = exchange
    own._cuda_getDevice, own._cuda_setDevice = index, exchange
    own._cuda_getCurrentRawStream = lambda device: 0
    cuda.get_device_properties = lambda device=None: Properties()
    cuda.get_device_name = lambda device=None: Properties.name
    cuda.get_device_capability = lambda device=None: (Properties.major, Properties.minor)
    cuda.mem_get_info = lambda device=None: (_TOTAL - cuda.memory_allocated(device), _TOTAL)
    cuda.memory_allocated = lambda device=None: _LIBRARY.pretended_held(index(device))
    cuda.max_memory_allocated = lambda device=None: _LIBRARY.pretended_peak(index(device))
    cuda.memory_reserved = cuda.memory_allocated
    cuda.max_memory_reserved = cuda.max_memory_allocated
    cuda.reset_peak_memory_stats = lambda device=None: _LIBRARY.pretended_reset_peak(index(device))
    cuda.default_generators = generators
    cuda.get_rng_state = lambda device=None: generators[index(device)].get_state()
    cuda.set_rng_state = lambda state, device=None: generators[index(device)].set_state(state)
    cuda.manual_seed = lambda seed: generators[index()].manual_seed(seed)
    cuda.manual_seed_all = lambda seed: [each.manual_seed(seed) for each in generators]
    cuda.Stream, cuda.Event, cuda.StreamContext, cuda.stream = Stream, Event, InStream, InStream
    cuda.current_stream = cuda.default_stream = Stream
    torch.Tensor.record_stream = _nothing


def move_storages(kind: Any) -> None:
    """Storages of the pretended GPU can be copied and resized, too."""
    clone, resize = kind.clone, kind.resize_

    def seen(storage: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def own_clone(self: Any) -> Any:
        return seen(self).clone().untyped_storage() if self.device.type == "cuda" else clone(self)

    def own_resize(self: Any, size: int) -> Any:
        if self.device.type != "cuda":
            return resize(self, size)
        torch.ops.pretended.resize_storage_of(seen(self), size)
        return self

    kind.clone, kind.resize_ = own_clone, own_resize


def by_gloo(start: Any) -> Any:
    """A start of a process group that takes gloo where NCCL is asked for."""

    def started(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return start(backend and backend.replace("nccl", "gloo"), *args, **kwargs)

    return started


stand_in(torch.cuda, torch._C)
move_storages(torch.UntypedStorage)
distributed.init_process_group = by_gloo(distributed.init_process_group)
