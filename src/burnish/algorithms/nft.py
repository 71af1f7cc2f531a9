"""The forward-process loss on guided samples: learn from clean images, without a stochastic
sampler.

Each clean sample is noised again at several levels; good samples pull the conditional velocity
towards the velocity that leads to them, bad ones push it away (DiffusionNFT, arXiv:2509.16117). The
samples come from the guided ODE, the loss sees the conditional branch alone: the reading of hybrid
guidance that fits an "ODE rollout" and a "CFG-free objective" (arXiv 2606.27608, section 4.1)
without a ratio to go wrong.

The anchor decides what happens to guidance. Around the plain conditional velocity, guided samples
teach the branch to reproduce them, so some guidance is absorbed. Around the guided velocity the
loss sees

    v~ = sg(v_guided,old) + v_c - sg(v_c,old)

and only the difference that reward makes is learnt.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from burnish import runtime
from burnish.algorithms.base import (
    Algorithm,
    Footprint,
    KlConfig,
    KlReference,
    StageContext,
    credited,
    reward_advantages,
    with_old,
)
from burnish.batches import Batch
from burnish.flow import add_noise
from burnish.guidance import residual
from burnish.objectives import forward_process_loss, velocity_kl
from burnish.policies.base import Policy
from burnish.rollout_config import RolloutConfig
from burnish.types import Group, LossOutput, Signal, Task


class NftConfig(KlConfig):
    """Negative-aware fine-tuning on noised samples."""

    kind: Literal["nft"] = "nft"
    beta: float = Field(default=1.0, gt=0)
    """Distance between the implied good and bad policies."""
    max_advantage: float = Field(default=2.0, gt=0)
    """Advantage at which a sample counts as all good or all bad."""
    num_levels: int = Field(default=4, ge=1)
    """Noise levels at which each sample is visited."""
    noise_range: tuple[float, float] = (0.3, 1.0)
    """Lowest and highest noise level; the paper trains the high ones."""
    anchor: Literal["conditional", "guided"] = "conditional"
    error: Literal["clean", "velocity"] = "velocity"
    """What is compared: velocities, or predicted clean latents, each error divided by its size."""

    @model_validator(mode="after")
    def _range_is_ordered(self) -> "NftConfig":
        low, high = self.noise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"need 0 <= low < high <= 1, got noise_range={self.noise_range}")
        return self

    def check_rollout(
        self, rollout: RolloutConfig, tasks: Sequence[Task], *, draws_average: bool
    ) -> None:
        if rollout.is_stochastic:
            raise ValueError(
                f"need samples of the ODE for nft, got a stochastic window of {rollout.window} "
                "steps; set rollout.window=0"
            )

    def footprint(self, rollout: RolloutConfig, micro_batch: int, *, may_borrow: bool) -> Footprint:
        return Footprint(
            copies=self.copies(may_borrow=may_borrow),
            states=self.num_levels,
            credit_scale=rollout.guidance_scale if self.anchor == "guided" else 1.0,
            draw_scale=rollout.guidance_scale,
        )

    def build(self, context: StageContext) -> "Nft":
        return Nft(self, context)


class Nft(Algorithm):
    """Forward-process fine-tuning; see the module."""

    def __init__(self, config: NftConfig, context: StageContext) -> None:
        self._config, self._context = config, context
        self._reference = KlReference(config, context)

    def credit(self, groups: Sequence[Group], step: int) -> tuple[list[Signal], dict[str, float]]:
        context = self._context
        advantages, metrics = reward_advantages(
            groups, context.rewards, context.advantages, context.rt
        )
        signals = []
        for group, place, trajectory, advantage in credited(groups, advantages):
            names = ("forward process", step, group.prompt.id, place)
            draws = runtime.generator(self._context.seed, *names)
            signals.append(self._noised(group, trajectory.clean, advantage, draws))
        is_guided = self._config.anchor == "guided"
        anchored = with_old(context, signals, context.guidance if is_guided else None)
        return self._reference.mark(anchored), metrics

    def _noised(
        self, group: Group, clean: torch.Tensor, advantage: float, draws: torch.Generator
    ) -> Signal:
        """One sample at `num_levels` stratified noise levels."""
        count = self._config.num_levels
        low, high = self._config.noise_range
        place = (torch.arange(count) + torch.rand(count, generator=draws)) / count
        sigmas = low + (high - low) * place
        noise = torch.randn(count, *clean.shape, generator=draws)
        repeated = clean.expand(count, *clean.shape)
        return Signal(
            prompt=group.prompt,
            latents=add_noise(repeated, noise, sigmas),
            sigmas=sigmas,
            fields={"target": noise - repeated},
            advantage=advantage,
        )

    def loss(self, policy: Policy[Any, Any], batch: Batch) -> LossOutput:
        conditional, old = batch.velocity(policy), batch.fields["old"]
        velocity, anchor = conditional, old
        if "guided" in batch.fields:
            anchor = batch.fields["guided"]
            velocity = residual(anchor, conditional, old, 1.0)
        losses = forward_process_loss(
            velocity,
            anchor,
            batch.fields["target"],
            batch.advantages,
            beta=self._config.beta,
            max_advantage=self._config.max_advantage,
            clean_sigma=batch.sigmas if self._config.error == "clean" else None,
        )
        with torch.no_grad():
            change = float(velocity_kl(conditional, old).sqrt().mean())
        output = LossOutput(loss=losses.mean(), metrics={"policy/change": change})
        return self._reference.hold(output, conditional, batch)
