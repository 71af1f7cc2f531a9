"""Laws of group-relative advantages and of the group range."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from burnish.advantages import Advantages, group_advantages, group_range, normalised_weights

REWARDS, GROUPS, SAMPLES = 3, 4, 6
FLOORS = torch.tensor([0.01, 0.02, 0.0])


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of different units, all present, with the weights of four categories."""
    units = torch.tensor([1.0, 5.0, 0.2]).reshape(3, 1, 1)
    weights = torch.tensor([[1.0, 2, 1, 0], [1, 1, 0, 0], [2, 0, 0, 1]])
    rewards = normals(REWARDS, GROUPS, SAMPLES, seed=seed) * units
    return rewards, torch.ones_like(rewards, dtype=torch.bool), weights


def one_group(*values: float, floor: float = 0.0, **options: Any) -> Advantages:
    """One reward and one group; NaN means missing."""
    rewards = torch.tensor(values).reshape(1, 1, -1)
    return group_advantages(
        rewards, ~rewards.isnan(), torch.ones(1, 1), torch.tensor([floor]), **options
    )


@pytest.mark.parametrize("std_mode", ["group", "global", "none"])
@pytest.mark.parametrize("combination", ["each", "sum"])
@pytest.mark.parametrize("rescale_batch", [False, True])
def test_law_20_the_mean_of_every_group_is_zero(
    std_mode: Any, combination: Any, rescale_batch: bool
) -> None:
    found = group_advantages(
        *batch(),
        FLOORS,
        std_mode=std_mode,
        combination=combination,
        rescale_batch=rescale_batch,
        clamp=1e6,
    )
    torch.testing.assert_close(found.advantages.mean(dim=1), torch.zeros(GROUPS), atol=1e-6, rtol=0)
    assert found.keep.all()


@given(st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 20))
def test_law_20_units_and_offsets_of_a_reward_do_not_matter(
    unit: float, offset: float, seed: int
) -> None:
    rewards, present, weights = batch(seed)
    moved = rewards.double()
    moved[1] = moved[1] * unit + offset
    floors = torch.zeros(REWARDS)
    before = group_advantages(rewards, present, weights, floors)
    after = group_advantages(moved, present, weights, floors)
    torch.testing.assert_close(after.advantages, before.advantages, atol=1e-5, rtol=1e-5)


def test_units_do_matter_in_the_plain_sum() -> None:
    rewards, present, weights = batch()
    floors = torch.zeros(REWARDS)
    before = group_advantages(rewards, present, weights, floors, combination="sum")
    rewards[1] *= 100
    after = group_advantages(rewards, present, weights, floors, combination="sum")
    assert not torch.allclose(before.advantages, after.advantages, atol=0.1)
    assert after.share[1] > before.share[1]


@given(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1e-8, 0.1]))
def test_law_20_a_constant_group_gives_exactly_zero_and_is_not_kept(
    value: float, floor: float
) -> None:
    found = one_group(*[value] * 7, floor=floor)
    assert torch.equal(found.advantages, torch.zeros(1, 7))
    assert torch.equal(found.share, torch.zeros(1))
    assert not found.keep.any()


def test_law_20_a_constant_group_whose_mean_is_rounded_gives_exactly_zero() -> None:
    rewards = torch.full((1, 1, 3), 0.1, dtype=torch.float64)
    assert rewards.sum() / 3 != 0.1
    found = group_advantages(rewards, rewards > 0, torch.ones(1, 1), torch.zeros(1))
    assert torch.equal(found.advantages, torch.zeros(1, 3))


def test_the_advantage_is_the_weighted_sum_of_z_scores() -> None:
    rewards, present, weights = batch()
    found = group_advantages(rewards, present, weights, torch.zeros(REWARDS))
    z = (rewards - rewards.mean(dim=2, keepdim=True)) / rewards.std(
        dim=2, keepdim=True, unbiased=False
    )
    wanted = (weights / weights.sum(dim=0)).unsqueeze(-1) * z
    torch.testing.assert_close(found.contributions, wanted)
    torch.testing.assert_close(found.advantages, wanted.sum(dim=0))
    parts = wanted.abs().sum(dim=(1, 2))
    torch.testing.assert_close(found.share, parts / parts.sum())


def test_law_21_a_std_below_the_floor_is_divided_by_the_floor_and_reported() -> None:
    below, above = one_group(1.0, 1.02, floor=0.1), one_group(1.0, 1.4, floor=0.1)
    torch.testing.assert_close(below.advantages, torch.tensor([[-0.1, 0.1]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(above.advantages, torch.tensor([[-1.0, 1.0]]))
    assert below.is_below_floor.all() and not above.is_below_floor.any()
    assert below.keep.all()


def test_a_reward_that_does_not_apply_is_not_reported_below_its_floor() -> None:
    rewards = torch.ones(2, 1, 4)
    found = group_advantages(
        rewards, rewards > 0, torch.tensor([[1.0], [0.0]]), torch.tensor([0.1, 0.1])
    )
    assert found.is_below_floor.tolist() == [[True], [False]]


def test_the_floor_of_a_plain_sum_adds_the_noises_of_its_terms_in_square() -> None:
    rewards = torch.tensor([[[0.0, 0.02]], [[0.0, 0.0]]])
    found = group_advantages(
        rewards,
        rewards >= 0,
        torch.tensor([[1.0], [1.0]]),
        torch.tensor([0.3, 0.4]),
        combination="sum",
    )
    torch.testing.assert_close(found.advantages, torch.tensor([[-0.02, 0.02]]))


@given(st.permutations(range(SAMPLES)), st.permutations(range(GROUPS)), st.integers(0, 9))
def test_law_22_permuting_samples_and_groups_permutes_the_advantages_bit_by_bit(
    samples: list[int], groups: list[int], seed: int
) -> None:
    rewards, present, weights = batch(seed)
    present[0, 0, 1] = present[2, 3, 4] = False
    found = group_advantages(rewards, present, weights, FLOORS)
    moved = group_advantages(
        rewards[:, groups][:, :, samples],
        present[:, groups][:, :, samples],
        weights[:, groups],
        FLOORS,
    )
    assert torch.equal(moved.advantages, found.advantages[groups][:, samples])
    assert torch.equal(moved.keep, found.keep[groups])


@pytest.mark.parametrize("missing", ["sample", "reward"])
def test_law_23_a_missing_score_leaves_the_baseline_and_gets_zero(missing: Any) -> None:
    found = one_group(1.0, math.nan, 3.0, missing=missing)
    assert torch.equal(found.advantages, torch.tensor([[-1.0, 0.0, 1.0]]))


def test_law_23_by_default_a_sample_without_one_score_leaves_all_baselines() -> None:
    rewards = torch.tensor([[[1.0, 9.0, 3.0]], [[4.0, math.nan, 2.0]]])
    weights, floors = torch.tensor([[3.0], [1.0]]), torch.zeros(2)
    whole = group_advantages(rewards, ~rewards.isnan(), weights, floors)
    torch.testing.assert_close(whole.advantages, torch.tensor([[-0.5, 0.0, 0.5]]))
    part = group_advantages(rewards, ~rewards.isnan(), weights, floors, missing="reward")
    assert part.contributions[1, 0, 1] == 0
    assert part.advantages[0, 1] > 0.75


def test_law_23_a_score_that_does_not_apply_is_not_missed() -> None:
    rewards = torch.tensor([[[1.0, 3.0]], [[math.nan, math.nan]]])
    found = group_advantages(
        rewards, ~rewards.isnan(), torch.tensor([[0.5], [0.0]]), torch.zeros(2)
    )
    torch.testing.assert_close(found.advantages, torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("values", [(math.nan, math.nan, math.nan), (math.nan, 2.0, math.nan)])
def test_law_23_a_group_without_two_scores_is_dropped(values: tuple[float, ...]) -> None:
    found = one_group(*values)
    assert torch.equal(found.advantages, torch.zeros(1, 3))
    assert not found.keep.any()


@given(st.integers(0, 30))
def test_law_23_the_value_at_a_missing_place_never_matters(seed: int) -> None:
    rewards, present, weights = batch(seed)
    present &= normals(*rewards.shape, seed=seed + 1) > -1
    found = [
        group_advantages(rewards.where(present, gap), present, weights, FLOORS)
        for gap in (math.nan, math.inf, 0.0, -1e6)
    ]
    for other in found[1:]:
        assert torch.equal(found[0].advantages, other.advantages)
    assert found[0].advantages.isfinite().all()


def test_weights_sum_to_one_over_the_rewards_that_apply() -> None:
    weights = normalised_weights(batch()[2])
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(GROUPS))
    assert (weights[:, 3] == torch.tensor([0.0, 0.0, 1.0])).all()


def test_a_group_to_which_no_reward_applies_is_dropped() -> None:
    rewards = torch.tensor([[[1.0, 2.0]]])
    found = group_advantages(rewards, rewards > 0, torch.zeros(1, 1), torch.zeros(1))
    assert torch.equal(found.advantages, torch.zeros(1, 2))
    assert not found.keep.any() and found.share.isfinite().all()


def test_std_modes_divide_by_the_group_the_batch_or_nothing() -> None:
    rewards = torch.tensor([[[0.0, 2.0], [10.0, 18.0]]])
    present, weights, floors = rewards >= 0, torch.ones(1, 2), torch.zeros(1)

    def advantages(mode: Any) -> Tensor:
        return group_advantages(
            rewards, present, weights, floors, std_mode=mode, clamp=99.0
        ).advantages

    centred = torch.tensor([[-1.0, 1.0], [-4.0, 4.0]])
    torch.testing.assert_close(advantages("group"), centred.sign())
    torch.testing.assert_close(advantages("global"), centred / rewards.std(unbiased=False))
    torch.testing.assert_close(advantages("none"), centred)


def test_batch_rescale_gives_unit_std_over_the_samples_that_count() -> None:
    rewards, present, weights = batch()
    present[0, 0, 0] = False
    found = group_advantages(rewards, present, weights, FLOORS, rescale_batch=True)
    counted = torch.ones(GROUPS, SAMPLES, dtype=torch.bool)
    counted[0, 0] = False
    torch.testing.assert_close(found.advantages[counted].std(unbiased=False), torch.tensor(1.0))
    assert found.advantages[0, 0] == 0


def test_the_clamp_bounds_the_advantage() -> None:
    found = one_group(*[0.0] * 63, 1.0, clamp=5.0)
    assert found.advantages.max() == 5.0
    assert found.contributions.max() > 7


@given(st.floats(0.0, 4.0, width=32))
def test_law_24_the_filter_keeps_a_prompt_iff_its_range_exceeds_the_threshold(
    threshold: float,
) -> None:
    rewards = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 1.0, 4.0]]])
    ranges = group_range(rewards, rewards >= 0, torch.ones(1, 3))
    assert torch.equal(ranges, torch.tensor([2.0, 0.0, 4.0]))
    assert (ranges > threshold).tolist() == [threshold < 2, False, threshold < 4]
    assert torch.equal(ranges, group_range(rewards, rewards >= 0, torch.ones(1, 3)))


def test_law_24_the_range_is_that_of_the_weighted_composite_of_complete_samples() -> None:
    rewards = torch.tensor([[[1.0, 3.0, 9.0]], [[4.0, 0.0, math.nan]]])
    present = ~rewards.isnan()
    ranges = group_range(rewards, present, torch.tensor([[3.0], [1.0]]))
    torch.testing.assert_close(ranges, torch.tensor([0.5]))
    nothing = group_range(rewards, torch.zeros_like(present), torch.ones(2, 1))
    assert torch.equal(nothing, torch.zeros(1))


def test_contracts_are_refused_with_their_place() -> None:
    rewards, present, weights = batch()
    weights[1, 2] = -1
    with pytest.raises(ValueError, match=r"got -1.0 for reward 1 in group 2"):
        group_advantages(rewards, present, weights, FLOORS)
    rewards, present, weights = batch()
    rewards[2, 1, 3] = math.nan
    with pytest.raises(ValueError, match=r"reward 2, group 1, sample 3; mark a failed score"):
        group_advantages(rewards, present, weights, FLOORS)
    rewards, present, weights = batch()
    with pytest.raises(ValueError, match=r"need floors >= 0 and clamp > 0"):
        group_advantages(rewards, present, weights, -FLOORS)
    with pytest.raises(ValueError, match=r"need floors >= 0 and clamp > 0"):
        group_advantages(rewards, present, weights, FLOORS, clamp=0.0)
    with pytest.raises(ValueError, match=r"need missing='sample'"):
        group_advantages(rewards, present, weights, FLOORS, combination="sum", missing="reward")
