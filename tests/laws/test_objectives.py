"""Laws of the losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from burnish.flow import KERNELS, log_ratio, path_from_velocity
from burnish.guidance import compose, residual
from burnish.objectives import (
    clipped_policy_loss,
    forward_process_loss,
    is_clipped,
    optimality,
    velocity_kl,
    velocity_matching,
)

finite = st.floats(-3, 3)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), leaf)[0]


# Clipped policy loss


@given(finite, finite, st.floats(0.01, 0.5))
def test_the_policy_loss_is_the_pessimistic_one(log_rho: float, a: float, clip: float) -> None:
    rho = math.exp(log_rho)
    wanted = max(-a * rho, -a * min(max(rho, 1 - clip), 1 + clip))
    loss = clipped_policy_loss(vector(log_rho), vector(a), clip_range=clip)
    torch.testing.assert_close(loss, vector(wanted))


def test_at_ratio_one_the_gradient_is_exactly_reinforce() -> None:
    log_rho, advantage = torch.zeros(4).double().requires_grad_(), normals(4)
    loss = clipped_policy_loss(log_rho, advantage, clip_range=1e-4)
    assert torch.equal(gradient(loss, log_rho), -advantage)


@given(finite, finite, st.floats(0.01, 0.5))
def test_is_clipped_is_where_the_policy_loss_has_no_gradient(
    log_rho: float, a: float, clip: float
) -> None:
    if abs(a) < 1e-3 or abs(abs(math.exp(log_rho) - 1) - clip) < 1e-6:
        return
    leaf = vector(log_rho).requires_grad_()
    slope = gradient(clipped_policy_loss(leaf, vector(a), clip_range=clip), leaf)
    clipped = is_clipped(vector(log_rho), vector(a), clip_range=clip)
    assert bool(clipped) == (float(slope) == 0)


def test_law_13_nothing_is_clipped_before_the_first_update() -> None:
    assert not is_clipped(torch.zeros(5), normals(5).float(), clip_range=1e-6).any()


@pytest.mark.parametrize("name", ["flow_sde", "dance", "cps", "precise"])
@pytest.mark.parametrize("normalise", [False, True])
def test_law_18_and_19_the_mean_moves_to_what_was_good_and_stays_without_advantage(
    name: str, normalise: bool
) -> None:
    x, v = normals(3, 5), normals(3, 5, seed=1)
    advantage = vector(1.0, -1.0, 0.0)
    levels = {"sigma": vector(0.8, 0.8, 0.8), "sigma_next": vector(0.7, 0.7, 0.7)}
    old = KERNELS[name](x, v, **levels, noise_level=0.4)
    following = old.advance(normals(3, 5, seed=2))
    leaf = v.clone().requires_grad_()
    shift = old.jacobian.unsqueeze(1) * (residual(v, leaf, v, 1.0) - v)
    ratio = log_ratio(old.injected_noise(following), shift, old.std, normalise=normalise)
    loss = clipped_policy_loss(ratio, advantage, clip_range=0.1)
    slope = gradient(loss, leaf)
    assert torch.equal(slope[2], torch.zeros(5).double())
    new = KERNELS[name](x, v - 0.01 * slope, **levels, noise_level=0.4)
    before = (following - old.mean).norm(dim=1)
    after = (following - new.mean).norm(dim=1)
    assert after[0] < before[0] and after[1] > before[1]


def test_advantages_and_weights_are_constants_and_weights_multiply() -> None:
    log_rho, advantage, weight = (
        normals(3, seed=i).mul(0.01).abs().requires_grad_() for i in range(3)
    )
    plain = clipped_policy_loss(log_rho, advantage, clip_range=0.5)
    weighted = clipped_policy_loss(log_rho, advantage, clip_range=0.5, weight=weight)
    torch.testing.assert_close(weighted, weight * plain)
    weighted.sum().backward()
    assert advantage.grad is None and weight.grad is None and log_rho.grad is not None


@pytest.mark.parametrize("clip_range", [0.0, -0.1, 1.0])
def test_a_clip_range_that_clips_all_or_nothing_is_refused(clip_range: float) -> None:
    with pytest.raises(ValueError, match=r"need clip_range in \(0, 1\)"):
        clipped_policy_loss(vector(0), vector(1), clip_range=clip_range)
    with pytest.raises(ValueError, match=r"need clip_range in \(0, 1\)"):
        is_clipped(vector(0), vector(1), clip_range=clip_range)


# Forward process


def test_optimality_maps_advantages_to_probabilities() -> None:
    found = optimality(vector(-9, -5, -1, 0, 1, 5, 9), 5.0)
    torch.testing.assert_close(found, vector(0, 0, 0.4, 0.5, 0.6, 1, 1))
    with pytest.raises(ValueError, match=r"need max_advantage > 0"):
        optimality(vector(1), 0.0)


@given(st.floats(0.1, 2.0), st.floats(-6, 6), st.integers(0, 20))
def test_the_forward_process_loss_is_the_published_one(beta: float, a: float, seed: int) -> None:
    v, old, u = (normals(1, 6, seed=seed + i) for i in range(3))
    r = min(max(a, -5), 5) / 10 + 0.5
    good, bad = (1 - beta) * old + beta * v, (1 + beta) * old - beta * v
    wanted = r * ((good - u) ** 2).mean() + (1 - r) * ((bad - u) ** 2).mean()
    loss = forward_process_loss(v, old, u, vector(a), beta=beta)
    torch.testing.assert_close(loss, wanted.reshape(1))


def test_the_first_forward_process_gradient_is_the_centred_optimality_times_the_error() -> None:
    old, u, advantage, beta = normals(3, 4), normals(3, 4, seed=1), vector(2, 0, -2), 0.7
    leaf = old.clone().requires_grad_()
    slope = gradient(forward_process_loss(leaf, old, u, advantage, beta=beta), leaf)
    centred = (2 * optimality(advantage, 5.0) - 1).unsqueeze(1)
    torch.testing.assert_close(slope, 2 * beta * centred * (old - u) / 4)


@given(st.floats(0.05, 1.0), st.floats(-6, 6))
def test_the_clean_form_regresses_the_clean_prediction_over_its_own_error(
    sigma: float, a: float
) -> None:
    x, v, old, u = (normals(1, 6, seed=i) for i in range(4))
    level, beta = vector(sigma), 0.5

    def clean(velocity: Tensor) -> Tensor:
        return path_from_velocity(x, velocity, level).clean

    def term(implied: Tensor) -> Tensor:
        error = clean(implied) - clean(u)
        return (error**2).mean() / error.abs().mean()

    r = optimality(vector(a), 5.0)
    wanted = r * term((1 - beta) * old + beta * v) + (1 - r) * term((1 + beta) * old - beta * v)
    loss = forward_process_loss(v, old, u, vector(a), beta=beta, clean_sigma=level)
    torch.testing.assert_close(loss, wanted)


def test_the_clean_forms_denominator_is_a_constant_and_never_zero() -> None:
    old, u = normals(1, 4), normals(1, 4, seed=1)
    leaf = old.clone().requires_grad_()
    loss = forward_process_loss(leaf, old, u, vector(5.0), beta=1.0, clean_sigma=vector(0.5))
    error = 0.5 * (old - u)
    torch.testing.assert_close(gradient(loss, leaf), 2 * 0.5 * error / 4 / error.abs().mean())
    same = forward_process_loss(u, u, u, vector(1.0), beta=1.0, clean_sigma=vector(0.5))
    assert torch.equal(same, vector(0))


def test_only_the_velocity_is_trained_by_the_forward_process_loss() -> None:
    v, old, u = (normals(2, 3, seed=i).requires_grad_() for i in range(3))
    advantage = vector(1, -1).requires_grad_()
    weight = vector(0.5, 2)
    plain = forward_process_loss(v, old, u, advantage, beta=1.0)
    weighted = forward_process_loss(v, old, u, advantage, beta=1.0, weight=weight)
    torch.testing.assert_close(weighted, weight * plain)
    weighted.sum().backward()
    assert v.grad is not None
    assert old.grad is None and u.grad is None and advantage.grad is None
    with pytest.raises(ValueError, match=r"need beta > 0"):
        forward_process_loss(v, old, u, advantage, beta=0.0)


# Velocity matching and its use as an anchor


def test_law_18_the_anchor_keeps_its_gradient_without_advantage() -> None:
    v, reference = normals(2, 3).requires_grad_(), normals(2, 3, seed=1).requires_grad_()
    loss = velocity_kl(v, reference, weight=vector(1, 0.5))
    loss.sum().backward()
    wanted = 2 * (v - reference).detach() / 3 * vector(1, 0.5).unsqueeze(1)
    torch.testing.assert_close(v.grad, wanted)
    assert reference.grad is None


def test_the_anchor_is_proportional_to_the_gaussian_kl() -> None:
    x, v, w = normals(1, 6), normals(1, 6, seed=1), normals(1, 6, seed=2)
    steps = [
        KERNELS["precise"](x, u, sigma=vector(0.8), sigma_next=vector(0.7), noise_level=1.0)
        for u in (v, w)
    ]
    a, b = (torch.distributions.Normal(step.mean, step.std) for step in steps)
    kl = torch.distributions.kl_divergence(a, b).mean(dim=1)
    weight = steps[0].jacobian ** 2 / (2 * steps[0].std ** 2)
    torch.testing.assert_close(velocity_kl(v, w, weight=weight), kl)


def test_law_25_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    v = normals(2, 3, 4).requires_grad_()
    loss = velocity_matching(v, v.detach())
    assert torch.equal(loss, vector(0, 0))
    assert torch.equal(gradient(loss, v), torch.zeros(2, 3, 4).double())


@given(st.floats(0, 8))
def test_law_26_the_loss_against_the_guided_teacher_is_the_guidance_gap(scale: float) -> None:
    conditional, unconditional = normals(2, 3, 4), normals(2, 3, 4, seed=1)
    loss = velocity_matching(conditional, compose(conditional, unconditional, scale))
    gap = ((conditional - unconditional) ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(loss, (scale - 1) ** 2 * gap)


def test_law_27_no_gradient_reaches_the_target() -> None:
    v, target = normals(2, 3).requires_grad_(), normals(2, 3, seed=1).requires_grad_()
    velocity_matching(v, target).sum().backward()
    assert target.grad is None and v.grad is not None


def test_law_30_step_weights_on_a_uniform_grid_are_proportional_to_no_weights() -> None:
    v, target = normals(4, 3), normals(4, 3, seed=1)
    h = -torch.linspace(1, 0, 5).diff().double()
    plain = velocity_matching(v, target)
    torch.testing.assert_close(velocity_matching(v, target, weight=h), plain / 4)


def test_law_31_half_the_squared_step_makes_it_the_distance_of_the_ode_means() -> None:
    x, v, target = normals(2, 6), normals(2, 6, seed=1), normals(2, 6, seed=2)
    sigma, sigma_next = vector(0.9, 0.4), vector(0.7, 0.35)
    means = [
        KERNELS["ode"](x, u, sigma=sigma, sigma_next=sigma_next, noise_level=0.0).mean
        for u in (v, target)
    ]
    loss = velocity_matching(v, target, weight=(sigma - sigma_next) ** 2 / 2)
    torch.testing.assert_close(loss, ((means[0] - means[1]) ** 2).mean(dim=1) / 2)


def test_losses_run_in_float32_for_bfloat16_networks() -> None:
    v = torch.full((1, 3), 1.0, dtype=torch.bfloat16)
    loss = velocity_matching(v, torch.full((1, 3), 1.001))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1e-6, rel=1e-2)
