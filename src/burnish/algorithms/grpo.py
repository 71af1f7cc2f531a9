"""GRPO on a stochastic window, with guidance in the rollout only.

Samples are drawn guided; the objective sees the conditional branch alone. The scored velocity is
the residual surrogate

    v~ = sg(v_guided) + gain * (v_c - sg(v_c,old))

so that the policy is on-policy with respect to the guided sampler, the unconditional branch is
never run in training and gets no gradient, and the first ratio is exactly 1. The paper (arXiv
2606.27608, section 4.1) excludes the unconditional branch from the objective but does not write the
ratio down; pairing a guided old log-probability with a conditional new one would make it wrong
before the first update. The other readings, and the control that trains both branches, are
`guidance` settings over the same rollouts (`burnish.guidance`).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from burnish.algorithms.base import (
    Algorithm,
    Footprint,
    KlConfig,
    KlReference,
    SelfCheckError,
    StageContext,
    credited,
    refuse_average,
    reward_advantages,
    with_old,
)
from burnish.batches import Batch
from burnish.flow import KERNELS, log_ratio
from burnish.guidance import (
    GuidanceMode,
    VelocityPair,
    unconditional_use,
    velocity_pair,
)
from burnish.latents import over
from burnish.objectives import clipped_policy_loss, is_clipped, velocity_kl
from burnish.policies.base import Policy
from burnish.rollout_config import RolloutConfig
from burnish.types import Group, LossOutput, Signal, Task, Trajectory

LARGEST_REPLAY_GAP = 0.05
"""Relative difference of velocities that other batch shapes in bfloat16 can make."""


class GrpoConfig(KlConfig):
    """Clipped policy gradient over the transitions of the window."""

    kind: Literal["grpo"] = "grpo"
    guidance: GuidanceMode = "residual"
    """Which policy the ratio scores; see `burnish.guidance.GuidanceMode`."""
    gain: float = Field(default=1.0, gt=0)
    """Of `residual`: 1 is exact if both branches move alike, the guidance scale if only the
    conditional moves."""
    clip_range: float = Field(default=1e-5, gt=0, lt=1)
    """On the normalised ratio, which is a mean over latent dimensions and stays close to 1."""
    normalise_ratio: bool = True
    """Free the ratio of each step of its drift and its scale, and weigh steps alike (GRPO-Guard,
    arXiv 2510.22319); False is the ratio of the likelihoods themselves, for comparison."""

    @model_validator(mode="after")
    def _gain_is_read(self) -> "GrpoConfig":
        if self.gain != 1 and self.guidance != "residual":
            raise ValueError(
                f"need guidance=residual for a gain, got {self.guidance}; leave gain out"
            )
        return self

    def check_rollout(
        self, rollout: RolloutConfig, tasks: Sequence[Task], *, draws_average: bool
    ) -> None:
        if not (rollout.is_stochastic and rollout.keep == "window"):
            raise ValueError(
                f"need a stochastic window that is kept for grpo, got window={rollout.window}, "
                f"kernel={rollout.kernel}, noise_level={rollout.noise_level}, "
                f"keep={rollout.keep}; set rollout.window=2 rollout.kernel=precise "
                "rollout.keep=window"
            )
        refuse_average(self.kind, draws_average)
        scale = rollout.guidance_scale
        if (self.guidance == "none") != (scale == 1) and self.guidance != "residual":
            needed = "of 1" if self.guidance == "none" else "other than 1"
            raise ValueError(
                f"need rollout.guidance_scale {needed} for guidance={self.guidance}, got {scale:g};"
                " residual takes both"
            )

    @property
    def trains_null(self) -> bool:
        return unconditional_use(self.guidance).has_gradient

    def footprint(self, rollout: RolloutConfig, micro_batch: int, *, may_borrow: bool) -> Footprint:
        return Footprint(
            copies=self.copies(may_borrow=may_borrow),
            states=rollout.window,
            credit_scale=rollout.guidance_scale if self.trains_null else 1.0,
            draw_scale=rollout.guidance_scale,
        )

    def build(self, context: StageContext) -> "Grpo":
        return Grpo(self, context)


class Grpo(Algorithm):
    """Group-relative policy optimisation; see the module."""

    def __init__(self, config: GrpoConfig, context: StageContext) -> None:
        self._config, self._context = config, context
        self._use = unconditional_use(config.guidance)
        self._reference = KlReference(config, context)

    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        context = self._context
        advantages, metrics = reward_advantages(
            groups, context.rewards, context.advantages, context.rt
        )
        signals = [
            Signal(
                prompt=group.prompt,
                latents=trajectory.latents,
                sigmas=trajectory.sigmas,
                fields={
                    "sigmas_next": trajectory.sigmas_next,
                    "noise": trajectory.noise,
                    "guided": trajectory.guided,
                    **self._constants(trajectory),
                },
                advantage=advantage,
            )
            for group, _, trajectory, advantage in credited(groups, advantages)
        ]
        if step == 0 or context.num_updates > 1:
            # By the trainer, because only then old and new differ by nothing but the update.
            guidance = context.guidance if self._use.has_gradient else None
            recomputed = with_old(context, signals, guidance)
            if step == 0:
                check_replay(groups, recomputed)
            if context.num_updates > 1:
                signals = recomputed
        return self._reference.mark(signals), metrics

    def _constants(self, trajectory: Trajectory) -> dict[str, Tensor]:
        """The unconditional velocity of the rollout, in the mode that reads it."""
        is_read = self._use.is_needed and not self._use.has_gradient
        return {"unconditional": trajectory.unconditional} if is_read else {}

    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        conditional, pair = self._velocities(policy, batch)
        step = KERNELS[self._context.kernel].coefficients(
            batch.sigmas, batch.fields["sigmas_next"], self._context.noise_level
        )
        jacobian, std = (over(value, batch.latents) for value in (step.jacobian, step.std))
        # The sample was drawn around the guided mean; what is scored may have another.
        noise = batch.fields["noise"] + jacobian * (batch.fields["guided"] - pair.old) / std
        normalise = self._config.normalise_ratio
        ratio = log_ratio(noise, jacobian * (pair.new - pair.old), step.std, normalise=normalise)
        losses = clipped_policy_loss(
            ratio,
            batch.advantages,
            clip_range=self._config.clip_range,
            weight=1 / step.jacobian.abs() if normalise else None,
        )
        clipped = is_clipped(ratio, batch.advantages, clip_range=self._config.clip_range)
        with torch.no_grad():
            metrics = {
                "policy/ratio_max": float(ratio.exp().max()),
                "policy/ratio_min": float(ratio.exp().min()),
                "policy/clipped": float(clipped.float().mean()),
                "policy/change": float(velocity_kl(pair.new, pair.old).sqrt().mean()),
            }
        return self._reference.hold(
            LossOutput(loss=losses.mean(), metrics=metrics), conditional, batch
        )

    def _velocities(
        self, policy: Policy[Any, Any], batch: Batch
    ) -> tuple[Float[Tensor, " state *latent"], VelocityPair]:
        """The conditional velocity, and new and old velocity of the policy that is scored."""
        guided, unconditional = batch.fields["guided"], batch.fields.get("unconditional")
        if self._use.has_gradient:
            composed, conditional, unconditional = batch.guided(policy, self._context.guidance)
            if "old" not in batch.fields:
                # By the same operations as the new one, so that the first ratio is exactly 1.
                guided = composed
        else:
            conditional = batch.velocity(policy)
        return conditional, velocity_pair(
            self._config.guidance,
            conditional=conditional,
            conditional_old=batch.fields.get("old", conditional).detach(),
            guided_old=guided,
            unconditional=unconditional,
            scale=self._context.guidance.scale,
            gain=self._config.gain,
            rescale=policy.rescales_guidance,
        )


def check_replay(groups: Sequence[Group], signals: Sequence[Signal]) -> None:
    """Prove that the trainer's conditional velocity is the one that drew the samples.

    The first ratio compares new and old mean. Were the old one guided and the new one conditional,
    or computed by another model, the recomputed velocity would not be the kept one.

    Args:
        groups: as they were drawn.
        signals: with the recomputed conditional velocity as the field `old`.

    Raises:
        SelfCheckError: they differ by more than rounding in bfloat16 explains.
    """
    kept = {id(t.latents): t.conditional for group in groups for t in group.trajectories}
    for signal in signals:
        drawn, replayed = kept[id(signal.latents)], signal.fields["old"]
        gap = float((drawn - replayed).pow(2).mean().sqrt() / drawn.pow(2).mean().sqrt())
        if not gap <= LARGEST_REPLAY_GAP:
            raise SelfCheckError(
                f"need a replayed velocity equal to the sampled one, got {gap:.1%} difference for "
                f"prompt {signal.prompt.id}; sampler and trainer do not run the same model"
            )
