"""Whether the updates of a stage run away, from the size of their gradients.

The gradients of a stage that learns become smaller or stay as they are. Where they come to several
times what they were, something drives the policy that no picture answers for, such as noise levels
that its sampler does not visit: the pictures get worse some time later, and go on doing so.
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WINDOW = 10
"""Steps whose median is compared, as single steps differ by more."""
FACTOR = 5.0
"""Between medians, from which on gradients run away."""


class RunawayWarning(UserWarning):
    """The updates of a stage run away."""


class Runaway(NamedTuple):
    """Where gradients began to run away."""

    step: int
    """The last of its window."""
    times: float
    """The median of its window, over the least of an earlier one."""

    def __str__(self) -> str:
        return f"at step {self.step} its gradients were {self.times:.0f} times what they had been"


def runaway(norms: Sequence[float]) -> Runaway | None:
    """The first window of steps whose median is `FACTOR` times that of an earlier one, if any is.

    Args:
        norms: of the gradient, step by step.

    >>> runaway([0.2] * 20 + [1.5] * 10)
    Runaway(step=29, times=7.5)
    >>> runaway([1.5] * 10 + [0.2] * 20)
    """
    least = float("inf")
    for end in range(WINDOW, len(norms) + 1, WINDOW):
        median = statistics.median(norms[end - WINDOW : end])
        if median > FACTOR * least:
            return Runaway(end - 1, median / least)
        # A stage may begin without a gradient, where its groups agree.
        least = min(least, median) if median > 0 else least
    return None


def norms(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Those of the gradients in the metrics of a stage."""
    found = (row.get("policy/grad_norm") for row in rows)
    return [float(norm) for norm in found if norm is not None]


def warn_of_runaway(rows: Sequence[Mapping[str, Any]], label: str) -> None:
    """Tell, at the step where it begins, that the updates of a stage run away."""
    sizes = norms(rows)
    found = runaway(sizes)
    if found is not None and found.step == len(sizes) - 1:
        where = 'docs/training.md, "When a stage runs away"'
        message = f"the updates of {label} run away: {found}; what helps is in {where}"
        warnings.warn(message, RunawayWarning, stacklevel=2)
