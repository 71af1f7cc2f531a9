"""A frozen policy on the weights of another one that trains a LoRA: adapters need no second copy.

While a LoRA is trained the weights beside it stay what they were. A start, or a teacher that is a
LoRA on the same weights, therefore is that transformer with its own adapters switched off and the
other's switched on, for the time of a call.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from burnish.adapters import Adapter
from burnish.policies.base import Policy

PolicyT = TypeVar("PolicyT", bound=Policy[Any, Any])


class Borrowed:
    """A transformer as another policy uses it; all but its calls is the lender's own."""

    def __init__(self, lender: Any, modules: Iterable[str] = ()) -> None:
        """Borrow a transformer.

        Args:
            lender: of diffusers, with a LoRA or before it gets one.
            modules: linear modules that adapters will be put into, by the names that they have
                without a LoRA.
        """
        self._lender, self._is_mine = lender, False
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name in modules:
            lender.get_submodule(name).register_forward_hook(partial(self._add, name))

    def put_in(self, adapters: Mapping[str, Adapter]) -> None:
        """Compute with these adapters from now on."""
        device = next(self._lender.parameters()).device
        self._factors = {
            name: ((adapter.scale * adapter.low).to(device), adapter.high.to(device))
            for name, adapter in adapters.items()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged():
            return self._lender(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lender, name)

    @contextlib.contextmanager
    def _exchanged(self) -> Iterator[None]:
        has_adapters = bool(getattr(self._lender, "peft_config", None))
        if has_adapters:
            self._lender.disable_adapters()
        self._is_mine = True
        try:
            yield
        finally:
            self._is_mine = False
            if has_adapters:
                self._lender.enable_adapters()

    def _add(
        self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Float[Tensor, "..."] | None:
        if not self._is_mine or name not in self._factors:
            return None
        low, high = self._factors[name]
        return output + F.linear(F.linear(inputs[0].to(low.dtype), low), high).to(output.dtype)


def borrowed(policy: PolicyT, modules: Iterable[str] = ()) -> PolicyT:
    """A policy on the weights of another one, without any adapters yet; only its velocities are to
    be asked for, and without gradient."""
    other = copy.copy(policy)
    shared: Any = Borrowed(policy.transformer, modules)
    other.transformer = shared
    return other
