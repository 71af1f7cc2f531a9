"""Losses of a judge at the place of its digit; no model, no settings.

A judge gives five logits, one for each score from 1 to 5, and is read by their expectation. What
raters say of a picture has a spread, so the label may be a distribution over the five; which of
the losses below serves best is a question for a study, and they share one shape so that they can
be exchanged: a number per row, of which the caller takes the mean.

The five logits are normalised among themselves. How much probability lies on them at all, among
all tokens, is the business of `mass_penalty` alone: the soft-label loss and the mass penalty add up
to the plain cross-entropy over the vocabulary. Gradient reaches logits, scores and `log_scale`;
labels and targets are constants.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

FiveLogits = Float[Tensor, "batch 5"]
"""Logits of the digits 1 to 5, up to a constant per row; log-probabilities will do."""
FiveShares = Float[Tensor, "batch 5"]
"""Probabilities of the scores 1 to 5."""
PerRow = Float[Tensor, " batch"]
"""One number per row."""

SMALLEST_STD = 0.1
"""Spread below which a binned Gaussian would underflow, and the label is an interpolation."""

_STEEPEST = 64.0
"""Largest tilt per score: it takes any binned Gaussian to one end of the scale."""


def _float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _scores(like: Tensor) -> Tensor:
    return torch.arange(1, 6, dtype=like.dtype, device=like.device)


def expected_score(logits: FiveLogits) -> PerRow:
    """The score of a judge: the expectation over its five digits.

        s = sum_k k p_k,   p = softmax(logits)

    Args:
        logits: of the digits 1 to 5.

    Returns:
        Scores in [1, 5].

    Reference: arXiv:2606.27608, section 3.1 (the read-out of the pointwise reward).

    >>> expected_score(torch.zeros(1, 5)).round(decimals=4)
    tensor([3.])
    """
    shares = _float32(logits).softmax(dim=-1)
    return shares @ _scores(shares)


def expected_score_loss(logits: FiveLogits, target: PerRow) -> PerRow:
    """Squared error of the expected score, per row.

        loss = (s - y)^2,   s = sum_k k p_k

    Args:
        logits: of the digits 1 to 5.
        target: y, the mean over raters, from 1 to 5.

    Reference: arXiv:2606.27608, section 3.1 (the pointwise objective).

    >>> expected_score_loss(torch.zeros(1, 5), torch.tensor([5.0])).round(decimals=4)
    tensor([4.])
    """
    return (expected_score(logits) - _float32(target.detach())) ** 2


def soft_label(mean: PerRow, std: PerRow) -> FiveShares:
    """What raters of some mean and spread would say: a distribution over the five scores.

    A Gaussian is cut into bins, the ends taking the tails, and tilted until its mean is right:

        b_k = P(k - 1/2 < x < k + 1/2),   x ~ N(mean, std^2)
        q_k = b_k exp(theta k) / sum_j b_j exp(theta j),   theta such that sum_k k q_k = mean

    Of all distributions with the mean, q is the one nearest to b in Kullback-Leibler divergence,
    and it is never negative. Below `SMALLEST_STD` it is the interpolation between the two whole
    scores around the mean, which is also what q tends to as the spread falls.

    Args:
        mean: over raters, from 1 to 5.
        std: between raters, in points; 0 where it is not known.

    Raises:
        ValueError: a mean outside [1, 5], or a negative or infinite std.

    Reference: DeQA-Score, arXiv:2501.11561, section 3, which shifts and scales the bins instead of
    tilting them; close to the ends of the scale that can leave negative shares.

    >>> soft_label(torch.tensor([2.25]), torch.tensor([0.0]))
    tensor([[0.0000, 0.7500, 0.2500, 0.0000, 0.0000]])
    >>> soft_label(torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([[0.0013, 0.1573, 0.6827, 0.1573, 0.0013]])
    """
    if not bool(((mean >= 1) & (mean <= 5) & (std >= 0) & std.isfinite()).all()):
        raise ValueError(
            f"need means in [1, 5] and finite std of at least 0, got {mean.tolist()} and "
            f"{std.tolist()}; rescale the scores"
        )
    # In double precision, because far bins hold almost nothing and the tilt must still find them.
    centre, spread = mean.detach().double()[:, None], std.detach().double()[:, None]
    scores = _scores(centre)
    between = (1 - (scores - centre).abs()).clamp_min(0)
    edges = torch.cat([scores[:1] - torch.inf, scores[:-1] + 0.5, scores[-1:] + torch.inf])
    below = torch.special.ndtr((edges - centre) / spread.clamp_min(SMALLEST_STD))
    tilted = _tilted(below.diff(dim=1), centre)
    return torch.where(spread < SMALLEST_STD, between, tilted).to(_float32(mean).dtype)


def _tilted(bins: Tensor, mean: Tensor) -> Tensor:
    """Bins times exp(theta k), normalised; theta by bisection, as the mean rises with it."""
    scores, log_bins = _scores(bins), bins.log()
    low, high = torch.full_like(mean, -_STEEPEST), torch.full_like(mean, _STEEPEST)
    for _ in range(64):
        middle = (low + high) / 2
        found = (log_bins + middle * scores).softmax(dim=1) @ scores[:, None]
        low, high = torch.where(found < mean, middle, low), torch.where(found < mean, high, middle)
    return (log_bins + (low + high) / 2 * scores).softmax(dim=1)


def soft_label_loss(logits: FiveLogits, label: FiveShares) -> PerRow:
    """Cross-entropy between a label over the five scores and the judge, per row.

        loss = -sum_k q_k log p_k

    The label is a constant, so the gradient is that of the Kullback-Leibler divergence.

    Args:
        logits: of the digits 1 to 5.
        label: q, see `soft_label`.

    Reference: DeQA-Score, arXiv:2501.11561, which takes the divergence.

    >>> soft_label_loss(torch.zeros(1, 5), torch.full((1, 5), 0.2))
    tensor([1.6094])
    """
    return -(label.detach() * _float32(logits).log_softmax(dim=-1)).sum(dim=-1)


def ordinal_loss(logits: FiveLogits, label: FiveShares) -> PerRow:
    """Squared distance of the cumulative distributions, per row: a miss by two costs more than one.

        loss = sum_{k=1..4} (P_k - Q_k)^2,   P_k = p_1 + ... + p_k

    For a label on one score this is the ranked probability score, the discrete form of CRPS, and a
    proper score: in expectation over raters it is least where p is the raters' distribution.

    Args:
        logits: of the digits 1 to 5.
        label: q, see `soft_label`.

    Reference: Epstein, J. Appl. Meteorol. 8 (1969), 985; Gneiting and Raftery, JASA 102 (2007),
    359, section 4.2.

    >>> ends = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    >>> ordinal_loss(100 * ends, ends.flip(0))
    tensor([4., 4.])
    """
    shares = _float32(logits).softmax(dim=-1)
    return ((shares - label.detach()).cumsum(dim=-1)[..., :-1] ** 2).sum(dim=-1)


def mass_penalty(log_probs: Float[Tensor, "batch 5"]) -> PerRow:
    """Keeps the probability at the digit's place on the five digits, per row.

        loss = -log sum_k P(k),   P(k) the probability of digit k among all tokens

    Args:
        log_probs: logarithm of P(k), normalised over the whole vocabulary.

    Reference: DeQA-Score, arXiv:2501.11561, keeps the mass by a next-token loss; this is the part
    of it that says nothing about the score.

    >>> mass_penalty(torch.full((1, 5), 0.1).log())
    tensor([0.6931])
    """
    return -_float32(log_probs).logsumexp(dim=-1)


def pair_loss(better: PerRow, worse: PerRow, log_scale: Float[Tensor, ""]) -> PerRow:
    """Negative log-likelihood of a preference under Bradley and Terry, per pair.

        loss = -log sigmoid(exp(log_scale) * (s_better - s_worse))

    Expected scores differ by a point or two where raters agree wholly, so the scale has to be
    learnt: with 1 the loss would push good pictures to 5 and bad ones to 1, right or not.

    Args:
        better: score of the preferred picture of each pair.
        worse: score of the other one.
        log_scale: logarithm of the logit that one point of difference is worth.

    Reference: Bradley and Terry, Biometrika 39 (1952), 324; arXiv:2606.27608, section 3.1 (the
    pairwise objective, without a scale).

    >>> pair_loss(torch.tensor([4.0]), torch.tensor([3.0]), torch.tensor(0.0))
    tensor([0.3133])
    """
    lead = _float32(better) - _float32(worse)
    return functional.softplus(-log_scale.exp() * lead)
