"""How much of a guided teacher a student without guidance has taken in.

What a student must learn has two parts: the guidance that its start would need at deployment, and
what reinforcement learning added to it. A small distance to the teacher does not tell which of the
two is still missing, and the first is usually much the larger; so they are measured apart.

Velocities are noise - clean; sums run in float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Velocities = Float[Tensor, "*value"]
"""Velocities at the same states, in any shape."""


@dataclass(frozen=True)
class Folding:
    """A student on its way from its start to its teacher, over some states."""

    gap: float
    """Mean squared distance to the teacher's guided velocity."""
    way: float
    """That distance of the start, before anything was learnt; at least a thousandth of the mean
    square of the teacher's velocity, so that a start that was the teacher has finite shares."""
    guidance: float
    """Share of the guidance that is folded in: 0 at the start, 1 when all is."""
    learnt: float
    """Share of what the teacher learnt over the guided start that is taken in, likewise."""
    guidance_part: float
    """Mean square of the guidance itself."""
    learnt_part: float
    """Mean square of what the teacher learnt over the guided start."""


def folding(
    student: Velocities, start: Velocities, start_guided: Velocities, target: Velocities
) -> Folding:
    """Split the way of a student into guidance and what the teacher learnt.

        guidance = start_guided - start        learnt = target - start_guided
        student - start = a guidance + b learnt + rest,   a and b by least squares over all states

    A student that is its teacher, guidance included, has a = b = 1 and no gap. The projection of
    the student on the guided field, a alone, is reported at .97-.98 of it after distillation
    (arXiv 2606.27377); here the two are fitted together, as they are not at right angles.

    Args:
        student: unguided velocity of the student.
        start: unguided velocity of what the student started from.
        start_guided: the same, guided as the teacher is deployed.
        target: guided velocity of the teacher.

    A part that is zero has share 0.

    >>> zero, one = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> found = folding(0.5 * one, start=zero, start_guided=one, target=one)
    >>> found.gap, found.way, found.guidance, found.learnt
    (0.5, 2.0, 0.5, 0.0)
    """
    ours, origin, guided, wanted = (
        v.double().flatten() for v in (student, start, start_guided, target)
    )
    parts = torch.stack([guided - origin, wanted - guided])
    shares = torch.linalg.pinv(parts @ parts.T) @ (parts @ (ours - origin))
    return Folding(
        gap=float((ours - wanted).square().mean()),
        way=max(float((origin - wanted).square().mean()), 1e-3 * float(wanted.square().mean())),
        guidance=float(shares[0]),
        learnt=float(shares[1]),
        guidance_part=float(parts[0].square().mean()),
        learnt_part=float(parts[1].square().mean()),
    )
