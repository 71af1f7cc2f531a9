"""Laws of guidance: composition, the policy a mode scores, and how much guidance is absorbed."""

import inspect
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from burnish.flow import KERNELS, log_ratio
from burnish.guidance import (
    UNCONDITIONAL_USE,
    GuidanceMode,
    VelocityPair,
    absorption,
    compose,
    residual,
    unconditional_use,
    velocity_pair,
)

MODES: tuple[GuidanceMode, ...] = get_args(GuidanceMode)
SCALE = 4.0


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Composition


@given(st.floats(0, 10), st.integers(0, 50))
def test_composition_is_the_published_formula(scale: float, seed: int) -> None:
    conditional, unconditional = normals(2, 3, 4, seed=seed), normals(2, 3, 4, seed=seed + 1)
    torch.testing.assert_close(
        compose(conditional, unconditional, scale),
        unconditional + scale * (conditional - unconditional),
    )


@pytest.mark.parametrize("rescale", [False, True])
def test_scale_one_is_the_conditional_velocity_bit_by_bit(rescale: bool) -> None:
    conditional, unconditional = normals(2, 3, 4).float(), normals(2, 3, 4, seed=1).float()
    assert torch.equal(compose(conditional, unconditional, 1.0, rescale), conditional)


@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_rescale_keeps_the_direction_and_takes_the_conditional_length(channel_dim: int) -> None:
    conditional, unconditional = normals(2, 3, 4), normals(2, 3, 4, seed=1)
    plain = compose(conditional, unconditional, SCALE)
    rescaled = compose(conditional, unconditional, SCALE, True, channel_dim=channel_dim)
    torch.testing.assert_close(rescaled.norm(dim=channel_dim), conditional.norm(dim=channel_dim))
    cosine = torch.cosine_similarity(plain, rescaled, dim=channel_dim)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_rescale_of_a_zero_velocity_is_finite() -> None:
    zero = torch.zeros(1, 2, 3)
    assert torch.equal(compose(zero, zero, SCALE, rescale=True), zero)


def test_composition_runs_in_float32_for_bfloat16_branches() -> None:
    conditional = torch.full((1, 2), 1.0, dtype=torch.bfloat16)
    unconditional = torch.full((1, 2), 1.0 + 2**-7, dtype=torch.bfloat16)
    guided = compose(conditional, unconditional, 1.5)
    assert guided.dtype == torch.float32
    assert float(guided[0, 0]) == 1 - 2**-8


# The modes, on a linear model: conditional = a * x + b, unconditional = a * x + null


class Model:
    """Two branches that share a weight; `null` is used by the unconditional input alone."""

    def __init__(self) -> None:
        self.x = normals(6, 5, seed=3)
        self.shared = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        self.prompt = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        self.null = torch.tensor(-0.2, dtype=torch.float64, requires_grad=True)
        self.unconditional_calls = 0

    def conditional(self) -> Tensor:
        return self.shared * self.x + self.prompt

    def unconditional(self) -> Tensor:
        self.unconditional_calls += 1
        return self.shared * self.x * 0.6 + self.null

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, [self.shared, self.prompt, self.null], allow_unused=True)
        return [torch.zeros((), dtype=torch.float64) if g is None else g for g in found]


def train_pair(model: Model, mode: GuidanceMode, **changes: Any) -> VelocityPair:
    """What a trainer does in one micro-batch, right after the rollout."""
    with torch.no_grad():
        conditional_old, unconditional_old = model.conditional(), model.unconditional()
    model.unconditional_calls = 0
    guided_old = compose(conditional_old, unconditional_old, SCALE)
    use = unconditional_use(mode)
    unconditional = None
    if use.is_needed:
        unconditional = model.unconditional() if use.has_gradient else unconditional_old
    return velocity_pair(
        mode,
        conditional=model.conditional(),
        conditional_old=conditional_old,
        guided_old=guided_old,
        unconditional=unconditional,
        scale=SCALE,
        **changes,
    )


def first_loss(model: Model, mode: GuidanceMode, **changes: Any) -> Tensor:
    """Policy-gradient loss at the first update, with fixed noise and advantages."""
    pair = train_pair(model, mode, **changes)
    step = KERNELS["precise"].coefficients(torch.full((6,), 0.8), torch.full((6,), 0.7), 1.0)
    advantage = normals(6, seed=7)
    shift = step.jacobian.unsqueeze(1) * (pair.new - pair.old)
    return -(advantage * log_ratio(normals(6, 5, seed=8), shift, step.std).exp()).mean()


@pytest.mark.parametrize("mode", MODES)
def test_law_12_the_first_ratio_is_one_in_every_mode(mode: GuidanceMode) -> None:
    pair = train_pair(Model(), mode)
    assert torch.equal(pair.new, pair.old)
    assert not pair.old.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_law_14_only_the_guided_mode_trains_the_unconditional_branch(mode: GuidanceMode) -> None:
    model = Model()
    shared, prompt, null = model.gradients(first_loss(model, mode))
    assert shared != 0 and prompt != 0
    assert (null != 0) == (mode == "guided")


@pytest.mark.parametrize("mode", MODES)
def test_law_15_only_the_guided_mode_runs_the_unconditional_branch(mode: GuidanceMode) -> None:
    model = Model()
    train_pair(model, mode)
    assert model.unconditional_calls == (mode == "guided")


def test_law_16_residual_with_gain_w_is_the_detached_mode_and_with_gain_one_a_wth_of_it() -> None:
    model = Model()
    detached = model.gradients(first_loss(model, "detached"))
    same = model.gradients(first_loss(model, "residual", gain=SCALE))
    part = model.gradients(first_loss(model, "residual", gain=1.0))
    for c, w, one in zip(detached, same, part, strict=True):
        torch.testing.assert_close(w, c)
        torch.testing.assert_close(one * SCALE, c)


def test_law_16_does_not_hold_when_the_composition_is_rescaled() -> None:
    """Guards the test above: rescaling makes the composition nonlinear in the conditional."""
    model = Model()
    detached = model.gradients(first_loss(model, "detached", rescale=True))
    same = model.gradients(first_loss(model, "residual", gain=SCALE))
    assert not torch.allclose(torch.stack(detached), torch.stack(same), rtol=0.05)


def test_detached_and_guided_pairs_follow_the_rollouts_composition() -> None:
    conditional, old, other = normals(2, 3), normals(2, 3, seed=1), normals(2, 3, seed=2)
    for mode in ("detached", "guided"):
        pair = velocity_pair(
            mode,
            conditional=conditional,
            conditional_old=old,
            guided_old=compose(old, other, SCALE, True),
            unconditional=other,
            scale=SCALE,
            rescale=True,
        )
        torch.testing.assert_close(pair.new, compose(conditional, other, SCALE, True))
        torch.testing.assert_close(pair.old, compose(old, other, SCALE, True))


@pytest.mark.parametrize("rescale", [False, True])
def test_law_12_a_constant_unconditional_velocity_gives_a_ratio_of_exactly_one(
    rescale: bool,
) -> None:
    conditional = normals(2, 300).float()
    constant = normals(2, 300, seed=1).float().requires_grad_()
    pair = velocity_pair(
        "detached",
        conditional=conditional.clone().requires_grad_(),
        conditional_old=conditional,
        guided_old=compose(conditional, constant, SCALE, rescale),
        unconditional=constant,
        scale=SCALE,
        rescale=rescale,
    )
    assert torch.equal(pair.new, pair.old)
    pair.new.sum().backward()
    assert constant.grad is None


def test_the_residual_starts_from_the_guided_velocity_and_moves_with_the_conditional() -> None:
    guided, conditional, old = normals(2, 3), normals(2, 3, seed=1), normals(2, 3, seed=2)
    for leaf in (guided, conditional, old):
        leaf.requires_grad_()
    surrogate = residual(guided, conditional, old, 2.5)
    torch.testing.assert_close(surrogate, guided + 2.5 * (conditional - old))
    surrogate.sum().backward()
    assert guided.grad is None and old.grad is None
    assert conditional.grad is not None
    assert torch.equal(conditional.grad, torch.full_like(conditional, 2.5))


@pytest.mark.parametrize("mode", ["detached", "guided"])
def test_a_mode_that_needs_the_unconditional_velocity_says_so(mode: GuidanceMode) -> None:
    v = normals(1, 2)
    with pytest.raises(ValueError, match=r"need an unconditional velocity for .*; take it from"):
        velocity_pair(mode, conditional=v, conditional_old=v, guided_old=v, scale=SCALE)


def test_the_modes_are_the_table_and_an_unknown_one_is_refused() -> None:
    assert tuple(UNCONDITIONAL_USE) == MODES
    without_type_check = inspect.unwrap(unconditional_use)
    with pytest.raises(ValueError, match=r"got 'both'; choose one of residual, detached"):
        without_type_check("both")  # pyright: ignore[reportArgumentType]


# One step, one dimension: which reading climbs the reward of the guided sampler?

GROUPS, SAMPLES = 25_000, 16
TARGET = 0.7
SIGMA, SIGMA_NEXT, NOISE_LEVEL = 0.5, 0.42, 0.86


def toy_gradients(shares_state: bool) -> tuple[dict[str, float], float]:
    """Ascent direction on theta by mode, and the true one, for reward -(x' - TARGET)^2.

    conditional = 1.3 x + theta, unconditional = 0.9 x, x ~ N(0, 1), theta = 0.
    """
    count = GROUPS * SAMPLES
    x = normals(GROUPS, 1 if shares_state else SAMPLES).expand(GROUPS, SAMPLES).reshape(count, 1)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    conditional, unconditional = 1.3 * x + theta, 0.9 * x
    guided = compose(conditional.detach(), unconditional, SCALE)
    sigma, sigma_next = x.new_full((count,), SIGMA), x.new_full((count,), SIGMA_NEXT)

    def mean_and_std(velocity: Tensor) -> Any:
        return KERNELS["dance"](
            x, velocity, sigma=sigma, sigma_next=sigma_next, noise_level=NOISE_LEVEL
        )

    step = mean_and_std(guided)
    following = step.advance(normals(count, 1, seed=1))
    reward = -((following - TARGET) ** 2).reshape(GROUPS, SAMPLES)
    centred = (reward - reward.mean(dim=1, keepdim=True)) * SAMPLES / (SAMPLES - 1)
    advantage = centred.reshape(count)
    directions: dict[str, float] = {}
    for mode in ("detached", "residual", "conditional"):
        pair = velocity_pair(
            mode,
            conditional=conditional,
            conditional_old=conditional.detach(),
            guided_old=guided,
            unconditional=unconditional,
            scale=SCALE,
        )
        noise = mean_and_std(pair.old).injected_noise(following)
        shift = step.jacobian.unsqueeze(1) * (pair.new - pair.old)
        objective = (advantage * log_ratio(noise, shift, step.std)).mean()
        directions[mode] = float(torch.autograd.grad(objective, theta, retain_graph=True)[0])
    # E[x] = E[noise] = 0, so dJ/dtheta = -2 E[x' - TARGET] * dx'/dtheta with E[x'] = 0.
    return directions, 2 * TARGET * SCALE * float(step.jacobian[0])


def test_law_17_a_shared_state_makes_all_readings_agree_up_to_the_scale() -> None:
    found, true = toy_gradients(shares_state=True)
    assert found["detached"] == pytest.approx(true, rel=0.03)
    assert SCALE * found["residual"] == pytest.approx(found["detached"], rel=1e-6)
    assert SCALE * found["conditional"] == pytest.approx(found["detached"], rel=1e-6)


def test_law_17_different_states_turn_the_conditional_reading_around() -> None:
    found, true = toy_gradients(shares_state=False)
    assert found["detached"] == pytest.approx(true, rel=0.03)
    assert SCALE * found["residual"] == pytest.approx(found["detached"], rel=1e-6)
    assert SCALE * found["conditional"] > 0.2 * abs(true) > 0 > true


# Absorption


@given(st.floats(0, 8), st.sampled_from([0.5, 2.0, 6.0]))
def test_a_folded_branch_has_cosine_one_and_projection_scale_minus_one(
    folded: float, scale: float
) -> None:
    """Whatever the scale that guidance was measured at."""
    conditional, unconditional = normals(3, 2, 4), normals(3, 2, 4, seed=1)
    guided = compose(conditional, unconditional, scale)
    found = absorption(compose(conditional, unconditional, folded), conditional, guided, scale)
    torch.testing.assert_close(
        found.projection, torch.full((3,), folded - 1).double(), atol=1e-9, rtol=1e-6
    )
    if abs(folded - 1) > 1e-3:
        sign = 1.0 if folded > 1 else -1.0
        torch.testing.assert_close(found.cosine, torch.full((3,), sign).double())


def test_a_branch_that_has_folded_in_rescaled_guidance_has_projection_scale_minus_one() -> None:
    conditional = normals(3, 2, 4)
    guided = compose(conditional, normals(3, 2, 4, seed=1), SCALE, True)
    found = absorption(guided, conditional, guided, SCALE)
    torch.testing.assert_close(found.projection, torch.full((3,), SCALE - 1).double())
    torch.testing.assert_close(found.cosine, torch.ones(3).double())


def test_a_move_across_guidance_absorbs_nothing_and_no_move_is_not_nan() -> None:
    conditional, guided = torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    across = absorption(torch.tensor([[1.0, 5.0]]), conditional, guided, SCALE)
    still = absorption(conditional, conditional, guided, SCALE)
    for found in (across, still):
        assert float(found.cosine) == 0 and float(found.projection) == 0
    with pytest.raises(ValueError, match="need a guidance scale other than 1"):
        absorption(conditional, conditional, conditional, 1.0)
