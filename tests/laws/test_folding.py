"""How much of a teacher is folded in: guidance and what was learnt, told apart."""

import pytest
import torch
from torch import Tensor

from burnish.folding import folding


def velocities(seed: int) -> list[Tensor]:
    """Start, guided start and target at a few states."""
    draws = torch.Generator().manual_seed(seed)
    start, guidance, learnt = (torch.randn(6, 5, 4, generator=draws) for _ in range(3))
    # What was learnt leans on the guidance, as it does for a real teacher.
    learnt = 0.3 * learnt + 0.2 * guidance
    return [start, start + guidance, start + guidance + learnt]


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, 1.0), (0.9, 0.2), (1.0, 0.0), (0.4, 1.3)])
def test_the_shares_that_a_student_was_made_of_come_back(a: float, b: float) -> None:
    start, guided, target = velocities(0)
    student = start + a * (guided - start) + b * (target - guided)
    found = folding(student, start, guided, target)
    assert (found.guidance, found.learnt) == pytest.approx((a, b), abs=1e-6)


def test_what_lies_beside_both_parts_changes_no_share_but_the_gap() -> None:
    start, guided, target = velocities(1)
    rest = torch.randn(start.shape, generator=torch.Generator().manual_seed(9))
    basis = torch.stack([guided - start, target - guided]).flatten(1)
    shares = torch.linalg.lstsq(basis.T, rest.flatten()[:, None]).solution
    rest = rest - (basis.T @ shares).reshape(rest.shape)
    plain, beside = (folding(target + r, start, guided, target) for r in (0 * rest, rest))
    assert (beside.guidance, beside.learnt) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert plain.gap == pytest.approx(0.0, abs=1e-10)
    assert beside.gap == pytest.approx(float(rest.square().mean()), rel=1e-4)


def test_the_gap_at_the_start_is_the_whole_way() -> None:
    start, guided, target = velocities(2)
    found = folding(start, start, guided, target)
    assert found.gap == found.way == pytest.approx(float((target - start).square().mean()))
    assert found.guidance_part == pytest.approx(float((guided - start).square().mean()))
    assert found.learnt_part == pytest.approx(float((target - guided).square().mean()))


def test_a_teacher_without_guidance_or_without_learning_has_no_such_share() -> None:
    start, guided, target = velocities(3)
    unguided = folding(target, start, start, target)
    assert (unguided.guidance, unguided.learnt) == pytest.approx((0.0, 1.0), abs=1e-6)
    untaught = folding(guided, start, guided, guided)
    assert (untaught.guidance, untaught.learnt) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_a_start_that_was_the_teacher_has_finite_shares() -> None:
    start, _, _ = velocities(4)
    found = folding(start, start, start, start)
    assert found.gap == 0 and found.way == pytest.approx(1e-3 * float(start.square().mean()))
    away = folding(1.1 * start, start, start, start)
    assert 0 < away.gap / away.way < 100
