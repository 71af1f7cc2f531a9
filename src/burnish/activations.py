"""Bytes that operations hold, counted by operation, with weights that need not exist.

A hollow tensor has shape, strides and type, and claims to be on the CPU, but has no memory: what
touches one is only described, by torch's meta kernels, so that a network of any size is run in
seconds. Real tensors may meet hollow ones, and what is made of real ones alone stays real, because
what a network does with an image's place or a prompt's length depends on their values. Autocast and
autograd see hollow tensors as they see others. The same counting runs on real tensors, which is how
the tests hold the one to the other.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_META = torch.device("meta")
_LARGE = 1 << 24
"""Numbers in a tensor that nobody looks into: more than a picture has."""


class Hollow(Tensor):
    """A tensor without memory."""

    described: Tensor
    """The same on the meta device, whose storages tell which tensors share memory."""

    @staticmethod
    def __new__(cls, described: Tensor) -> "Hollow":
        made: Hollow = Tensor._make_wrapper_subclass(
            cls,
            described.shape,
            strides=described.stride(),
            storage_offset=described.storage_offset(),
            dtype=described.dtype,
            device=torch.device("cpu"),
        )
        made.described = described
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if "device" in named:
            named["device"] = _META
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        # In place, a tensor is given back that came in.
        known: dict[int, Tensor] = {}
        named = {name: _described(value, known) for name, value in named.items()}
        return _hollow(func(*[_described(value, known) for value in args], **named), known)


# Not nested in the method: functions that call themselves would keep tensors alive in a cycle.
def _described(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Hollow):
        known[id(value.described)] = value
        return value.described
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=_META)
    if isinstance(value, list | tuple):
        return type(value)([_described(one, known) for one in value])
    return value


def _hollow(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else Hollow(value)
    if isinstance(value, list | tuple):
        return type(value)([_hollow(one, known) for one in value])
    return value


def _places(indices: Any) -> list[Any]:
    """Indices without real masks: of a mask only its values tell how many places there are."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found


def on_meta() -> contextlib.AbstractContextManager[None]:
    """Inside, parameters that modules register have no memory; what else they compute is real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def hollow(build: Callable[[], ModuleT], dtype: torch.dtype = torch.float32) -> ModuleT:
    """A module whose weights have shape and type, and no memory.

    Args:
        build: makes the module with fresh weights, of which none is drawn.
        dtype: of its weights and real-valued buffers.
    """
    with on_meta():
        module: Any = build()
    if hasattr(module, "tie_weights"):
        # What is put on the meta device one by one has come apart.
        module.tie_weights()
    return emptied(module, dtype)


def emptied(module: ModuleT, dtype: torch.dtype | None = None) -> ModuleT:
    """The module with its weights and real-valued buffers replaced by hollow ones, in place; None
    keeps their types."""
    empty: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None and not isinstance(weight, Hollow):
                made = nn.Parameter(like(weight.data, dtype), requires_grad=weight.requires_grad)
                # Weights that modules share stay shared.
                part._parameters[name] = empty.setdefault(id(weight), (weight, made))[1]
        for name, buffer in list(part._buffers.items()):
            # Whole numbers are positions, whose values are asked for.
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = like(buffer, dtype)
    return module


def like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A hollow tensor of the same shape and strides; None keeps the type."""
    return Hollow(torch.empty_like(_inner(tensor), device=_META, dtype=dtype))


def weights(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors; those that share a storage count once."""
    storages = [_storage(tensor) for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _inner(tensor: Tensor) -> Tensor:
    return tensor.described if isinstance(tensor, Hollow) else tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return _inner(tensor).untyped_storage()


def _name(tensor: Tensor) -> int:
    """Of the storage: hollow ones have no address."""
    return _storage(tensor)._cdata


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live, and their peak.

    Each storage counts once while it lives. Inside, hollow and real tensors may meet.
    """

    def __init__(
        self,
        *,
        held: Iterable[Tensor] = (),
        ignored: Iterable[Tensor] = (),
        is_hollow: bool = False,
    ) -> None:
        """Start to count.

        Args:
            held: made before, counted from the start.
            ignored: made before, never counted, such as weights that are told apart.
            is_hollow: describe large real numbers, too, instead of computing with them.
        """
        super().__init__()
        self._is_hollow = is_hollow
        self.now = self.peak = 0
        self.copies = 0
        """Of these, copies of whole ignored tensors in another type, as autocast keeps of weights
        until the backward pass."""
        self._seen: set[int] = set()
        self._ignored = {_name(tensor) for tensor in ignored}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_hollow:
            args = [like(one) if _is_large(one) else one for one in args]
        found = func(*args, **(kwargs or {}))
        for made in found if isinstance(found, list | tuple) else (found,):
            if isinstance(made, Tensor):
                is_new = self._count(made)
                is_copy = is_new and func is torch.ops.aten._to_copy.default
                if is_copy and _name(args[0]) in self._ignored:
                    self.copies += _storage(made).nbytes()
        return found

    def _count(self, tensor: Tensor) -> bool:
        """Whether it was not counted yet."""
        storage = _storage(tensor)
        name, size = storage._cdata, storage.nbytes()
        if not size or name in self._seen or name in self._ignored:
            return False
        self._seen.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, name, size)
        return True

    def _free(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


def _is_large(value: Any) -> bool:
    is_real = isinstance(value, Tensor) and not isinstance(value, Hollow)
    return is_real and value.is_floating_point() and value.numel() > _LARGE


class Saved(contextlib.ExitStack):
    """Bytes of the distinct tensors that operations save for the backward pass.

    Args:
        ignored: tensors that exist anyway, such as the weights.
    """

    def __init__(self, *, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._ignored = {_name(tensor) for tensor in ignored}
        self._storages: dict[int, Any] = {}
        """Kept, so that no name is given twice."""

    def __enter__(self) -> "Saved":
        super().__enter__()
        self.enter_context(saved_tensors_hooks(self._save, lambda tensor: tensor))
        return self

    @property
    def num_bytes(self) -> int:
        """So far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def _save(self, tensor: Tensor) -> Tensor:
        if _name(tensor) not in self._ignored:
            self._storages[_name(tensor)] = _storage(tensor)
        return tensor


def _is_widened(operation: str) -> bool:
    """Whether this torch computes an operation in float32 under autocast of a GPU."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operation, "AutocastCUDA"))


class GpuPrecision(TorchFunctionMode):
    """What autocast computes in float32 on a GPU and not on a CPU, on whatever device.

    Hollow tensors stand on the CPU, also in the plan of a GPU. Reference: the list of float32
    operations in the documentation of `torch.amp`, and what torch registers for `AutocastCUDA`
    beside it; those that the networks here call. `rms_norm` came later than the others.
    """

    _FLOAT32 = frozenset(
        (
            *("cumsum", "exp", "log", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt"),
            *("group_norm", "interpolate", "layer_norm", "log_softmax", "softmax"),
            *("softplus", "sum"),
            *("__pow__", "__rdiv__", "__rpow__", "__rtruediv__"),
            *(("rms_norm",) if _is_widened("aten::rms_norm") else ()),
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FLOAT32:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(tensor: Tensor) -> Tensor:
    is_narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if is_narrow and torch.is_autocast_enabled("cpu") else tensor
