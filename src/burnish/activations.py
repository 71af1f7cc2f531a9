"""Bytes that operations hold, counted by operation, with weights that need not exist.

A hollow module has parameters with shape, type and device but without memory: torch's fake tensors.
Whatever touches one is only described, so that a network of any size is run in seconds. Whole
numbers and masks stay real, because what a network does with an image's place or a prompt's length
depends on their values. The same counting runs on real tensors, which is how the tests hold the one
to the other.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all: fake tensors of two modes do not mix."""
_HOST = torch.device("cpu")


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
            if weight is not None and not isinstance(weight.data, FakeTensor):
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
    return FakeTensor(_FAKE, torch.empty_like(tensor, device="meta", dtype=dtype), _HOST)


def weights(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors; those that share a storage count once."""
    storages = {_name(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _name(tensor: Tensor) -> int:
    """Of the storage: hollow ones have no address."""
    return tensor.untyped_storage()._cdata


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live, and their peak.

    Each storage counts once while it lives. Inside, hollow and real tensors may meet.
    """

    def __init__(self, *, held: Iterable[Tensor] = (), ignored: Iterable[Tensor] = ()) -> None:
        """Start to count.

        Args:
            held: made before, counted from the start.
            ignored: made before, never counted, such as weights that are told apart.
        """
        super().__init__()
        self.now = self.peak = 0
        self.copies = 0
        """Of these, copies of whole ignored tensors in another type, as autocast keeps of weights
        until the backward pass."""
        self._seen: set[int] = set()
        self._ignored = {_name(tensor) for tensor in ignored}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, named = _mixed(func, args, kwargs or {})
        found = func(*given, **named)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                is_new = self._count(leaf)
                is_copy = is_new and func is torch.ops.aten._to_copy.default
                if is_copy and _name(args[0]) in self._ignored:
                    self.copies += leaf.untyped_storage().nbytes()
        return found

    def _count(self, tensor: Tensor) -> bool:
        """Whether it was not counted yet."""
        storage = tensor.untyped_storage()
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


def _mixed(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of an operation that hollow and real tensors share, as torch describes them."""
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(leaf, FakeTensor) for leaf in leaves):
        return args, kwargs
    if func is torch.ops.aten.index.Tensor:
        # Of a mask only its values tell how many there are.
        places: list[Any] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool
            is_real = is_mask and not isinstance(index, FakeTensor)
            places += index.nonzero(as_tuple=True) if is_real else [index]
        args = (args[0], places)
    return tree_map_only(Tensor, _described, (args, kwargs))


def _described(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) or tensor.dim() == 0 else like(tensor)


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
            self._storages[_name(tensor)] = tensor.untyped_storage()
        return tensor


class GpuPrecision(TorchFunctionMode):
    """What autocast computes in float32 on a GPU and not on a CPU, on whatever device.

    Hollow tensors stand on the CPU, also in the plan of a GPU. Reference: the list of float32
    operations in the documentation of `torch.amp`; those that the networks here call.
    """

    _FLOAT32 = frozenset(
        "cumsum exp group_norm layer_norm log log_softmax norm normalize pow prod reciprocal rsqrt "
        "softmax softplus sum __pow__ __rdiv__ __rpow__ __rtruediv__".split()
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._FLOAT32:
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _widened(tensor: Tensor) -> Tensor:
    is_narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if is_narrow and torch.is_autocast_enabled("cpu") else tensor
