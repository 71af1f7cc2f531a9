"""GRPO on a stochastic window, with guidance in the rollout only.

Samples are drawn guided; the objective sees the conditional branch alone. The scored velocity is
the residual surrogate

    v~ = sg(v_guided) + gain * (v_c - sg(v_c,old))

so that the policy is on-policy with respect to the guided sampler, the unconditional branch is
never run in training and gets no gradient, and the first ratio is exactly 1. The paper (arXiv
2606.27608, section 4.1) excludes the unconditional branch from the objective but does not write the
ratio down; pairing a guided old log-probability with a conditional new one would make it wrong
before the first update.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from burnish.algorithms.base import (
    Algorithm,
    AlgorithmConfig,
    Batch,
    LearnsFrom,
    SelfCheckError,
    Setting,
    credited,
    evaluate,
    reward_advantages,
)
from burnish.flow import KERNELS, log_ratio
from burnish.objectives import clipped_policy_loss, is_clipped
from burnish.policies.base import Policy
from burnish.types import Group, LossOutput, Signal

LARGEST_REPLAY_GAP = 0.05
"""Relative difference of velocities that other batch shapes in bfloat16 can make."""


class GrpoConfig(AlgorithmConfig):
    """Clipped policy gradient over the transitions of the window."""

    learns_from: ClassVar[LearnsFrom] = "transitions"
    kind: Literal["grpo"] = "grpo"
    gain: float = Field(default=1.0, gt=0)
    """1 is exact if both branches move alike, the guidance scale if only the conditional moves."""
    clip_range: float = Field(default=1e-5, gt=0)
    """On the normalised ratio, which is a mean over latent dimensions and stays close to 1."""

    def build(self, setting: Setting) -> "Grpo":
        return Grpo(self, setting)


class Grpo(Algorithm):
    """Group-relative policy optimisation; see the module."""

    def __init__(self, config: GrpoConfig, setting: Setting) -> None:
        self._config, self._setting = config, setting

    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        advantages, metrics = reward_advantages(
            groups, self._setting.rewards, self._setting.advantages
        )
        signals = [
            Signal(
                prompt=group.prompt,
                latents=trajectory.latents,
                sigmas=trajectory.sigmas,
                fields={"sigmas_next": trajectory.sigmas_next, "noise": trajectory.noise},
                advantage=advantage,
            )
            for group, _, trajectory, advantage in credited(groups, advantages)
        ]
        if step == 0 or self._setting.num_updates > 1:
            with_old = self._with_old_velocity(signals)
            if step == 0:
                check_replay(groups, with_old)
            if self._setting.num_updates > 1:
                signals = with_old
        return signals, metrics

    def _with_old_velocity(self, signals: list[Signal]) -> list[Signal]:
        """Recomputed by the trainer, because only then old and new differ by nothing but the
        update."""
        old = evaluate(self._setting.policy, signals, self._setting.micro_batch)
        return [s.with_fields(old=velocity) for s, velocity in zip(signals, old, strict=True)]

    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        velocity = batch.velocity(policy)
        old = batch.fields.get("old", velocity.detach())
        step = KERNELS[self._setting.kernel].coefficients(
            batch.sigmas, batch.fields["sigmas_next"], self._setting.noise_level
        )
        # The guided part of the surrogate is the same in both means and drops out of the shift.
        shift = self._config.gain * step.jacobian[:, None, None] * (velocity - old)
        ratio = log_ratio(batch.fields["noise"], shift, step.std, normalise=True)
        losses = clipped_policy_loss(
            ratio,
            batch.advantages,
            clip_range=self._config.clip_range,
            weight=1 / step.jacobian.abs(),
        )
        clipped = is_clipped(ratio, batch.advantages, clip_range=self._config.clip_range)
        with torch.no_grad():
            metrics = {
                "policy/ratio_max": float(ratio.exp().max()),
                "policy/ratio_min": float(ratio.exp().min()),
                "policy/clipped": float(clipped.float().mean()),
                "policy/change": float((velocity - old).pow(2).mean().sqrt()),
            }
        return LossOutput(loss=losses.mean(), metrics=metrics)


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
