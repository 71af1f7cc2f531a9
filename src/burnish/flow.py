"""The time shift, conversions and the transition kernels of flow matching.

At noise level `sigma` (1 is pure noise) latents x are (1 - sigma) * clean + sigma * noise, and
velocity = noise - clean; sampling walks sigma from 1 to 0. Sigmas are per sample, because shifts
differ inside a batch; left on the CPU, their checks wait for no device. Step maths runs in float32
(float64 stays float64), because bfloat16 loses small steps.

**Scale of the log-probability**: for every kernel it is the full Gaussian density, averaged over
the latent dimensions. Published CPS code drops 1 / (2 std^2) and the constants, which scales its
log-ratios by 2 std^2: clip ranges tuned there do not carry over. The mean, not the sum, over D
dimensions makes a ratio the D-th root of the true one; hence clip ranges of 1e-6 to 1e-3.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.latents import Latents, PerSample, latent_mean, over, widened

LARGEST_EULER_STD = 0.45
"""An Euler-type step of std s inflates the variance of near-unit noise by s^4 / 4: 1 % at 0.45."""


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0])


def shift_sigmas(sigmas: Float[Tensor, "*point"], mu: float) -> Float[Tensor, "*point"]:
    """Exponential time shift: spends more steps at high noise when mu > 0.

        shifted = exp(mu) / (exp(mu) + 1 / sigma - 1)

    Args:
        sigmas: noise levels in [0, 1].
        mu: log of the shift; 0 changes nothing, log(s) is the static shift by s.

    Reference: arXiv:2403.03206, section 5.3.2; diffusers' `FlowMatchEulerDiscreteScheduler`.

    >>> shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), mu=math.log(3.0))
    tensor([1.0000, 0.7500, 0.0000])
    """
    shifted = math.exp(mu) * sigmas  # no division by sigma, and 1 stays exactly 1
    return shifted / (shifted + (1 - sigmas))


def add_noise(clean: Latents, noise: Latents, sigma: PerSample) -> Latents:
    """Noisy latents on the straight path: (1 - sigma) * clean + sigma * noise.

    Args: `clean` latents, standard normal `noise` and its level `sigma` in [0, 1].

    Reference: rectified flow, arXiv:2209.03003.

    >>> add_noise(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
    tensor([[0.2500, 0.2500]])
    """
    clean = widened(clean)
    level = over(sigma, clean)
    return (1 - level) * clean + level * noise


@dataclass(frozen=True)
class Path:
    """The straight path of rectified flow (arXiv:2209.03003) through noisy latents."""

    clean: Latents
    noise: Latents
    velocity: Latents


def path_from_velocity(latents: Latents, velocity: Latents, sigma: PerSample) -> Path:
    """The path with this velocity: clean = x - sigma * v and noise = x + (1 - sigma) * v.

    Args: noisy `latents` x at `sigma` in [0, 1]; `velocity` v, the network's output.

    >>> path_from_velocity(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0.25])).clean
    tensor([[0.7500]])
    """
    latents, velocity = widened(latents), widened(velocity)
    level = over(sigma, latents)
    return Path(latents - level * velocity, latents + (1 - level) * velocity, velocity)


def path_from_clean(latents: Latents, clean: Latents, sigma: PerSample) -> Path:
    """The path that ends at these clean latents: v = (x - clean) / sigma.

    Args: noisy `latents` x at `sigma` in (0, 1]; `clean` latents or a prediction of them.

    Raises:
        ValueError: a noise level is 0, where the latents say nothing about the noise.

    >>> path_from_clean(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0.5])).velocity
    tensor([[2.]])
    """
    if bool((sigma <= 0).any()):
        at = _first(sigma <= 0)
        raise ValueError(f"need sigma > 0, got 0 in sample {at}; leave out the end of the schedule")
    latents, clean = widened(latents), widened(clean)
    velocity = (latents - clean) / over(sigma, latents)
    return Path(clean, clean + velocity, velocity)


def path_from_noise(latents: Latents, noise: Latents, sigma: PerSample) -> Path:
    """The path that starts at this noise: v = (noise - x) / (1 - sigma).

    Args: noisy `latents` x at `sigma` in [0, 1); `noise` in them or a prediction of it.

    Raises:
        ValueError: a noise level is 1, where the latents say nothing about the clean image.

    >>> path_from_noise(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0.5])).velocity
    tensor([[-2.]])
    """
    if bool((sigma >= 1).any()):
        at = _first(sigma >= 1)
        raise ValueError(f"need sigma < 1, got 1 in sample {at}; leave out the start, pure noise")
    latents, noise = widened(latents), widened(noise)
    velocity = (noise - latents) / (1 - over(sigma, latents))
    return Path(noise - velocity, noise, velocity)


@dataclass(frozen=True)
class Transition:
    """One sampler step as a Gaussian N(mean, std^2 I) over the next latents."""

    mean: Latents
    std: PerSample
    """The same in every latent dimension; 0 for a step of the ODE."""
    jacobian: PerSample
    """d mean / d velocity, negative: moving the velocity by dv moves the mean by jacobian * dv."""

    def advance(self, noise: Latents) -> Latents:
        """Next latents for this standard normal noise: mean + std * noise."""
        return self.mean + over(self.std, self.mean) * noise

    def injected_noise(self, next_latents: Latents) -> Latents:
        """Noise that leads to `next_latents` as they were stored: (next - mean) / std; std > 0."""
        _require_density(self.std)
        return (next_latents - self.mean) / over(self.std, self.mean)


class Coefficients(NamedTuple):
    """A step without its latents: mean = keep * x + jacobian * v, plus noise of `std`."""

    keep: PerSample
    jacobian: PerSample
    std: PerSample


@dataclass(frozen=True)
class Kernel:
    """The one signature of all transition kernels, around the formula of one of them.

    A formula gets checked float32 levels and a noise level above 0, all as in `__call__`.
    """

    formula: Callable[[Tensor, Tensor, float], Coefficients]

    def coefficients(
        self, sigma: PerSample, sigma_next: PerSample, noise_level: float
    ) -> Coefficients:
        """Checked coefficients of the step, in float32 or wider; see `__call__`."""
        wrong = ~((sigma_next >= 0) & (sigma_next < sigma) & (sigma <= 1))
        if bool(wrong.any()):
            at = _first(wrong)
            raise ValueError(
                f"need 0 <= sigma_next < sigma <= 1, got sigma={sigma[at]:.4g}, sigma_next="
                f"{sigma_next[at]:.4g} in sample {at}; pass neighbours of one falling schedule"
            )
        if not 0 <= noise_level < math.inf:
            raise ValueError(f"need a finite noise_level >= 0, got {noise_level}; 0 is the ODE")
        sigma, sigma_next = widened(sigma), widened(sigma_next)
        return (self.formula if noise_level > 0 else ode)(sigma, sigma_next, noise_level)

    def __call__(
        self,
        latents: Latents,
        velocity: Latents,
        *,
        sigma: PerSample,
        sigma_next: PerSample,
        noise_level: float,
    ) -> Transition:
        """One step from `sigma` to `sigma_next`.

        Args:
            latents, velocity: noisy latents x and their velocity v at `sigma`.
            sigma, sigma_next: noise levels, 0 <= sigma_next < sigma <= 1 in every sample.
            noise_level: noise in the kernel's own unit; 0 is the Euler step of the ODE for all.

        Raises:
            ValueError: levels out of range, or a start at sigma = 1 that the kernel refuses.
        """
        keep, jacobian, std = self.coefficients(sigma, sigma_next, noise_level)
        latents = widened(latents)
        mean = over(keep, latents) * latents + over(jacobian, latents) * velocity
        return Transition(mean, std.to(latents), jacobian.to(latents))


def ode(sigma: PerSample, sigma_next: PerSample, noise_level: float) -> Coefficients:
    """Euler step of the probability-flow ODE: mean = x - h v, with h = sigma - sigma_next; std = 0.

    `noise_level` is ignored, so that a window can swap kernels. Reference: arXiv:2209.03003.

    >>> ode(torch.tensor([0.5]), torch.tensor([0.25]), 0.0).jacobian
    tensor([-0.2500])
    """
    return Coefficients(torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma))


def _euler(sigma: Tensor, sigma_next: Tensor, g_squared: Tensor) -> Coefficients:
    """mean = x - h (v + g^2 / (2 sigma) (x + (1 - sigma) v)), std = g sqrt(h)."""
    h, pull = sigma - sigma_next, g_squared / (2 * sigma)
    std = (g_squared * h).sqrt()
    if bool(((std > LARGEST_EULER_STD) & (sigma > 0.9)).any()):
        warnings.warn(
            f"need std <= {LARGEST_EULER_STD} for an Euler-type kernel at sigma > 0.9, got "
            f"{std[sigma > 0.9].max():.3g}, which inflates the variance by up to std^4 / 4; lower "
            "noise_level, start the stochastic window later, or use the kernel 'precise'",
            RuntimeWarning,
            stacklevel=5,
        )
    return Coefficients(1 - h * pull, -h * (1 + pull * (1 - sigma)), std)


def flow_sde(sigma: PerSample, sigma_next: PerSample, noise_level: float) -> Coefficients:
    """Euler-Maruyama step of the Flow-GRPO SDE, whose noise is infinite at sigma = 1.

        g = noise_level * sqrt(sigma / (1 - sigma)),  h = sigma - sigma_next,  std = g * sqrt(h)
        mean = x - h * (v + g^2 / (2 sigma) * (x + (1 - sigma) * v))
        jacobian = -h * (1 + g^2 * (1 - sigma) / (2 sigma))

    At sigma = 1 the published code puts the second grid point into g, so that the first step has
    std `noise_level` however short it is; here such a step is refused. Warns if std > 0.45 at
    sigma > 0.9.

    Raises:
        ValueError: a sigma is 1.

    Reference: Flow-GRPO, arXiv:2505.05470, where `noise_level` is `a`.

    >>> flow_sde(torch.tensor([0.5]), torch.tensor([0.25]), 0.8).std
    tensor([0.4000])
    """
    if bool((sigma >= 1).any()):
        raise ValueError(
            f"need sigma < 1 for 'flow_sde', got 1 in sample {_first(sigma >= 1)}; take the first "
            "step, from pure noise, with the kernel 'ode', or use 'precise'"
        )
    return _euler(sigma, sigma_next, noise_level**2 * sigma / (1 - sigma))


def dance(sigma: PerSample, sigma_next: PerSample, noise_level: float) -> Coefficients:
    """Euler-Maruyama step with constant noise: the formulae of `flow_sde` with g = noise_level.

    Warns if std > 0.45 at sigma > 0.9.

    Reference: DanceGRPO, arXiv:2505.07818, where `noise_level` is `eta`.

    >>> dance(torch.tensor([0.5]), torch.tensor([0.25]), 0.8).std
    tensor([0.4000])
    """
    return _euler(sigma, sigma_next, torch.full_like(sigma, noise_level**2))


def _renoise(sigma: Tensor, sigma_next: Tensor, kept: Tensor, std: Tensor) -> Coefficients:
    """mean = (1 - sigma_next) * clean + kept * noise, with kept^2 + std^2 = sigma_next^2."""
    return Coefficients(1 - sigma_next + kept, -sigma * (1 - sigma_next) + (1 - sigma) * kept, std)


def cps(sigma: PerSample, sigma_next: PerSample, noise_level: float) -> Coefficients:
    """Coefficients-preserving step: part of the predicted noise is replaced by fresh noise.

        std = sigma_next * sin(pi * noise_level / 2),  kept = sqrt(sigma_next^2 - std^2)
        mean = (1 - sigma_next) * clean + kept * noise
        jacobian = -sigma * (1 - sigma_next) + (1 - sigma) * kept

    std does not shrink with the step, so a run of such steps does not converge to the data: keep it
    to short early windows. Its log-probability is the full Gaussian one, see the top of the file.

    Raises:
        ValueError: `noise_level` is above 1; it is a share of a quarter turn.

    Reference: Flow-CPS, arXiv:2509.05952.

    >>> cps(torch.tensor([0.5]), torch.tensor([0.25]), 1.0).std
    tensor([0.2500])
    """
    if noise_level > 1:
        raise ValueError(f"need noise_level <= 1 for 'cps', got {noise_level}; 1 renews all noise")
    angle = math.pi * noise_level / 2
    return _renoise(sigma, sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle))


def precise(sigma: PerSample, sigma_next: PerSample, noise_level: float) -> Coefficients:
    """The `cps` mean with noise that vanishes with the step, so that it does discretise an SDE.

        r = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
        std = sigma_next * sqrt(1 - r^(noise_level^2)),  mean and jacobian as in `cps`

    Finite everywhere: from sigma = 1 all the noise is fresh, to sigma_next = 0 there is none.

    Reference: Precise, arXiv:2605.23522, where `noise_level` is `eta`.

    >>> precise(torch.tensor([0.8]), torch.tensor([0.5]), 1.0).std
    tensor([0.4330])
    """
    r = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    kept = r ** (noise_level**2)
    std = sigma_next * (1 - kept).sqrt()
    return _renoise(sigma, sigma_next, sigma_next * kept.sqrt(), std)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {formula.__name__: Kernel(formula) for formula in (ode, flow_sde, dance, cps, precise)}
)
"""Transition kernels by the name a recipe uses."""


def _require_density(std: Tensor) -> None:
    if bool((std <= 0).any()):
        raise ValueError(
            f"need std > 0, got 0 in sample {_first(std <= 0)}: an ODE step, or one that ends at "
            "sigma = 0, has no density; leave it out of the objective"
        )


def log_prob(next_latents: Latents, transition: Transition) -> PerSample:
    """Gaussian log-probability of the next latents, averaged over the latent dimensions.

        l = -mean[(next - mean)^2] / (2 std^2) - log std - log(2 pi) / 2

    Args:
        next_latents: as stored, after any rounding to the storage dtype; detached here.
        transition: kernel output of the policy that is scored; the gradient goes there.

    Raises:
        ValueError: a std is 0.

    Reference: Flow-GRPO, arXiv:2505.05470.

    >>> log_prob(torch.zeros(1, 2), Transition(torch.zeros(1, 2), torch.ones(1), -torch.ones(1)))
    tensor([-0.9189])
    """
    std = transition.std
    _require_density(std)
    distance = latent_mean((widened(next_latents.detach()) - transition.mean) ** 2)
    return -distance / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2


def log_ratio(
    noise: Latents, shift: Latents, std: PerSample, *, normalise: bool = False
) -> PerSample:
    """Log-ratio of new to old policy, without subtracting two large log-probabilities.

        log rho = mean[noise * shift] / std - mean[shift^2] / (2 std^2)
        normalised: (log rho + mean[shift^2] / (2 std^2)) * std = mean[noise * shift]

    The negative term is the mean over the noise; RatioNorm removes it and the unit of std. Steps of
    different size then need a loss weight of 1 / |jacobian| (Precise) or 1 / h (Flow-GRPO).

    Args:
        noise: noise injected around the old mean (`Transition.injected_noise`); detached here.
        shift: new minus old mean, e.g. jacobian * (velocity - old velocity), with gradient.
        std: standard deviation of the step.
        normalise: apply RatioNorm.

    Raises:
        ValueError: a std is 0.

    Reference: RatioNorm of GRPO-Guard, arXiv:2510.22319.

    >>> log_ratio(torch.ones(1, 2), torch.full((1, 2), 0.5), torch.tensor([0.5]))
    tensor([0.5000])
    """
    _require_density(std)
    shift = widened(shift)
    std, drift = std.to(shift), latent_mean(widened(noise.detach()) * shift)
    return drift if normalise else drift / std - latent_mean(shift**2) / (2 * std**2)
