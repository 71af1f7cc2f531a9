"""Laws of the conversions, the transition kernels and the log-probability."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from burnish.flow import (
    KERNELS,
    Coefficients,
    Transition,
    add_noise,
    log_prob,
    log_ratio,
    path_from_clean,
    path_from_noise,
    path_from_velocity,
    shift_sigmas,
)

STOCHASTIC = [name for name in KERNELS if name != "ode"]
DATA_VARIANCE = 0.25

levels = st.tuples(st.floats(0.02, 0.98), st.floats(0.0, 0.95)).map(lambda p: (p[0], p[0] * p[1]))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_step(
    name: str, sigma: Tensor, sigma_next: Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Factor and std of a step under k(sigma) * x, the exact velocity of Gaussian data."""
    clean = 1 - sigma
    variance = clean**2 * DATA_VARIANCE + sigma**2
    velocity = ((sigma - clean * DATA_VARIANCE) / variance).unsqueeze(1)
    step = KERNELS[name](
        torch.ones_like(velocity),
        velocity,
        sigma=sigma,
        sigma_next=sigma_next,
        noise_level=noise_level,
    )
    return step.mean.squeeze(1), step.std


def variances(name: str, steps: int, noise_level: float, window: range | None = None) -> Tensor:
    """Variance after each step, without sampling; the last step, and flow_sde's first, by ODE."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    factor, std = gaussian_step("ode", sigmas[:-1], sigmas[1:], 0.0)
    chosen = list(range(name == "flow_sde", steps - 1) if window is None else window)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        noisy = gaussian_step(name, sigmas[:-1][chosen], sigmas[1:][chosen], noise_level)
    factor[chosen], std[chosen] = noisy
    variance, path = 1.0, []
    for a, s in zip(factor.tolist(), std.tolist(), strict=True):
        variance = a * a * variance + s * s
        path.append(variance)
    return vector(*path)


def final_error(name: str, steps: int, noise_level: float) -> float:
    return float(variances(name, steps, noise_level)[-1]) / DATA_VARIANCE - 1


# Schedule and conversions


@given(st.floats(-2, 2))
def test_shift_keeps_the_ends_and_the_order_and_is_undone_by_the_opposite_shift(mu: float) -> None:
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, mu)
    assert shifted[0] == 1 and shifted[-1] == 0
    assert (shifted.diff() < 0).all()
    torch.testing.assert_close(shift_sigmas(shifted, -mu), sigmas)
    inner = sigmas[1:-1]
    torch.testing.assert_close(shifted[1:-1], math.exp(mu) / (math.exp(mu) + 1 / inner - 1))


@given(st.floats(0.01, 0.99))
def test_conversions_round_trip(level: float) -> None:
    clean, noise, sigma = normals(2, 3, 4), normals(2, 3, 4, seed=1), vector(level, 0.5)
    x = add_noise(clean, noise, sigma)
    for path in (
        path_from_velocity(x, noise - clean, sigma),
        path_from_clean(x, clean, sigma),
        path_from_noise(x, noise, sigma),
    ):
        torch.testing.assert_close(path.clean, clean)
        torch.testing.assert_close(path.noise, noise)
        torch.testing.assert_close(path.velocity, noise - clean)


def test_sigma_one_is_pure_noise_and_zero_is_clean() -> None:
    clean, noise = normals(2, 3), normals(2, 3, seed=1)
    assert torch.equal(add_noise(clean, noise, vector(1, 1)), noise)
    assert torch.equal(add_noise(clean, noise, vector(0, 0)), clean)


def test_conversions_refuse_levels_that_lost_the_answer() -> None:
    x = normals(2, 3)
    with pytest.raises(ValueError, match=r"need sigma > 0, got 0 in sample 1"):
        path_from_clean(x, x, vector(0.5, 0.0))
    with pytest.raises(ValueError, match=r"need sigma < 1, got 1 in sample 1"):
        path_from_noise(x, x, vector(0.5, 1.0))


# Kernels


@pytest.mark.parametrize("name", KERNELS)
@given(pair=levels)
def test_law_01_without_noise_every_kernel_is_the_euler_ode(
    name: str, pair: tuple[float, float]
) -> None:
    x, v = normals(1, 5), normals(1, 5, seed=1)
    sigma, sigma_next = vector(pair[0]), vector(pair[1])
    step = KERNELS[name](x, v, sigma=sigma, sigma_next=sigma_next, noise_level=0.0)
    torch.testing.assert_close(step.mean, x + (sigma_next - sigma) * v, atol=1e-6, rtol=0)
    assert (step.std == 0).all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_law_01_the_limit_of_small_noise_is_the_euler_ode(name: str) -> None:
    x, v = normals(1, 5), normals(1, 5, seed=1)
    step = KERNELS[name](x, v, sigma=vector(0.6), sigma_next=vector(0.5), noise_level=1e-5)
    torch.testing.assert_close(step.mean, x - 0.1 * v, atol=1e-6, rtol=0)
    assert (step.std < 1e-4).all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_law_02_samples_have_the_mean_and_std_of_the_transition(name: str) -> None:
    x, v = torch.full((1, 40_000), 0.3), torch.full((1, 40_000), -0.8)
    step = KERNELS[name](
        x, v, sigma=torch.tensor([0.7]), sigma_next=torch.tensor([0.5]), noise_level=0.6
    )
    noise = normals(1, 40_000).float()
    drawn = step.advance(noise)
    assert float(drawn.mean()) == pytest.approx(float(step.mean.mean()), abs=0.01)
    assert float(drawn.std()) == pytest.approx(float(step.std), rel=0.02)
    torch.testing.assert_close(step.injected_noise(drawn), noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "noise_level"), [("ode", 0.0), ("dance", 0.7), ("precise", 1.5), ("precise", 0.7)]
)
def test_law_03_the_final_variance_converges_with_order_one(name: str, noise_level: float) -> None:
    errors = [final_error(name, steps, noise_level) for steps in (256, 512, 1024)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.9 < order < 1.1 for order in orders), orders


@pytest.mark.parametrize(
    ("name", "noise_level", "percent"),
    [("ode", 0.0, -13.8), ("dance", 0.7, -5.6), ("cps", 0.8, -44), ("precise", 1.5, -26)],
)
def test_law_03_the_toy_has_the_known_errors_at_twenty_steps(
    name: str, noise_level: float, percent: float
) -> None:
    assert 100 * final_error(name, 20, noise_level) == pytest.approx(percent, abs=0.6)


def test_law_03_flow_sde_ends_right_but_its_early_error_does_not_vanish() -> None:
    early = []
    for steps in (200, 800, 3200):
        path = variances("flow_sde", steps, 0.7)
        assert abs(float(path[-1]) / DATA_VARIANCE - 1) < 0.01
        sigma = 1 - torch.arange(1, steps + 1, dtype=torch.float64) / steps
        wanted = (1 - sigma) ** 2 * DATA_VARIANCE + sigma**2
        early.append(float((path / wanted - 1)[: steps // 10].max()))
    assert min(early) > 0.02, early
    assert early[-1] == pytest.approx(early[0], rel=0.2)


@pytest.mark.xfail(strict=True, reason="CPS noise does not shrink with the step: no SDE limit")
def test_law_03_cps_converges() -> None:
    assert abs(final_error("cps", 2000, 0.8)) < 0.05


@pytest.mark.parametrize(("name", "noise_level"), [("dance", 0.7), ("precise", 1.5)])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_law_04_a_short_window_leaves_the_final_variance(
    name: str, noise_level: float, start: int
) -> None:
    plain = variances("ode", 20, 0.0)[-1]
    windowed = variances(name, 20, noise_level, window=range(start, start + 2))[-1]
    assert windowed != plain
    assert abs(float(windowed / plain) - 1) < 0.01


@pytest.mark.parametrize(("name", "loud", "quiet"), [("dance", 1.5, 1.4), ("flow_sde", 0.5, 0.3)])
def test_law_04_a_large_euler_step_near_pure_noise_warns(
    name: str, loud: float, quiet: float
) -> None:
    x, sigma, sigma_next = normals(2, 3), vector(0.95, 0.5), vector(0.85, 0.45)
    with pytest.warns(RuntimeWarning, match=r"need std <= 0.45 .* at sigma > 0.9"):
        KERNELS[name](x, x, sigma=sigma, sigma_next=sigma_next, noise_level=loud)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KERNELS[name](x, x, sigma=sigma, sigma_next=sigma_next, noise_level=quiet)
        KERNELS[name](x, x, sigma=sigma - 0.1, sigma_next=sigma_next - 0.2, noise_level=loud)


def test_law_04_flow_sde_is_refused_at_pure_noise() -> None:
    x = normals(2, 3)
    with pytest.raises(ValueError, match=r"sample 1; take the first step.*'ode', or use 'precise'"):
        KERNELS["flow_sde"](
            x, x, sigma=vector(0.9, 1), sigma_next=vector(0.8, 0.9), noise_level=0.3
        )


@pytest.mark.parametrize("name", KERNELS)
@given(pair=levels, noise_level=st.floats(0.05, 0.95))
@pytest.mark.filterwarnings("ignore:need std")
def test_law_05_the_jacobian_is_the_slope_of_the_mean(
    name: str, pair: tuple[float, float], noise_level: float
) -> None:
    def mean(velocity: Tensor) -> Tensor:
        sigma, sigma_next = vector(pair[0]), vector(pair[1])
        return KERNELS[name](
            x, velocity, sigma=sigma, sigma_next=sigma_next, noise_level=noise_level
        ).mean

    x, v, nudge = normals(1, 4), normals(1, 4, seed=1), 1e-4
    slope = (mean(v + nudge) - mean(v - nudge)) / (2 * nudge)
    claimed = KERNELS[name](
        x, v, sigma=vector(pair[0]), sigma_next=vector(pair[1]), noise_level=noise_level
    ).jacobian
    torch.testing.assert_close(slope, claimed.expand(1, 4), atol=1e-8, rtol=1e-6)
    assert (claimed < 0).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.1, 0.0), (1.0, 0.0)])
@pytest.mark.filterwarnings("ignore:need std")
def test_law_06_no_nan_at_either_end(name: str, sigma: float, sigma_next: float) -> None:
    noise_level = 0.0 if name == "flow_sde" and sigma == 1 else 0.8
    x = normals(1, 4).float()
    step = KERNELS[name](
        x,
        x,
        sigma=torch.tensor([sigma]),
        sigma_next=torch.tensor([sigma_next]),
        noise_level=noise_level,
    )
    assert step.mean.isfinite().all()
    assert step.std.isfinite().all()
    assert step.jacobian.isfinite().all()


def test_law_06_the_ends_of_precise_are_all_fresh_noise_and_none() -> None:
    sigma, sigma_next = vector(1, 0.1), vector(0.9, 0)
    step = KERNELS["precise"].coefficients(sigma, sigma_next, 1.5)
    torch.testing.assert_close(step.std, vector(0.9, 0))
    torch.testing.assert_close(step.jacobian, vector(-0.1, -0.1))


def test_law_06_no_nan_for_neighbouring_floats() -> None:
    sigma = torch.linspace(0.01, 0.98, 5000)
    sigma_next = torch.nextafter(sigma, torch.zeros(1))
    step = KERNELS["precise"].coefficients(sigma, sigma_next, 1.5)
    assert all(part.isfinite().all() for part in step)


@given(pair=levels, noise_level=st.floats(0.05, 0.4))
@pytest.mark.filterwarnings("ignore:need std")
def test_law_07_dance_is_flow_sde_with_constant_g(
    pair: tuple[float, float], noise_level: float
) -> None:
    sigma, sigma_next = vector(pair[0]), vector(pair[1])
    as_flow = noise_level * math.sqrt((1 - pair[0]) / pair[0])
    dance = KERNELS["dance"].coefficients(sigma, sigma_next, noise_level)
    flow = KERNELS["flow_sde"].coefficients(sigma, sigma_next, as_flow)
    for a, b in zip(dance, flow, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["cps", "precise"])
@given(pair=levels, noise_level=st.floats(0.0, 1.0))
def test_renoising_kernels_keep_the_coefficients_of_the_path(
    name: str, pair: tuple[float, float], noise_level: float
) -> None:
    """If both predictions are exact, the next latents are on the path: signal and noise power."""
    clean, noise = torch.ones(1, 1).double(), torch.ones(1, 1).double()
    sigma, sigma_next = vector(pair[0]), vector(pair[1])
    x = add_noise(clean, noise, sigma)

    def mean_of(c: Tensor, n: Tensor) -> Transition:
        path_x = add_noise(c, n, sigma)
        return KERNELS[name](
            path_x, n - c, sigma=sigma, sigma_next=sigma_next, noise_level=noise_level
        )

    signal, kept = mean_of(clean, 0 * noise), mean_of(0 * clean, noise)
    torch.testing.assert_close(signal.mean, (1 - sigma_next) * torch.ones_like(x))
    power = kept.mean.squeeze(1) ** 2 + kept.std**2
    torch.testing.assert_close(power, sigma_next**2)


@pytest.mark.parametrize("name", STOCHASTIC)
@given(pair=levels, noise_level=st.floats(0.05, 0.6))
@pytest.mark.filterwarnings("ignore:need std")
def test_published_equations_of_mean_and_std(
    name: str, pair: tuple[float, float], noise_level: float
) -> None:
    t, u = pair
    x, v = normals(1, 3), normals(1, 3, seed=1)
    clean, noise, h = x - t * v, x + (1 - t) * v, t - u
    if name in ("flow_sde", "dance"):
        g = noise_level * (math.sqrt(t / (1 - t)) if name == "flow_sde" else 1)
        mean, std = x - h * (v + g**2 / (2 * t) * noise), g * math.sqrt(h)
    else:
        r = u * (1 - t) / (t * (1 - u))
        share = math.sin(math.pi * noise_level / 2)
        std = u * (share if name == "cps" else math.sqrt(1 - r ** (noise_level**2)))
        mean = (1 - u) * clean + math.sqrt(u**2 - std**2) * noise
    step = KERNELS[name](x, v, sigma=vector(t), sigma_next=vector(u), noise_level=noise_level)
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, vector(std))


@pytest.mark.parametrize("name", KERNELS)
def test_samples_of_a_batch_keep_their_own_sigmas(name: str) -> None:
    x, v = normals(3, 2, 4), normals(3, 2, 4, seed=1)
    sigma, sigma_next = vector(0.8, 0.5, 0.3), vector(0.7, 0.2, 0.1)
    together = KERNELS[name](x, v, sigma=sigma, sigma_next=sigma_next, noise_level=0.4)
    for i in range(3):
        one = slice(i, i + 1)
        alone = KERNELS[name](
            x[one], v[one], sigma=sigma[one], sigma_next=sigma_next[one], noise_level=0.4
        )
        assert torch.equal(together.mean[one], alone.mean)
        assert torch.equal(together.std[one], alone.std)
        assert torch.equal(together.jacobian[one], alone.jacobian)


def test_steps_run_in_float32_for_bfloat16_latents() -> None:
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    step = KERNELS["precise"](
        x, x, sigma=torch.tensor([0.501]), sigma_next=torch.tensor([0.5]), noise_level=0.5
    )
    assert step.mean.dtype == torch.float32
    assert 0 < float(1 - step.mean[0, 0]) < 0.003


@pytest.mark.parametrize(
    ("sigma", "sigma_next"), [(0.4, 0.5), (0.5, 0.5), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.1)]
)
def test_a_step_that_does_not_go_down_is_refused(sigma: float, sigma_next: float) -> None:
    x = normals(1, 2)
    with pytest.raises(ValueError, match=r"need 0 <= sigma_next < sigma <= 1, got sigma="):
        KERNELS["ode"](x, x, sigma=vector(sigma), sigma_next=vector(sigma_next), noise_level=0.0)


@pytest.mark.parametrize(("name", "level"), [("cps", 1.1), ("dance", -0.1), ("dance", math.inf)])
def test_a_noise_level_out_of_range_is_refused(name: str, level: float) -> None:
    with pytest.raises(ValueError, match=r"need .*noise_level"):
        KERNELS[name].coefficients(vector(0.5), vector(0.4), level)


# Log-probability and ratio


@pytest.mark.parametrize("name", STOCHASTIC)
def test_law_08_and_11_log_prob_is_torchs_normal_for_every_kernel_cps_included(name: str) -> None:
    x, v, following = normals(2, 3, 4), normals(2, 3, 4, seed=1), normals(2, 3, 4, seed=2)
    step = KERNELS[name](x, v, sigma=vector(0.8, 0.6), sigma_next=vector(0.7, 0.5), noise_level=0.5)
    wanted = Normal(step.mean, step.std.reshape(2, 1, 1)).log_prob(following).mean(dim=(1, 2))
    torch.testing.assert_close(log_prob(following, step), wanted)


def test_log_prob_has_gradient_in_the_policy_and_none_in_the_latents() -> None:
    x, v = normals(1, 4), normals(1, 4, seed=1).requires_grad_()
    following = normals(1, 4, seed=2).requires_grad_()
    step = KERNELS["precise"](x, v, sigma=vector(0.8), sigma_next=vector(0.7), noise_level=1.0)
    log_prob(following, step).sum().backward()
    assert following.grad is None
    assert v.grad is not None and (v.grad != 0).all()


@given(st.floats(0.05, 2.0), st.integers(0, 100))
def test_law_09_the_noise_form_equals_the_difference_of_log_probs(std: float, seed: int) -> None:
    mean, shift = normals(2, 5, seed=seed), normals(2, 5, seed=seed + 1) * 0.1
    old = Transition(mean, vector(std, 0.5), vector(-1, -1))
    new = Transition(mean + shift, old.std, old.jacobian)
    noise = normals(2, 5, seed=seed + 2)
    following = old.advance(noise)
    torch.testing.assert_close(
        log_ratio(noise, shift, old.std), log_prob(following, new) - log_prob(following, old)
    )


def test_law_10_the_log_ratio_has_a_negative_mean_and_ratio_norm_removes_it() -> None:
    draws, std = 20_000, 0.4
    shift = normals(1, 8, seed=1).expand(draws, 8) * 0.3
    noise, stds = normals(draws, 8), torch.full((draws,), std, dtype=torch.float64)
    bias = -float((shift[0] ** 2).mean()) / (2 * std**2)
    plain, normalised = (log_ratio(noise, shift, stds, normalise=flag) for flag in (False, True))
    error = float(plain.std()) / math.sqrt(draws)
    assert float(plain.mean()) == pytest.approx(bias, abs=4 * error)
    assert abs(bias) > 20 * error
    assert float(normalised.mean()) == pytest.approx(0, abs=4 * error * std)
    torch.testing.assert_close(normalised, (plain - bias) * std)


@pytest.mark.parametrize("normalise", [False, True])
def test_law_12_no_shift_is_a_ratio_of_exactly_one(normalise: bool) -> None:
    ratio = log_ratio(normals(3, 7), torch.zeros(3, 7), torch.full((3,), 0.3), normalise=normalise)
    assert torch.equal(ratio.exp(), torch.ones_like(ratio))


@pytest.mark.parametrize("normalise", [False, True])
def test_the_log_ratio_is_differentiable_in_the_shift_only(normalise: bool) -> None:
    noise, shift = normals(1, 4).requires_grad_(), torch.zeros(1, 4).double().requires_grad_()
    log_ratio(noise, shift, vector(0.5), normalise=normalise).sum().backward()
    assert noise.grad is None
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, noise.detach() / 4 / (1 if normalise else 0.5))


def test_a_step_without_noise_has_no_density() -> None:
    x = normals(1, 2)
    step = KERNELS["precise"](x, x, sigma=vector(0.1), sigma_next=vector(0), noise_level=1.5)
    for ask in (
        lambda: log_prob(x, step),
        lambda: step.injected_noise(x),
        lambda: log_ratio(x, x, step.std),
    ):
        with pytest.raises(ValueError, match=r"need std > 0, got 0 in sample 0.*leave it out"):
            ask()


def test_law_31_the_ode_form_is_half_the_squared_distance_of_the_means() -> None:
    x, v, w = normals(2, 6), normals(2, 6, seed=1), normals(2, 6, seed=2)
    sigma, sigma_next = vector(0.9, 0.4), vector(0.7, 0.35)
    means = [
        KERNELS["ode"](x, u, sigma=sigma, sigma_next=sigma_next, noise_level=0.0).mean
        for u in (v, w)
    ]
    h = (sigma - sigma_next).unsqueeze(1)
    torch.testing.assert_close(h**2 / 2 * (v - w) ** 2, (means[0] - means[1]) ** 2 / 2)


def test_coefficients_and_call_agree() -> None:
    x, v = normals(1, 3), normals(1, 3, seed=1)
    sigma, sigma_next = vector(0.7), vector(0.6)
    bare = KERNELS["cps"].coefficients(sigma, sigma_next, 0.5)
    assert isinstance(bare, Coefficients)
    step = KERNELS["cps"](x, v, sigma=sigma, sigma_next=sigma_next, noise_level=0.5)
    torch.testing.assert_close(step.mean, bare.keep * x + bare.jacobian * v)
    assert torch.equal(step.std, bare.std) and torch.equal(step.jacobian, bare.jacobian)
