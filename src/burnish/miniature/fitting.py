"""Weights, their running average and the optimizers of the builder, which a checkpoint holds.

Muon trains the matrices of the blocks, AdamW the rest, both along one cycle of the learning rate.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish import checkpoint
from burnish.runtime import Runtime


class Fitting:
    """What a training of the builder changes, at the place where it stands."""

    def __init__(
        self,
        modules: nn.Module,
        blocks: Iterable[nn.Module],
        runtime: Runtime,
        learning_rate: float,
        matrix_learning_rate: float,
        steps: int,
        folder: Path | None,
    ) -> None:
        """Start, or go on from the newest checkpoint.

        Args:
            modules: all of whose parameters are trained.
            blocks: whose matrices Muon trains.
            runtime: ranks that share each step.
            learning_rate: AdamW's peak.
            matrix_learning_rate: Muon's peak, scaled to the size of an AdamW step.
            steps: of the whole training.
            folder: of the checkpoints; None keeps none.
        """
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
                lr=matrix_learning_rate,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            ),
            "others": torch.optim.AdamW(
                others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
            ),
        }
        self.losses: list[dict[str, float]] = []
        """One entry for each step done; the caller adds it."""
        self._resume()
        self._schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                [group.get("max_lr", group["lr"]) for group in optimizer.param_groups],
                total_steps=steps,
                pct_start=0.05,
                cycle_momentum=False,
                last_epoch=len(self.losses) - 1,
            )
            for optimizer in self._optimizers.values()
        ]

    def step(self, loss: Tensor, ema: float) -> None:
        """One step of all optimizers down the mean gradient of all processes.

        Args:
            loss: of this process.
            ema: decay of the average; it begins shorter.
        """
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._runtime.all_reduce_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers.values(), self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        done = len(self.losses)
        decay = min(ema, (done + 1) / (done + 10))
        current = [p.detach() for p in self._parameters]
        torch._foreach_lerp_(self._average, current, 1 - decay)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self._folder is None:
            return
        named = {}
        for group, values in (("parameters", self._parameters), ("average", self._average)):
            named[group] = {str(n): value.detach() for n, value in enumerate(values)}
        state: dict[str, Any] = {"losses": self.losses}
        for name, optimizer in self._optimizers.items():
            named[name], state[name] = checkpoint.optimizer_state(optimizer)
        checkpoint.save(self._folder, len(self.losses), named, state, keep=1)

    @torch.no_grad()
    def _resume(self) -> None:
        found = None if self._folder is None else checkpoint.latest(self._folder)
        if found is None:
            return
        for group, values in (("parameters", self._parameters), ("average", self._average)):
            for n, value in enumerate(values):
                value.copy_(found.tensors[group][str(n)])
        for name, optimizer in self._optimizers.items():
            checkpoint.load_optimizer_state(optimizer, found.tensors[name], found.state[name])
        self.losses = found.state["losses"]

    @torch.no_grad()
    def finish(self) -> None:
        """The weights become their average and are trained no more."""
        for parameter, mean in zip(self._parameters, self._average, strict=True):
            parameter.copy_(mean)
        self._modules.requires_grad_(False).eval()
