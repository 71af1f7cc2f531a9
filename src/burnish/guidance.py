"""Classifier-free guidance: one composition, the surrogate that trains through it, its absorption.

Rollout, teacher and evaluation all compose here, so that they cannot differ. Qwen-Image-2.0-RL
(arXiv:2606.27608) guides the rollout and calls its objective free of guidance, but leaves open
which policy its ratio scores. `velocity_pair` gives old and new velocity of that policy together: a
guided old one with a bare conditional new one, whose ratio is never 1, cannot be built.

Velocities are noise - clean; arithmetic runs in float32 or wider. sg(.) stops the gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from burnish.latents import Velocity, widened

GuidanceMode = Literal["residual", "detached", "conditional", "guided", "none"]
"""How the objective sees a guided rollout.

* `residual`: the guided sampler, moved by the conditional branch with a chosen gain.
* `detached`: the guided sampler, unconditional branch held constant.
* `conditional`: the conditional branch alone, although guided samples are scored; biased.
* `guided`: the guided sampler, both branches trained; the negative control, known to collapse.
* `none`: no guidance in the rollout either.
"""


@dataclass(frozen=True)
class UnconditionalUse:
    """What one guidance mode asks of the unconditional branch in training."""

    is_needed: bool
    """The training velocity depends on it; without gradient, the rollout's value serves."""
    has_gradient: bool
    """It must be run with gradient, at the weights that are trained."""


UNCONDITIONAL_USE: Mapping[GuidanceMode, UnconditionalUse] = MappingProxyType(
    {
        "residual": UnconditionalUse(is_needed=False, has_gradient=False),
        "detached": UnconditionalUse(is_needed=True, has_gradient=False),
        "conditional": UnconditionalUse(is_needed=False, has_gradient=False),
        "guided": UnconditionalUse(is_needed=True, has_gradient=True),
        "none": UnconditionalUse(is_needed=False, has_gradient=False),
    }
)


def unconditional_use(mode: GuidanceMode) -> UnconditionalUse:
    """Whether training in this mode needs the unconditional branch, and with gradient.

    Args:
        mode: the guidance mode of the objective.

    Raises:
        ValueError: the mode is unknown.

    Reference: arXiv:2606.27608, section 4.1 (hybrid CFG).

    >>> unconditional_use("detached")
    UnconditionalUse(is_needed=True, has_gradient=False)
    """
    if mode not in UNCONDITIONAL_USE:
        known = ", ".join(UNCONDITIONAL_USE)
        raise ValueError(f"need a guidance mode, got {mode!r}; choose one of {known}")
    return UNCONDITIONAL_USE[mode]


def compose(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float,
    rescale: bool = False,
    *,
    channel_dim: int = -1,
) -> Velocity:
    """Guided velocity, optionally rescaled to the length of the conditional one.

        guided = unconditional + scale * (conditional - unconditional)
        rescaled = guided * |conditional| / |guided|, the lengths taken over the channels

    A rescaled velocity has lost its length, so the unconditional one cannot be recovered from it;
    whoever needs that one keeps it. Written from the conditional end, so that scale 1 returns
    `conditional` bit by bit. Gradient reaches both branches; the callers that must not have it stop
    it.

    Args:
        conditional: velocity given the prompt (and the source image, when editing).
        unconditional: velocity given the empty or negative prompt (and the same source image).
        scale: guidance scale; 1 is no guidance.
        rescale: apply the norm rescale of Qwen-Image's true CFG.
        channel_dim: axis of the channels; the last for packed latents, 1 for image-shaped ones.

    Reference: classifier-free guidance, arXiv:2207.12598; the rescale is Qwen-Image's,
    arXiv:2508.02324, in diffusers' `QwenImagePipeline`.

    >>> compose(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 2.0)
    tensor([[6., 8.]])
    >>> compose(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 2.0, rescale=True)
    tensor([[3., 4.]])
    """
    conditional, unconditional = widened(conditional), widened(unconditional)
    guided = conditional + (scale - 1) * (conditional - unconditional)
    if not rescale:
        return guided
    wanted = conditional.norm(dim=channel_dim, keepdim=True)
    length = guided.norm(dim=channel_dim, keepdim=True)
    return guided * (wanted / length.clamp_min(torch.finfo(length.dtype).tiny))


def residual(
    guided: Velocity, conditional: Velocity, conditional_old: Velocity, gain: float
) -> Velocity:
    """Surrogate of the guided sampler that only the conditional branch moves.

        surrogate = sg(guided) + gain * (conditional - sg(conditional_old))

    Equal to `guided` bit by bit while conditional == conditional_old, so the first ratio is
    exactly 1. gain = 1 is exact if both branches move together, gain = scale if the unconditional
    one stands still; then the gradient is that of the `detached` mode without rescale.

    Args:
        guided: velocity that the rollout stepped with.
        conditional: conditional velocity at the trained weights, with gradient.
        conditional_old: conditional velocity at the rollout's weights.
        gain: factor on the change of the conditional velocity.

    Reference: an own construction for the hybrid CFG of arXiv:2606.27608, section 4.1.

    >>> one = torch.ones(1, 2)
    >>> residual(4 * one, conditional=2 * one, conditional_old=one, gain=1.0)
    tensor([[5., 5.]])
    """
    change = widened(conditional) - widened(conditional_old.detach())
    return widened(guided.detach()) + gain * change


@dataclass(frozen=True)
class VelocityPair:
    """Velocities of the scored policy; their kernel means differ by jacobian * (new - old)."""

    new: Velocity
    """At the trained weights, with gradient."""
    old: Velocity
    """At the rollout's weights, without gradient; the noise is measured around its mean."""


def velocity_pair(
    mode: GuidanceMode,
    *,
    conditional: Velocity,
    conditional_old: Velocity,
    guided_old: Velocity,
    unconditional: Velocity | None = None,
    scale: float,
    gain: float = 1.0,
    rescale: bool = False,
    channel_dim: int = -1,
) -> VelocityPair:
    """New and old velocity of the policy that a guidance mode scores.

        residual     new = guided_old + gain * (conditional - conditional_old)   old = guided_old
        detached     new = compose(conditional, sg(unconditional))   old = the same, conditional_old
        conditional  new = conditional                               old = conditional_old
        guided       new = compose(conditional, unconditional)       old = guided_old
        none         new = conditional                               old = conditional_old

    Args:
        mode: guidance mode of the objective.
        conditional: at the trained weights, with gradient.
        conditional_old: at the rollout's weights.
        guided_old: what the rollout stepped with.
        unconditional: for `detached` the rollout's value; for `guided` at the trained weights.
        scale, rescale, channel_dim: the rollout's composition, as in `compose`.
        gain: for `residual`.

    Raises:
        ValueError: the mode is unknown, or needs an unconditional velocity and got none.

    Reference: hybrid CFG, arXiv:2606.27608, section 4.1, which leaves the choice open.

    >>> v = torch.ones(1, 1)
    >>> pair = velocity_pair(
    ...     "residual", conditional=v, conditional_old=v, guided_old=3 * v, scale=4.0
    ... )
    >>> pair.new, pair.old
    (tensor([[3.]]), tensor([[3.]]))
    """
    use = unconditional_use(mode)
    conditional_old, guided_old = (widened(v.detach()) for v in (conditional_old, guided_old))
    if mode == "residual":
        return VelocityPair(residual(guided_old, conditional, conditional_old, gain), guided_old)
    if not use.is_needed:
        return VelocityPair(widened(conditional), conditional_old)
    if unconditional is None:
        source = "the trained weights" if use.has_gradient else "the rollout"
        raise ValueError(
            f"need an unconditional velocity for {mode!r}, got none; take it from {source}"
        )

    def composed(branch: Tensor, other: Tensor) -> Tensor:
        return compose(branch, other, scale, rescale, channel_dim=channel_dim)

    if use.has_gradient:
        return VelocityPair(composed(conditional, unconditional), guided_old)
    constant = unconditional.detach()
    return VelocityPair(composed(conditional, constant), composed(conditional_old, constant))


@dataclass(frozen=True)
class Absorption:
    """How far the conditional branch has moved along the reference's guidance direction."""

    cosine: Float[Tensor, " batch"]
    """Direction of the move, in [-1, 1]; 0 if nothing moved."""
    projection: Float[Tensor, " batch"]
    """Length of the move along guidance, in units of guidance: p raises the scale seen to 1 + p."""


def absorption(
    conditional: Velocity,
    conditional_reference: Velocity,
    guided_reference: Velocity,
    scale: float,
) -> Absorption:
    """Guidance absorption: does training distil the guidance into the conditional branch?

        move = conditional - conditional_reference
        guidance = (guided_reference - conditional_reference) / (scale - 1)
        cosine = <move, guidance> / (|move| |guidance|)
        projection = <move, guidance> / |guidance|^2

    Without rescale, guidance is conditional - unconditional, and a branch that has folded in a
    scale w has cosine 1 and projection w - 1. However the reference composes, a branch that has
    folded in all of its guidance has cosine 1 and projection scale - 1.

    Args:
        conditional: conditional velocity of the trained model.
        conditional_reference: conditional velocity of the model before training, same latents.
        guided_reference: its guided velocity.
        scale: guidance scale of that, not 1.

    Raises:
        ValueError: the scale is 1, where there is no guidance to absorb.

    Reference: an own measure; absorption itself is reported in arXiv:2606.27377 (guidance folded
    by distillation multiplies with guidance at inference).

    >>> guidance = torch.tensor([[1.0, 0.0]])
    >>> absorption(4 * guidance, guidance, 2 * guidance, 2.0)
    Absorption(cosine=tensor([1.]), projection=tensor([3.]))
    """
    if scale == 1:
        raise ValueError("need a guidance scale other than 1, got 1; nothing can be absorbed")
    reference = widened(conditional_reference)
    move = (widened(conditional) - reference).flatten(1)
    guidance = ((widened(guided_reference) - reference) / (scale - 1)).flatten(1)
    tiny = torch.finfo(move.dtype).tiny
    along = (move * guidance).sum(dim=1)
    length = guidance.norm(dim=1)
    return Absorption(
        cosine=along / (move.norm(dim=1) * length).clamp_min(tiny),
        projection=along / (length**2).clamp_min(tiny),
    )
