"""The builder's training loop: what it changes, which a checkpoint holds, and how it goes on.

Muon trains the matrices of the blocks, AdamW the rest, both along one cycle of the learning rate.
The weights that are kept are a running average.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish import checkpoint
from burnish.optimizer_states import load_optimizer_state, optimizer_state
from burnish.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class FittingPlan:
    """How long and how fast."""

    steps: int
    batch_size: int = 64
    """Examples of each process and step."""
    learning_rate: float = 1.5e-3
    """AdamW's peak, for all that is not a matrix of a block."""
    matrix_learning_rate: float = 3e-3
    """Muon's peak, scaled to the size of an AdamW step."""
    ns_steps: int = 5
    """Newton-Schulz iterations of Muon, which computes them in bfloat16 on every processor."""
    ema: float = 0.99
    """Decay of the average; it begins shorter."""
    save_every: int = 250
    seed: int = 0


def fit(
    modules: nn.Module,
    blocks: Iterable[nn.Module],
    plan: FittingPlan,
    runtime: Runtime,
    losses: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    folder: Path | None = None,
    on_step: Callable[[dict[str, float]], None] = lambda found: None,
) -> list[dict[str, float]]:
    """Train in place; the weights end as their average.

    Args:
        modules: all of whose parameters are trained.
        blocks: whose matrices Muon trains.
        plan: how long and how fast.
        runtime: ranks that share each step.
        losses: loss of a step on this process, and figures of it.
        folder: checkpoints go here, and a training that was cut off goes on from the newest; None
            keeps none.
        on_step: called with the figures of each step done now.

    Returns:
        The figures of every step, those before a training was cut off included.
    """
    fitting = _Fitting(modules, blocks, plan, runtime, folder)
    for step in range(len(fitting.figures), plan.steps):
        loss, found = losses(step)
        fitting.step(loss)
        fitting.figures.append(found)
        on_step(found)
        is_due = (step + 1) % plan.save_every == 0 or step + 1 == plan.steps
        if runtime.is_main and is_due:
            fitting.save()
    fitting.finish()
    return fitting.figures


class _Fitting:
    """What a training changes, at the place where it stands."""

    def __init__(
        self,
        modules: nn.Module,
        blocks: Iterable[nn.Module],
        plan: FittingPlan,
        runtime: Runtime,
        folder: Path | None,
    ) -> None:
        """Start, or go on from the newest checkpoint; the arguments are those of `fit`."""
        self._plan = plan
        self._modules, self._runtime, self._folder = modules, runtime, folder
        modules.requires_grad_(True).train()
        self._parameters = list(modules.parameters())
        runtime.broadcast(self._parameters)
        self._average = [p.detach().clone() for p in self._parameters]
        matrices = {id(p): p for block in blocks for p in block.parameters() if p.ndim == 2}
        others = [p for p in self._parameters if id(p) not in matrices]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "matrices": torch.optim.Muon(
                list(matrices.values()),
                lr=plan.matrix_learning_rate,
                weight_decay=0.01,
                ns_steps=plan.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            "others": torch.optim.AdamW(
                others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
            ),
        }
        self.figures: list[dict[str, float]] = []
        """One entry for each step done."""
        self._resume()
        self._schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [group.get("max_lr", group["lr"]) for group in optimizer.param_groups],
                total_steps=plan.steps,
                pct_start=0.05,
                cycle_momentum=False,
                last_epoch=len(self.figures) - 1,
            )
            for optimizer in self._optimizers.values()
        ]

    def step(self, loss: Tensor) -> None:
        """One step of all optimizers down the mean gradient of all processes."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._runtime.all_reduce_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers.values(), self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        done = len(self.figures)
        decay = min(self._plan.ema, (done + 1) / (done + 10))
        current = [p.detach() for p in self._parameters]
        torch._foreach_lerp_(self._average, current, 1 - decay)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self._folder is None:
            return
        named = {}
        for group, values in (("parameters", self._parameters), ("average", self._average)):
            named[group] = {str(n): value.detach() for n, value in enumerate(values)}
        state: dict[str, Any] = {"figures": self.figures}
        for name, optimizer in self._optimizers.items():
            named[name], state[name] = optimizer_state(optimizer)
        checkpoint.save(self._folder, len(self.figures), named, state, keep=1)

    @torch.no_grad()
    def _resume(self) -> None:
        found = None if self._folder is None else checkpoint.latest(self._folder)
        if found is None:
            return
        for group, values in (("parameters", self._parameters), ("average", self._average)):
            for n, value in enumerate(values):
                value.copy_(found.tensors[group][str(n)])
        for name, optimizer in self._optimizers.items():
            load_optimizer_state(optimizer, found.tensors[name], found.state[name])
        self.figures = found.state["figures"]

    @torch.no_grad()
    def finish(self) -> None:
        """The weights become their average and are trained no more."""
        for parameter, mean in zip(self._parameters, self._average, strict=True):
            parameter.copy_(mean)
        self._modules.requires_grad_(False).eval()
