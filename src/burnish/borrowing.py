"""A frozen policy on the weights of another one that trains a LoRA: adapters need no second copy.

While a LoRA is trained the weights beside it stay what they were. A start, or a teacher that is a
LoRA on the same weights, therefore is that transformer with its own adapters switched off and the
other's switched on, for the time of a call.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch.nn.functional as F

from burnish.adapters import Adapter
from burnish.policies.base import Policy

_FACTORS = ("lent_low", "lent_high")
PolicyT = TypeVar("PolicyT", bound=Policy[Any, Any])


class Borrowed:
    """A transformer as another policy uses it; all but its calls is the lender's own.

    What a hook needs stands on its module, so that blocks stay alike to a compiler.
    """

    def __init__(self, lender: Any, modules: Iterable[str] = ()) -> None:
        """Borrow a transformer.

        Args:
            lender: of diffusers, with a LoRA or before it gets one.
            modules: linear modules that adapters will be put into, by the names that they have
                without a LoRA.
        """
        self._lender = lender
        # Found now: beside a LoRA they have other names.
        self._modules = {name: lender.get_submodule(name) for name in modules}
        for module in self._modules.values():
            module.is_lent = False
            for factor in _FACTORS:
                module.register_buffer(factor, None, persistent=False)
            module.register_forward_hook(_add)

    def put_in(self, adapters: Mapping[str, Adapter]) -> None:
        """Compute with these adapters from now on."""
        device = next(self._lender.parameters()).device
        for name, module in self._modules.items():
            adapter = adapters.get(name)
            factors = (None, None)
            if adapter is not None:
                factors = (adapter.scale * adapter.low).to(device), adapter.high.to(device)
            module.lent_low, module.lent_high = factors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._exchanged():
            return self._lender(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._lender, name)

    @contextlib.contextmanager
    def _exchanged(self) -> Iterator[None]:
        has_adapters = bool(getattr(self._lender, "peft_config", None))
        if has_adapters:
            self._lender.disable_adapters()
        self._lend(True)
        try:
            yield
        finally:
            self._lend(False)
            if has_adapters:
                self._lender.enable_adapters()

    def _lend(self, is_lent: bool) -> None:
        for module in self._modules.values():
            module.is_lent = is_lent


def _add(module: Any, inputs: Any, output: Any) -> Any:
    """A hook of a linear module; of any type, because a compiler must be able to read it also where
    types are checked at run time."""
    low, high = module.lent_low, module.lent_high
    if not module.is_lent or low is None:
        return None
    return output + F.linear(F.linear(inputs[0].to(low.dtype), low), high).to(output.dtype)


def borrowed(policy: PolicyT, modules: Iterable[str] = ()) -> PolicyT:
    """A policy on the weights of another one, without any adapters yet; only its velocities are to
    be asked for, and without gradient."""
    other = copy.copy(policy)
    shared: Any = Borrowed(policy.transformer, modules)
    other.transformer = shared
    return other
