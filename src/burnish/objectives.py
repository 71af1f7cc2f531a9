"""Losses on velocities and log-ratios; no model, no settings.

Every loss is per sample, already a mean over the latent dimensions and already times its weight.
The caller adds the samples and divides by the number of *real* samples of the optimizer step: to
divide by the sum of the weights would cancel them in a micro-batch of equal steps, and a plain mean
would count padding, which has weight 0.

Gradient reaches the argument called `velocity` (or `log_ratio`) only: advantages, targets, old and
reference velocities are constants here, whatever they came with.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from burnish.latents import PerSample, Velocity, latent_mean, over, widened

SMALLEST_CLEAN_ERROR = 1e-5
"""Floor of the self-normalising denominator, in units of the latents."""


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses if weight is None else weight.detach() * losses


def clipped_policy_loss(
    log_ratio: PerSample,
    advantage: PerSample,
    *,
    clip_range: float,
    weight: PerSample | None = None,
) -> PerSample:
    """Pessimistic policy-gradient loss, per sample.

        rho = exp(log_ratio)
        loss = weight * max(-A * rho, -A * clip(rho, 1 - clip_range, 1 + clip_range))

    At rho = 1 its gradient is that of REINFORCE, -A * d log_ratio; once rho has moved out of the
    range in the direction that A asks for, the gradient is 0.

    Args:
        log_ratio: log of new over old policy, with gradient.
        advantage: A; 0 gives no gradient.
        clip_range: largest |rho - 1| that is rewarded, in (0, 1). Ratios of latent means move
            little: 1e-4 without RatioNorm, 2e-6 to 1e-5 with it.
        weight: factor of each sample, e.g. 1 / |jacobian| with RatioNorm; 1 if not given.

    Raises:
        ValueError: the clip range is outside (0, 1).

    Reference: PPO, arXiv:1707.06347, equation 7; for flows, Flow-GRPO, arXiv:2505.05470.

    >>> rising, falling = torch.tensor([0.5]), torch.tensor([-0.5])
    >>> clipped_policy_loss(rising, torch.ones(1), clip_range=0.1)
    tensor([-1.1000])
    >>> clipped_policy_loss(falling, torch.ones(1), clip_range=0.1)
    tensor([-0.6065])
    """
    _check_clip_range(clip_range)
    rho, advantage = widened(log_ratio).exp(), advantage.detach()
    losses = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range))
    return _weighted(losses, weight)


def is_clipped(
    log_ratio: PerSample, advantage: PerSample, *, clip_range: float
) -> Bool[Tensor, " batch"]:
    """Where the clip decides the policy loss, so that a sample has no gradient.

        A > 0 and rho > 1 + clip_range,   or   A < 0 and rho < 1 - clip_range

    Args:
        log_ratio: log of new over old policy.
        advantage: A.
        clip_range: as in `clipped_policy_loss`.

    Raises:
        ValueError: the clip range is outside (0, 1).

    Reference: PPO, arXiv:1707.06347, equation 7.

    >>> is_clipped(torch.tensor([0.5, -0.5]), torch.ones(2), clip_range=0.1)
    tensor([ True, False])
    """
    _check_clip_range(clip_range)
    rho = widened(log_ratio).exp()
    rises = (advantage > 0) & (rho > 1 + clip_range)
    return rises | ((advantage < 0) & (rho < 1 - clip_range))


def _check_clip_range(clip_range: float) -> None:
    if not 0 < clip_range < 1:
        raise ValueError(f"need clip_range in (0, 1), got {clip_range}; 1e-4 is a usual start")


def optimality(advantage: PerSample, max_advantage: float) -> PerSample:
    """Probability r that a sample counts as a good one.

        r = clip(A, -max_advantage, max_advantage) / (2 * max_advantage) + 1/2

    Args:
        advantage: A; 0 gives 1/2.
        max_advantage: A at which r is 1, above 0.

    Raises:
        ValueError: `max_advantage` is not positive.

    Reference: DiffusionNFT, arXiv:2509.16117.

    >>> optimality(torch.tensor([-9.0, 0.0, 2.5]), max_advantage=5.0)
    tensor([0.0000, 0.5000, 0.7500])
    """
    if not max_advantage > 0:
        raise ValueError(f"need max_advantage > 0, got {max_advantage}; 5 is the usual choice")
    clipped = widened(advantage.detach()).clamp(-max_advantage, max_advantage)
    return clipped / (2 * max_advantage) + 0.5


def forward_process_loss(
    velocity: Velocity,
    velocity_old: Velocity,
    target: Velocity,
    advantage: PerSample,
    *,
    beta: float,
    max_advantage: float = 5.0,
    clean_sigma: PerSample | None = None,
    weight: PerSample | None = None,
) -> PerSample:
    """Negative-aware fine-tuning on noised samples of the policy, per sample.

        v+ = (1 - beta) * v_old + beta * v,   v- = (1 + beta) * v_old - beta * v
        loss = weight * (r * mean[(v+ - u)^2] + (1 - r) * mean[(v- - u)^2])

    At v = v_old the gradient is that of 2 * beta * (2 r - 1) * <v_old - u, v> / D. With
    `clean_sigma` each term becomes its clean-prediction error, divided by its own size:

        mean[e^2] / max(sg(mean|e|), 1e-5)   with   e = clean_sigma * (v+ - u), or v-

    Args:
        velocity: v at the noised sample, with gradient.
        velocity_old: v_old of the policy that drew the samples, at the same point.
        target: u = noise - clean of the noised sample.
        advantage: A of the sample, see `optimality`.
        beta: distance between the implied policies, above 0.
        max_advantage: A at which a sample is all good or all bad.
        clean_sigma: noise level of the point; given, switches the clean-prediction form on.
        weight: factor of each sample; 1 if not given.

    Raises:
        ValueError: `beta` or `max_advantage` is not positive.

    Reference: DiffusionNFT, arXiv:2509.16117, the policy loss and its adaptive weighting.

    >>> v, u = torch.ones(1, 2), torch.zeros(1, 2)
    >>> forward_process_loss(v, v, u, torch.zeros(1), beta=1.0)
    tensor([1.])
    """
    if not beta > 0:
        raise ValueError(f"need beta > 0, got {beta}; without it the loss has no gradient")
    velocity, old = widened(velocity), widened(velocity_old.detach())
    target, change = widened(target.detach()), beta * (velocity - old)

    def error(implied: Tensor) -> Tensor:
        if clean_sigma is None:
            return latent_mean((implied - target) ** 2)
        clean = over(clean_sigma, implied) * (implied - target)
        return latent_mean(clean**2) / latent_mean(clean.detach().abs()).clamp_min(
            SMALLEST_CLEAN_ERROR
        )

    good = optimality(advantage, max_advantage)
    return _weighted(good * error(old + change) + (1 - good) * error(old - change), weight)


def velocity_kl(
    velocity: Velocity, reference: Velocity, *, weight: PerSample | None = None
) -> PerSample:
    """Anchor to a reference in velocity space, per sample: weight * mean[(v - v_ref)^2].

    Proportional to the KL of two transitions of equal std, with a factor that does not depend on
    the sampler: KL per dimension = jacobian^2 / (2 std^2) * mean[(v - v_ref)^2].

    Args:
        velocity: v of the policy, with gradient.
        reference: v_ref at the same latents.
        weight: factor of each sample; 1 if not given.

    Reference: arXiv:2606.27608, section 2.2 (the velocity KL beside DiffusionNFT).

    >>> velocity_kl(torch.full((1, 2), 3.0), torch.ones(1, 2))
    tensor([4.])
    """
    return velocity_matching(velocity, reference, weight=weight)


def velocity_matching(
    velocity: Velocity, target: Velocity, *, weight: PerSample | None = None
) -> PerSample:
    """Regression of the student's velocity onto the teacher's, per state.

        loss = weight * mean[(v - target)^2]

    The states must be constants: without that the loss can be lowered by steering to states where
    the two agree. A weight of h^2 / 2 gives half the squared distance of the ODE means, and
    jacobian^2 / (2 std^2) the KL per dimension of a stochastic transition.

    Args:
        velocity: v of the student at a state of its own rollout, with gradient.
        target: velocity of the teacher there, as deployed (guided).
        weight: factor of each state; 1 if not given.

    Reference: arXiv:2606.27608, section 4.3 and appendix A (on-policy distillation).

    >>> velocity_matching(torch.full((1, 2), 3.0), torch.ones(1, 2), weight=torch.tensor([0.5]))
    tensor([2.])
    """
    difference = widened(velocity) - widened(target.detach())
    return _weighted(latent_mean(difference**2), weight)
