"""Looks at a policy while it trains: when they are due, what they saw, and the weights of the best.

A stage may be watched: by a guard of its reward, or by the gap to its teachers. Whoever watches
decides what a look measures; here it is written down, row by row, and the weights of the best look
are kept, so that a stage that is resumed goes on as if it had never stopped.

    looks.jsonl     a row for each look
    step-.../       the weights of the best look so far
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish import checkpoint
from burnish.policies.base import Policy
from burnish.runtime import Runtime
from burnish.tracking import RunError, read_rows, write_rows

LOOKS = "looks.jsonl"
"""Name of the file of the rows."""
Look = dict[str, Any]
"""A row: `step`, what was seen, and `told`, the part of it that is logged."""
LEVELS = (0.9, 0.6, 0.3)
"""Noise levels at which looks ask for velocities."""
IsBetter = Callable[[Look, Look], bool]
"""Whether the first of two looks is better than the second."""


def best_of(looks: Sequence[Look], is_better: IsBetter) -> Look:
    """The best of some looks, from the first to the newest; of equal ones the first."""
    return functools.reduce(lambda best, look: look if is_better(look, best) else best, looks)


class Watch(ABC):
    """Who looks at a stage now and then."""

    looks: "Looks"

    @property
    def is_over(self) -> bool:
        """Whether the stage must end here."""
        return False

    @abstractmethod
    def prepare(self, policy: Policy[Any, Any], rt: Runtime) -> None:
        """What must be done before a look and takes all processes; the policy may be spread.

        Args:
            policy: as for `look`.
            rt: precision and processes.
        """

    @abstractmethod
    def look(
        self, policy: Policy[Any, Any], step: int, reward: float | None, rt: Runtime
    ) -> dict[str, float]:
        """Measure, add a row to the looks, and return what to log; the first look must be at the
        start, and every one be remembered.

        Args:
            policy: as it would be written now.
            step: steps done.
            reward: mean training reward since the look before, if there is one.
            rt: precision.

        Raises:
            RunError: nothing could be measured.
        """

    @abstractmethod
    def restore(self, policy: Policy[Any, Any]) -> None:
        """Give the policy, at the end, the weights that the looks speak for.

        Raises:
            RunError: the start was the best.
        """


class Looks:
    """All looks of one stage."""

    def __init__(self, folder: Path, *, every: int, step: int, is_better: IsBetter) -> None:
        """Read what was seen before.

        Args:
            folder: of the looks.
            every: steps between two looks.
            step: at which the stage goes on; later looks are forgotten, as they come again.
            is_better: whether a look is better than another; it decides which is the best.
        """
        self.folder, self._every, self._is_better = folder, every, is_better
        self.rows: list[Look] = [row for row in read_rows(self._path) if row["step"] <= step]
        # Weights of looks that are forgotten would pass for those of looks that come again.
        checkpoint.drop(self.folder, [old for old in checkpoint.steps(self.folder) if old > step])

    @property
    def _path(self) -> Path:
        return self.folder / LOOKS

    @property
    def last_step(self) -> int:
        """Step of the newest look; 0 before the first."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def best(self) -> Look:
        """The best of all looks."""
        return best_of(self.rows, self._is_better)

    def is_due(self, step: int) -> bool:
        """Whether to look before this step."""
        return step % self._every == 0 and step not in [row["step"] for row in self.rows]

    @property
    def is_best(self) -> bool:
        """Whether the newest look is the best: its weights will be wanted."""
        return self.best is self.rows[-1]

    def told(self, step: int) -> dict[str, float]:
        """What the look before a step logged; nothing where none was taken there."""
        return next((row.get("told", {}) for row in self.rows if row["step"] == step), {})

    def remember(self, weights: Mapping[str, Tensor], told: Mapping[str, float]) -> None:
        """Keep the weights if the newest look is the best, then write the looks down.

        Args:
            weights: whole, of all that is trained, by name; may be empty for any other look.
            told: what the newest look logs with its step; a stage that is cut off before that step
                is done logs it when it comes to the step again.
        """
        self.rows[-1]["told"] = dict(told)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_best:
            checkpoint.save(
                self.folder, self.last_step, {"policy": weights}, {}, keep=len(self.rows)
            )
            needed = self._needed()
            kept = checkpoint.steps(self.folder)
            checkpoint.drop(self.folder, [old for old in kept if old not in needed])
        write_rows(self._path, self.rows)

    def _needed(self) -> set[int]:
        """Steps whose weights may be asked for: of the best look now, and of the best as it was at
        each step from which the stage may be resumed."""
        resumable = [*checkpoint.steps(self.folder.parent / "checkpoints"), self.last_step]
        past = [[row for row in self.rows if row["step"] <= step] for step in resumable]
        return {best_of(rows, self._is_better)["step"] for rows in past if rows}

    def restore(self, policy: Policy[Any, Any]) -> int:
        """Give the policy the weights of the best look; returns its step.

        Raises:
            RunError: they are not there.
        """
        step = self.best["step"]
        if step not in checkpoint.steps(self.folder):
            raise RunError(
                f"need the weights of the look at step {step} in {self.folder}, got none; restore "
                "the folder or start the stage again"
            )
        found = checkpoint.load(self.folder / f"step-{step:06d}")
        with torch.no_grad():
            for name, parameter in policy.trainable():
                parameter.copy_(found.tensors["policy"][name])
        return found.step
