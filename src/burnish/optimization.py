"""The optimizer of a stage: its settings, the weights it changes, their average, their checkpoint.

The average does two things. Written at the end it is a better model than the last weights, which
still shake. Drawn with (`draw_average`) it is the old policy of the forward-process loss, as in
DiffusionNFT (arXiv:2509.16117): weights that wander are pulled back to it, where an old policy that
is renewed at every step follows them.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from burnish import checkpoint, sharded_checkpoint
from burnish.checkpoint import Checkpoint
from burnish.config import Config, ConfigError
from burnish.optimizer_states import load_optimizer_state, optimizer_state
from burnish.policies.base import Policy
from burnish.runtime import Runtime
from burnish.sharding import full, like, local
from burnish.tracking import Run

CHECKPOINTS = 2
"""Of a stage that are kept."""
Kind = Literal["adamw", "adamw_8bit"]
_SMALL = 4096
"""Elements of a weight from which on its moments are kept in 8 bits."""
_BLOCK = 256
"""Elements that share a scale there."""


class OptimizerConfig(Config):
    """AdamW, its schedule, and how often it steps."""

    kind: Kind = "adamw"
    """adamw_8bit keeps the moments in 8 bits, in blocks with a scale each (arXiv 2110.02861): a
    quarter of the memory or less; needs the extra `eight-bit`, and weights that are not spread."""
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_steps: int = Field(default=3, ge=0)
    """Optimizer steps over which the rate rises."""
    decay: bool = True
    """Fall to a tenth of the rate along a cosine by the end of the stage."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    num_updates: int = Field(default=4, ge=1)
    """Optimizer steps on the groups of one rollout; each sees a part of every group."""
    micro_batch: int = Field(default=192, ge=1)
    """States in one forward pass; gradients are accumulated over the others."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Average of the weights over optimizer steps, written at the end; 0 writes the last ones."""
    draw_average: bool = False
    """Draw the rollouts with the average, which then is the old policy that the loss holds on to:
    it moves slowly, and what noise does to the weights in between is pulled back."""

    @model_validator(mode="after")
    def _average_exists(self) -> "OptimizerConfig":
        if self.draw_average and self.ema_decay == 0:
            raise ValueError("need an average to draw with, got ema_decay=0; set it, e.g. to 0.9")
        return self

    def check(self, stage: str, *, is_sharded: bool) -> None:
        """Look, before anything is loaded, whether there will be such an optimizer of a stage.

        Raises:
            ConfigError: a package is missing, or weights are spread that must not be.
        """
        if self.kind == "adamw":
            return
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"need bitsandbytes for {stage}.optimizer.kind={self.kind}, got none; "
                "pip install 'burnish[eight-bit]'"
            )
        if is_sharded:
            raise ConfigError(
                f"need runtime.sharding=none for {stage}.optimizer.kind={self.kind}, got full; "
                "leave the kind out: spread weights have spread moments"
            )

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of some weights."""
        settings: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.kind == "adamw":
            return torch.optim.AdamW(parameters, **settings)
        # Here, as it is an extra, and takes seconds to import.
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(parameters, min_8bit_size=_SMALL, **settings)
        return made


@dataclass
class State:
    """All that changes while a stage runs."""

    policy: Policy[Any, Any]
    optimizer: torch.optim.Optimizer
    average: list[Tensor]
    step: int = 0

    @classmethod
    def start(cls, policy: Policy[Any, Any], config: OptimizerConfig) -> "State":
        """The policy as it is, all of its trainable weights in one optimizer."""
        parameters = [parameter for _, parameter in policy.trainable()]
        average = [p.detach().clone() for p in parameters] if config.ema_decay > 0 else []
        return cls(policy, config.build(parameters), average)

    @contextlib.contextmanager
    def averaged(self, is_wanted: bool = True) -> Iterator[None]:
        """The policy has the average of its weights inside, and its own again afterwards."""
        if not is_wanted:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for (_, parameter), mean in zip(self.policy.trainable(), self.average, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(own)

    @torch.no_grad()
    def finish(self) -> None:
        """The policy becomes its average, if one was kept."""
        for (_, parameter), mean in zip(self.policy.trainable(), self.average, strict=False):
            parameter.copy_(mean)

    def weights(self, rt: Runtime) -> dict[str, Tensor]:
        """All that is trained, whole where it will be written; all processes must come here."""
        return {name: _gathered(p.detach(), rt) for name, p in self.policy.trainable()}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds; the tensors may be spread over processes."""
        names = [name for name, _ in self.policy.trainable()]
        return {
            "policy": {name: p.detach() for name, p in self.policy.trainable()},
            "average": dict(zip(names, self.average, strict=True)) if self.average else {},
            "optimizer": optimizer_state(self.optimizer)[0],
        }

    def save(self, run: Run, rt: Runtime) -> None:
        """Write a checkpoint of the step that comes next, which any number of processes can take
        up; all must come here."""
        state = {"optimizer": optimizer_state(self.optimizer)[1]}
        place, step, tensors = run.checkpoints, self.step, self.tensors()
        if rt.is_sharded:
            sharded_checkpoint.save(place, step, tensors, state, rt, keep=CHECKPOINTS)
        elif rt.is_main:
            checkpoint.save(place, step, tensors, state, keep=CHECKPOINTS)

    def restore(self, run: Run, rt: Runtime) -> None:
        """Continue where the newest whole checkpoint was written, if there is one; all processes
        must come here."""
        found = checkpoint.latest(run.checkpoints, rt)
        if found is not None:
            tensors = self._shared_out(found)
            with torch.no_grad():
                for name, parameter in self.policy.trainable():
                    parameter.copy_(tensors["policy"][name])
                for (name, _), mean in zip(self.policy.trainable(), self.average, strict=False):
                    mean.copy_(tensors["average"][name])
            # Shares of nothing leave no group: no gradient has come yet.
            moments = tensors.get("optimizer", {})
            load_optimizer_state(self.optimizer, moments, found.state["optimizer"])
            self.step = found.step
        if rt.is_main:
            run.rewind(self.step - 1)

    def _shared_out(self, found: Checkpoint) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors of a checkpoint, spread as the weights that they belong to are."""
        named = dict(self.policy.trainable())
        ordered = list(named.values())

        def owner(group: str, key: str) -> Tensor:
            # Moments have the number of their weight, and what they are.
            return ordered[int(key.partition(".")[0])] if group == "optimizer" else named[key]

        if found.is_sharded:
            return sharded_checkpoint.read(found.folder, owner)
        return {
            group: {key: like(tensor, owner(group, key)) for key, tensor in own.items()}
            for group, own in found.tensors.items()
        }


def _gathered(tensor: Tensor, rt: Runtime) -> Tensor:
    """A whole tensor where it will be written, and nothing elsewhere: one at a time on a device."""
    whole = full(tensor)
    return whole.cpu() if rt.is_main else whole.new_empty(0)


def state_bytes(parameters: Iterable[Tensor], kind: Kind = "adamw") -> int:
    """What the optimizer keeps of parameters once it has stepped, and of their numbers of steps
    where those are tensors: two moments each, in the type of the parameter or in 8 bits."""
    if kind == "adamw":
        return sum(2 * parameter.nbytes + 4 for parameter in parameters)
    sizes = [parameter.numel() for parameter in parameters]
    in_blocks = sum(2 * (n + 4 * -(-n // _BLOCK)) for n in sizes if n >= _SMALL)
    # All of them read the same two tables.
    tables = 2 * 4 * 256 if in_blocks else 0
    return in_blocks + tables + sum(2 * 4 * n for n in sizes if n < _SMALL)


def moved(parameters: Sequence[Tensor]) -> Callable[[], bool]:
    """Remember the weights that are here; the answer tells whether any has changed since."""
    before = [local(parameter.detach()).clone() for parameter in parameters]
    return lambda: any(
        not torch.equal(a, local(b.detach())) for a, b in zip(before, parameters, strict=True)
    )


def set_rate(
    optimizer: torch.optim.Optimizer, plan: OptimizerConfig, *, update: int, total: int
) -> None:
    """Learning rate of one of `total` updates: warm-up, then a cosine to a tenth."""
    rate = min(1.0, (update + 1) / max(plan.warmup_steps, 1))
    if plan.decay:
        half_turn = torch.pi * min(update / max(total - 1, 1), 1.0)
        rate *= 0.55 + 0.45 * float(torch.cos(torch.tensor(half_turn)))
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate * rate
