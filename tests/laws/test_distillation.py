"""Where on-policy distillation ends, on fields that are linear in their weights.

A branch of such a field is `v(x) = x @ weights.T`; a teacher has one for its prompt and one for the
empty prompt, and composes them as every teacher does.
"""

import itertools

import pytest
import torch
from torch import Tensor

from burnish.flow import KERNELS
from burnish.folding import folding
from burnish.guidance import compose
from burnish.objectives import velocity_matching

SIZE, SCALE = 6, 3.0
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])


def weights(seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(SIZE, SIZE, generator=draws)


CONDITIONAL, UNCONDITIONAL = weights(0), weights(1)


def guided(latents: Tensor) -> Tensor:
    """The teacher as it is deployed."""
    return compose(latents @ CONDITIONAL.T, latents @ UNCONDITIONAL.T, SCALE)


@torch.no_grad()
def path(student: Tensor, noise: Tensor) -> Tensor:
    """The states of the student's own unguided path, from pure noise to before the last step."""
    latents, states = noise, []
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        states.append(latents)
        levels = (s.expand(len(noise)) for s in (sigma, sigma_next))
        sigma_now, sigma_then = levels
        latents = KERNELS["ode"](
            latents, latents @ student.T, sigma=sigma_now, sigma_next=sigma_then, noise_level=0.0
        ).mean
    return torch.cat(states)


@pytest.fixture(scope="module")
def student() -> Tensor:
    """Taught on its own path, from the teacher's conditional branch."""
    own = CONDITIONAL.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([own], lr=0.02)
    draws = torch.Generator().manual_seed(2)
    for step in range(1500):
        states = path(own.detach(), torch.randn(32, SIZE, generator=draws))
        assert not states.requires_grad
        loss = velocity_matching(states @ own.T, guided(states)).mean()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return own.detach()


def test_the_student_becomes_the_guided_field(student: Tensor) -> None:
    field = compose(CONDITIONAL, UNCONDITIONAL, SCALE)
    assert float((student - field).abs().max()) < 1e-3


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
def test_guidance_on_a_folded_student_multiplies_with_what_is_folded_in(
    student: Tensor, scale: float
) -> None:
    """A student that answers the empty prompt as its start did."""
    states = torch.randn(64, SIZE, generator=torch.Generator().manual_seed(3))
    start, empty = states @ CONDITIONAL.T, states @ UNCONDITIONAL.T
    found = compose(states @ student.T, empty, scale)
    measured = folding(found, start, compose(start, empty, 2.0), compose(start, empty, 2.0))
    # One unit of guidance is one step of the scale; `found` is at 1 + its share of them.
    assert 1 + measured.guidance == pytest.approx(SCALE * scale, rel=1e-2)


def test_the_gradient_of_a_path_would_be_another_one() -> None:
    """States are constants: with gradient through the path the loss also steers where it goes."""
    own = CONDITIONAL.clone().requires_grad_(True)
    noise = torch.randn(16, SIZE, generator=torch.Generator().manual_seed(4))
    latents, losses = noise, []
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        velocity = latents @ own.T
        losses.append(velocity_matching(velocity, guided(latents)).mean())
        latents = latents + (sigma_next - sigma) * velocity
    (through,) = torch.autograd.grad(torch.stack(losses).mean(), own)
    states = path(own.detach(), noise)
    (constant,) = torch.autograd.grad(velocity_matching(states @ own.T, guided(states)).mean(), own)
    assert float((through - constant).norm() / constant.norm()) > 0.1
