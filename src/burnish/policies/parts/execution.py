"""How the networks of a policy are run: where, by which kernel of attention, compiled or not."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from burnish.config import ConfigError

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


@contextlib.contextmanager
def visiting(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, networks are on a device; those that were elsewhere go back afterwards."""
    homes = [next(network.parameters()).device for network in networks]
    guests = [
        (network, home) for network, home in zip(networks, homes, strict=True) if home != device
    ]
    try:
        for network, _ in guests:
            network.to(device)
        yield
    finally:
        for network, home in guests:
            network.to(home)


def compile_blocks(transformer: nn.Module, classes: Sequence[str], backend: str) -> None:
    """Have every repeated block compiled when it is first called, one alone: all are alike, so that
    the code of one serves all of them."""
    for module in transformer.modules():
        if type(module).__name__ in classes:
            module.compile(backend=backend)


def set_attention(transformer: Any, name: Attention) -> None:
    """Choose the kernel of a transformer's attention.

    Raises:
        ConfigError: it is not installed, or the transformer leaves no choice.
    """
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ConfigError(
            f"need policy.attention=native for a {type(transformer).__name__}, whose attention is "
            f"torch's own, got {name}; leave it out"
        )
    try:
        transformer.set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        others = ", ".join(get_args(Attention))
        raise ConfigError(
            f"need an attention that is installed, got {name} ({reason}); install it, or set "
            f"policy.attention to one of {others}"
        ) from error
