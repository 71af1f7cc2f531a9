"""How the networks of a policy are run: where, by which kernel of attention, compiled or not."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.config import ConfigError
from burnish.wording import brief

Attention = Literal[
    "native",
    "flash",
    "_flash_3",
    "flex",
    "xformers",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
]
"""Kernels of attention by diffusers' names: those that have a backward pass and are installed, and
not fetched from a hub when they are first asked for."""
Again = Callable[[], contextlib.AbstractContextManager[Any]]
"""Opens what blocks are to be computed again in."""
_COMPILED = 64
"""Pieces of code that a block may be compiled to."""
_is_uncompiled: ContextVar[bool] = ContextVar("is_uncompiled", default=False)
_WITHOUT_MASK = ("flash", "_flash_3", "_native_flash")


@contextlib.contextmanager
def visiting(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, networks are on a device; those that were elsewhere go back afterwards."""
    guests = [own for own in networks if next(own.parameters()).device != device]
    # What is frozen need not be copied back: it is still where it was.
    weights = [(weight, weight.data) for guest in guests for weight in guest.parameters()]
    buffers = [(part, dict(part._buffers)) for guest in guests for part in guest.modules()]
    try:
        for guest in guests:
            guest.to(device)
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        for part, before in buffers:
            part._buffers.update(before)


def compile_blocks(transformer: nn.Module, classes: Sequence[str], backend: str) -> None:
    """Have every repeated block compiled when it is first called, one alone: all are alike, so that
    the code of one serves all of them."""
    _allow_many()
    # Else the code that served a call longest ago is asked last, so that a block could be computed
    # again by other code than before, which keeps other tensors. torch 2.8 has no such switch.
    compiler: Any = torch._C
    set_order = getattr(compiler._dynamo.eval_frame, "_set_lru_cache", None)
    if set_order is not None:
        set_order(False)
    for module in _blocks(transformer, classes):
        module.compile(backend=backend)


def _allow_many() -> None:
    """Let a block have more pieces of code in this thread than torch's eight, beyond which it would
    silently run as it is: a run with a teacher has them with and without gradient, adapters and
    padding, in pictures of several sizes."""
    import torch._dynamo.config  # Slow, and most runs compile nothing.

    torch._dynamo.config.recompile_limit = max(_COMPILED, torch._dynamo.config.recompile_limit)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, blocks run as they are, and so will those of them that are computed again."""
    before = _is_uncompiled.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _is_uncompiled.reset(before)


def checkpoint_blocks(
    transformer: Any,
    classes: Sequence[str],
    share: bool | float,
    *,
    again: Again = contextlib.nullcontext,
) -> None:
    """Have a share of the repeated blocks, evenly spread, computed again in the backward pass, and
    what the others compute kept.

    Args:
        transformer: of diffusers, changed in place.
        classes: names of its blocks' classes.
        share: 0 keeps everything, 1 nothing but what goes into a block.
        again: see `Again`.
    """
    if not share:
        transformer.disable_gradient_checkpointing()
        return
    for place, block in enumerate(_blocks(transformer, classes)):
        block.is_kept = math.floor((place + 1) * share) == math.floor(place * share)
    transformer.enable_gradient_checkpointing(partial(_checkpointed, again))


def _checkpointed(again: Callable[[], Any], block: Any, *inputs: Any) -> Any:
    if block.is_kept:
        return block(*inputs)
    is_uncompiled = _is_uncompiled.get()

    @contextlib.contextmanager
    def once_more() -> Iterator[None]:
        if block._compiled_call_impl is not None:
            # The backward pass of a GPU has a thread of its own.
            _allow_many()
        with again(), uncompiled() if is_uncompiled else contextlib.nullcontext():
            yield

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), once_more()

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _blocks(transformer: nn.Module, classes: Sequence[str]) -> Iterator[Any]:
    return (module for module in transformer.modules() if type(module).__name__ in classes)


def check_attention(name: Attention, *, is_chosen: bool, is_masked: bool) -> None:
    """Look, before weights are read, whether a kernel of attention can be had.

    Args:
        name: of the kernel.
        is_chosen: whether the family's transformer leaves a choice.
        is_masked: whether prompts of unequal length share a call.

    Raises:
        ConfigError: there is no choice, or it is not installed, or takes no mask where there is
            one.
    """
    if not is_chosen:
        raise ConfigError(
            f"need policy.attention=native for this family, whose attention is torch's own, got "
            f"{name}; leave it out"
        )
    if is_masked and name in _WITHOUT_MASK:
        raise ConfigError(
            f"need an attention that takes a mask for this family, got policy.attention={name}; "
            "set it to native or _native_cudnn"
        )
    # By a private name, as diffusers has no public one.
    from diffusers.models import attention_dispatch

    try:
        backend = attention_dispatch.AttentionBackendName(name)
        attention_dispatch._check_attention_backend_requirements(backend)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = brief(error)
        raise ConfigError(
            f"need an attention that is installed, got policy.attention={name} ({reason}); "
            "install it, or leave it out"
        ) from error


def set_attention(transformer: Any, name: Attention) -> None:
    """Choose the kernel of one transformer's attention; diffusers' own switch is for all."""
    found = [getattr(module, "processor", None) for module in transformer.modules()]
    processors: list[Any] = [one for one in found if hasattr(one, "_attention_backend")]
    from diffusers.models.attention_dispatch import AttentionBackendName

    for processor in processors:
        processor._attention_backend = AttentionBackendName(name)
