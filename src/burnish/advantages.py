"""Group-relative advantages over several rewards.

Each reward is centred on its mean over the samples of one prompt (a group) and divided by the
group's standard deviation before the weighted sum, so that no reward rules by its unit:

    A_i = sum_k w_k (R_k,i - mean_k) / std_k,   sum_k w_k = 1      (arXiv:2606.27608, section 4.1)

The paper gives no rule for small deviations, missing scores or weights that do not apply. Here:

* **Small deviations.** z is divided by max(std, floor), where the floor is the reward's own repeat
  noise. Below the floor it fades out instead of jumping to 0; `is_below_floor` reports where, for a
  caller that wants to drop the reward there. A constant reward gives exactly 0.
* **Missing scores** are a mask, never a number. By default a sample that lacks one of its rewards
  leaves every baseline and gets 0, so that an image that breaks one judge is neither praised nor
  blamed by the others.
* **Weights** of 0 mean "does not apply to this group"; the others are scaled to sum 1.

Standard deviations are those of the population (divisor n). Arithmetic is float64: the order of
samples then does not reach the float32 result.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

StdMode = Literal["group", "global", "none"]
"""Divisor of a centred reward: std of its group, of the whole batch, or 1 (no floor either)."""

Combination = Literal["each", "sum"]
"""`each`: normalise every reward, then add. `sum`: add raw rewards, then normalise; the control."""

MissingMode = Literal["sample", "reward"]
"""What a missing score takes out: the whole sample, or its place in that one reward."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch of groups, with what is needed to judge them."""

    advantages: Float[Tensor, "group sample"]
    """What the loss is told; 0 for samples that count in no baseline."""
    contributions: Float[Tensor, "reward group sample"]
    """Weighted z-scores; they sum over rewards to the advantages before batch scale and clamp."""
    share: Float[Tensor, " reward"]
    """Each reward's part in the sum of absolute contributions; sums to 1, or is all 0."""
    is_below_floor: Bool[Tensor, "reward group"]
    """The reward applies, but its std in the group is below its noise floor."""
    keep: Bool[Tensor, " group"]
    """Some sample of the group has a nonzero advantage; the others can be dropped and counted."""

    def of(self, groups: slice) -> "Advantages":
        """Those of some groups; `share` stays that of the batch."""
        return Advantages(
            advantages=self.advantages[groups],
            contributions=self.contributions[:, groups],
            share=self.share,
            is_below_floor=self.is_below_floor[:, groups],
            keep=self.keep[groups],
        )


def normalised_weights(weights: Float[Tensor, "reward group"]) -> Float[Tensor, "reward group"]:
    """Weights that sum to 1 over the rewards that apply to each group: w_k / sum_j w_j.

    Args:
        weights: weight of each reward in each group, from the group's category; 0 where the reward
            does not apply. A group without any weight stays all 0 and is not kept.

    Raises:
        ValueError: a weight is negative or not finite.

    Reference: arXiv:2606.27608, section 4.1 (sum_k w_k = 1).

    >>> normalised_weights(torch.tensor([[3.0, 2.0], [1.0, 0.0]]))
    tensor([[0.7500, 1.0000],
            [0.2500, 0.0000]])
    """
    wrong = ~(weights.isfinite() & (weights >= 0))
    if bool(wrong.any()):
        reward, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"need finite weights >= 0, got {float(weights[reward, group])} for reward {reward} in"
            f" group {group}; to penalise a reward, negate its score"
        )
    total = weights.sum(dim=0, keepdim=True)
    return weights / total.where(total > 0, 1)


def _checked(
    rewards: Tensor, present: Tensor, weights: Tensor, missing: MissingMode
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards with 0 at the gaps, weights that sum to 1, and the mask of what counts; float64."""
    weights = normalised_weights(weights.double())
    applies = (weights > 0).unsqueeze(-1)
    wrong = present & ~rewards.isfinite()
    if bool(wrong.any()):
        reward, group, sample = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"need finite rewards where present, got {float(rewards[reward, group, sample])} for"
            f" reward {reward}, group {group}, sample {sample}; mark a failed score as not present"
        )
    counts = present & applies
    if missing == "sample":
        counts = counts & (present | ~applies).all(dim=0)
    return rewards.double().where(counts, 0), weights, counts


def _centred(values: Tensor, counts: Tensor) -> Tensor:
    """Values minus the mean of the counted samples; exactly 0 for constants and for the others."""
    number = counts.sum(dim=-1, keepdim=True).clamp_min(1)
    mean = values.where(counts, 0).sum(dim=-1, keepdim=True) / number
    low = values.where(counts, torch.inf).amin(dim=-1, keepdim=True)
    high = values.where(counts, -torch.inf).amax(dim=-1, keepdim=True)
    return (values - mean).where(counts & (high > low), 0)


def _deviation(centred: Tensor, counts: Tensor) -> Tensor:
    number = counts.sum(dim=-1, keepdim=True).clamp_min(1)
    return ((centred**2).sum(dim=-1, keepdim=True) / number).sqrt()


def _spread(values: Tensor, counts: Tensor, std_mode: StdMode) -> Tensor:
    """Std of each group; `global` takes it around the batch mean, the same for all groups."""
    if std_mode != "global":
        return _deviation(_centred(values, counts), counts)
    flat, flat_counts = values.flatten(-2), counts.flatten(-2)
    std = _deviation(_centred(flat, flat_counts), flat_counts).unsqueeze(-1)
    return std.expand(*values.shape[:-1], 1)


def _check_options(
    floors: Tensor, clamp: float, combination: Combination, missing: MissingMode
) -> None:
    if bool((floors < 0).any()) or not clamp > 0:
        raise ValueError(
            f"need floors >= 0 and clamp > 0, got {floors.tolist()} and {clamp}; a floor is a std"
        )
    if combination == "sum" and missing == "reward":
        raise ValueError(
            "need missing='sample' for combination 'sum', got 'reward'; a sum needs all its terms"
        )


def _batch_std(advantages: Tensor, counts: Tensor) -> Tensor:
    """Std of the advantages over all counted samples; 1 if they are all the same."""
    counted = counts.any(dim=0).flatten()
    std = _deviation(_centred(advantages.flatten(), counted), counted)
    return std.where(std > 0, 1)


def group_advantages(
    rewards: Float[Tensor, "reward group sample"],
    present: Bool[Tensor, "reward group sample"],
    weights: Float[Tensor, "reward group"],
    floors: Float[Tensor, " reward"],
    *,
    std_mode: StdMode = "group",
    combination: Combination = "each",
    missing: MissingMode = "sample",
    rescale_batch: bool = False,
    clamp: float = 5.0,
) -> Advantages:
    """Weighted sum of group-relative z-scores, one per reward.

        A_i   = clamp(sum_k w_k z_k,i, -clamp, clamp)
        z_k,i = (R_k,i - mean_k) / max(std_k, floor_k)                                    "each"
        z_k,i = (R_k,i - mean_k) / max(std(sum_k w_k R_k), sqrt(sum_k (w_k floor_k)^2))   "sum"

    Args:
        rewards, present: raw scores, and whether they exist; without one, any value, NaN included.
        weights: weight of each reward in each group, 0 where it does not apply; scaled to sum 1.
        floors: repeat-scoring noise of each reward, in its own unit, at least 0.
        std_mode: what divides the centred rewards; `none` ignores the floors.
        combination, missing: see `Combination` and `MissingMode`.
        rescale_batch: divide A by its std over the counted samples of the batch, before the clamp.
        clamp: largest absolute advantage.

    Raises:
        ValueError: a negative floor or weight, a present reward that is not finite, a clamp that is
            not positive, or a plain sum over missing terms.

    Reference: arXiv:2606.27608, section 4.1; GDPO, arXiv:2601.05242 (which rescales the batch);
    Dr. GRPO, arXiv:2503.20783 (std mode `none`).

    >>> rewards, weights = torch.tensor([[[1.0, 3.0]]]), torch.ones(1, 1)
    >>> group_advantages(rewards, rewards > 0, weights, torch.tensor([0.1])).advantages
    tensor([[-1.,  1.]])
    """
    _check_options(floors, clamp, combination, missing)
    values, weights, counts = _checked(rewards, present, weights, missing)
    weight, floor = weights.unsqueeze(-1), floors.to(values).reshape(-1, 1, 1)
    spread = _spread(values, counts, std_mode)
    is_below_floor = (spread < floor).squeeze(-1) & (weights > 0)
    if combination == "sum":
        spread = _spread((weight * values).sum(dim=0), counts.any(dim=0), std_mode)
        floor = ((weight * floor) ** 2).sum(dim=0).sqrt()
    divisor = torch.ones_like(spread) if std_mode == "none" else torch.maximum(spread, floor)
    contributions = weight * _centred(values, counts) / divisor.where(divisor > 0, 1)
    advantages = contributions.sum(dim=0)
    if rescale_batch:
        advantages = advantages / _batch_std(advantages, counts)
    advantages = advantages.clamp(-clamp, clamp)
    parts = contributions.abs().sum(dim=(1, 2))
    return Advantages(
        advantages=advantages.float(),
        contributions=contributions.float(),
        share=(parts / parts.sum().where(parts.sum() > 0, 1)).float(),
        is_below_floor=is_below_floor,
        keep=(advantages != 0).any(dim=1),
    )


def composite(
    rewards: Float[Tensor, "reward group sample"],
    present: Bool[Tensor, "reward group sample"],
    weights: Float[Tensor, "reward group"],
) -> tuple[Float[Tensor, "group sample"], Bool[Tensor, "group sample"]]:
    """Weighted sum of raw rewards of each sample, C = sum_k w_k R_k, and whether it is complete.

    A sample without a full set of the scores that apply has no composite; its value means nothing.

    Args:
        rewards: raw scores; anything where not present.
        present: the score exists.
        weights: weight of each reward in each group, 0 where it does not apply; scaled to sum 1.

    Raises:
        ValueError: a weight is negative, or a present reward is not finite.

    >>> rewards = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]])
    >>> composite(rewards, rewards > 0, torch.ones(2, 1))
    (tensor([[1.5000, 0.0000]]), tensor([[ True, False]]))
    """
    values, weights, counts = _checked(rewards, present, weights, "sample")
    return (weights.unsqueeze(-1) * values).sum(dim=0).float(), counts.any(dim=0)


def group_range(
    rewards: Float[Tensor, "reward group sample"],
    present: Bool[Tensor, "reward group sample"],
    weights: Float[Tensor, "reward group"],
) -> Float[Tensor, " group"]:
    """Range of the raw composite reward in each group: max_i C_i - min_i C_i, C = sum_k w_k R_k.

    The measure of prompt curation, which keeps a prompt if its range is larger than a threshold. It
    needs raw rewards, since z-scores have lost their range. Samples without a full set of scores
    are left out; a group with fewer than two others has range 0.

    Args:
        rewards: raw scores; anything where not present.
        present: the score exists.
        weights: weight of each reward in each group, 0 where it does not apply; scaled to sum 1.

    Raises:
        ValueError: a weight is negative, or a present reward is not finite.

    Reference: arXiv:2606.27608, section 4.2 (prompt curation).

    >>> rewards = torch.tensor([[[1.0, 3.0, 2.0]]])
    >>> group_range(rewards, rewards > 0, torch.ones(1, 1))
    tensor([2.])
    """
    values, counted = composite(rewards, present, weights)
    low = values.where(counted, torch.inf).amin(dim=-1)
    high = values.where(counted, -torch.inf).amax(dim=-1)
    return (high - low).where(counted.any(dim=-1), 0)
