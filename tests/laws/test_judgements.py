"""Laws of the losses of a judge."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from burnish.judges.judgements import (
    SMALLEST_STD,
    expected_score,
    expected_score_loss,
    mass_penalty,
    ordinal_loss,
    pair_loss,
    soft_label,
    soft_label_loss,
)

means = st.floats(1, 5)
spreads = st.floats(0, 3)
SCORES = torch.arange(1, 6).double()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shares(seed: int, rows: int = 1) -> Tensor:
    """Random distributions over the five scores."""
    return normals(rows, 5, seed=seed).softmax(dim=-1)


# The score


@given(st.integers(0, 99), st.floats(0.1, 100))
def test_the_expected_score_is_on_the_scale(seed: int, size: float) -> None:
    score = float(expected_score(size * normals(1, 5, seed=seed)))
    assert 1 <= score <= 5


@given(st.integers(0, 99), st.floats(-30, 30))
def test_the_expected_score_is_the_mean_and_needs_no_normalised_logits(
    seed: int, shift: float
) -> None:
    distribution = shares(seed)
    found = expected_score(distribution.log() + shift)
    torch.testing.assert_close(found, distribution @ SCORES)


def test_the_expected_score_loss_is_zero_at_the_target_and_grows_squared() -> None:
    label = soft_label(vector(2.3), vector(0.6))
    losses = [expected_score_loss(label.log(), vector(2.3 + miss)) for miss in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(torch.cat(losses), vector(0, 0.25, 1), atol=1e-12, rtol=1e-9)


# The label


@given(means, spreads)
def test_a_soft_label_sums_to_one_and_has_the_given_mean(mean: float, std: float) -> None:
    label = soft_label(vector(mean), vector(std))
    assert bool((label >= 0).all())
    torch.testing.assert_close(label.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(label @ SCORES, vector(mean), atol=1e-9, rtol=0)


@given(means)
def test_a_soft_label_goes_over_into_the_interpolation_as_the_spread_falls(mean: float) -> None:
    tiny, small = (
        soft_label(vector(mean), vector(std)) for std in (SMALLEST_STD / 2, SMALLEST_STD)
    )
    assert float((tiny - small).abs().max()) < 1e-3
    assert int((tiny > 1e-6).sum()) <= 2


@given(means)
def test_more_spread_between_raters_is_more_spread_in_the_label(mean: float) -> None:
    wide = soft_label(vector(mean, mean, mean), vector(0.3, 0.8, 2.0))
    variance = (wide * (SCORES - mean) ** 2).sum(dim=1)
    assert variance[0] <= variance[1] + 1e-9 <= variance[2] + 2e-9


@given(st.floats(1, 5), spreads)
def test_a_soft_label_of_the_mirrored_mean_is_mirrored(mean: float, std: float) -> None:
    label, mirrored = soft_label(vector(mean, 6 - mean), vector(std, std))
    torch.testing.assert_close(label, mirrored.flip(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.9, 0.1), (5.1, 0.1), (3, -0.1), (3, torch.inf), (torch.nan, 0)]
)
def test_a_label_off_the_scale_is_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="need means in"):
        soft_label(vector(mean), vector(std))


# Losses


@given(st.integers(0, 99), st.sampled_from([soft_label_loss, ordinal_loss]))
def test_a_loss_is_least_at_the_label(seed: int, loss: Callable[..., Tensor]) -> None:
    label = shares(seed)
    leaf = label.log().requires_grad_()
    at_label = loss(leaf, label)
    (slope,) = torch.autograd.grad(at_label.sum(), leaf)
    assert float(slope.abs().max()) < 1e-9
    assert bool((loss(shares(seed + 100).log(), label) >= at_label.detach()).all())


@given(st.integers(0, 99))
def test_the_ordinal_loss_is_a_proper_score(seed: int) -> None:
    """In expectation over raters it is least for a judge that answers with their distribution."""
    raters = shares(seed)[0]
    single = torch.eye(5).double()

    def risk(answer: Tensor) -> float:
        return float(raters @ ordinal_loss(answer.log().expand(5, 5), single))

    assert risk(raters[None]) <= risk(shares(seed + 100)) + 1e-12


def test_a_far_miss_costs_more_than_a_near_one_in_the_ordinal_loss_alone() -> None:
    label = torch.eye(5).double()[:1]
    sure = 50 * torch.eye(5).double()
    ordinal = ordinal_loss(sure, label.expand(5, 5))
    torch.testing.assert_close(ordinal, vector(0, 1, 2, 3, 4))
    plain = soft_label_loss(sure, label.expand(5, 5))
    assert float(plain[1:].max() - plain[1:].min()) < 1e-9


@given(st.integers(0, 99))
def test_soft_label_loss_and_mass_penalty_are_the_cross_entropy_of_the_vocabulary(
    seed: int,
) -> None:
    log_probs = normals(3, 20, seed=seed).log_softmax(dim=-1)
    label, digits = shares(seed, 3), log_probs[:, 4:9]
    whole = -(label * digits).sum(dim=-1)
    parts = soft_label_loss(digits, label) + mass_penalty(digits)
    torch.testing.assert_close(parts, whole)
    assert bool((mass_penalty(digits) >= 0).all())


def test_the_mass_penalty_says_nothing_about_the_score() -> None:
    digits = shares(0).log()
    torch.testing.assert_close(mass_penalty(digits), vector(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(mass_penalty(digits - 2), vector(2))
    torch.testing.assert_close(expected_score(digits - 2), expected_score(digits))


@given(means, means, st.floats(-2, 2))
def test_the_two_orders_of_a_pair_share_one_probability(one: float, two: float, s: float) -> None:
    scale = torch.tensor(s).double()
    there, back = (pair_loss(vector(a), vector(b), scale) for a, b in ((one, two), (two, one)))
    torch.testing.assert_close((-there).exp() + (-back).exp(), vector(1))
    torch.testing.assert_close(back - there, scale.exp() * vector(one - two))


def test_labels_and_targets_are_constants() -> None:
    leaf, label = normals(2, 5).requires_grad_(), shares(1, 2).requires_grad_()
    target = vector(2, 3).requires_grad_()
    total = soft_label_loss(leaf, label) + ordinal_loss(leaf, label)
    (total + expected_score_loss(leaf, target)).sum().backward()
    assert label.grad is None and target.grad is None and leaf.grad is not None


@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_finite_differences(seed: int) -> None:
    logits, label = normals(3, 5, seed=seed).requires_grad_(), shares(seed, 3)
    target = vector(1.5, 3, 4.9)
    for loss in (
        expected_score,
        lambda x: expected_score_loss(x, target),
        lambda x: soft_label_loss(x, label),
        lambda x: ordinal_loss(x, label),
        lambda x: mass_penalty(x.log_softmax(dim=-1) - 1),
    ):
        assert torch.autograd.gradcheck(loss, (logits,))
    better, worse = normals(3, seed=seed).requires_grad_(), normals(3, seed=9).requires_grad_()
    scale = torch.tensor(0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(pair_loss, (better, worse, scale))
