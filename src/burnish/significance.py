"""Whether a difference is more than chance: resampled prompts, p-values, and many of them at once.

Prompts are the unit. All resamples draw the same prompts for both sides of a difference, so that it
is paired, and all pictures of a prompt come along with it.

Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993); Holm, A simple
sequentially rejective multiple test procedure (1979).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

MIN_COVERAGE = 0.99
"""Share of what was asked that must have an answer: what is missing is not missing at random."""
MIN_PROMPTS = 10
"""Fewer prompts make no interval, as too few resamples differ."""
POWER = 2.8
"""Standard errors that are found in four of five experiments at the level of 5 %: 1.96 + 0.84."""


def draws(num: int, resamples: int, seed: int = 0) -> Float[ndarray, "resample prompt"]:
    """How often each of `num` prompts stands in each resample.

    >>> draws(3, 4).sum(1)
    array([3., 3., 3., 3.])
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(num, np.full(num, 1 / num), size=resamples).astype(float)


def two_sided(differences: Float[ndarray, " resample"]) -> float:
    """P-value of no difference: twice the share of resamples on the other side of zero.

    It agrees with the 95 % percentile interval up to the last resample or two, and is never 0, as
    finitely many resamples do not show that. NaN where a resample has no value.

    >>> two_sided(np.array([-1.0, 1.0, 2.0]))
    1.0
    """
    if np.isnan(differences).any():
        return float("nan")
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several questions asked at once, so that the chance of any false one is kept.

    NaN is no question and stays.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    asked = [place for place, p in enumerate(p_values) if not np.isnan(p)]
    adjusted, largest = list(p_values), 0.0
    for rank, place in enumerate(sorted(asked, key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(asked) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def detectable(num_prompts: int, spread: float) -> float:
    """Least mean difference that so many prompts would show, four times in five.

    Args:
        num_prompts: measured on both sides.
        spread: standard deviation over prompts of their differences.

    >>> round(detectable(100, 25.0), 1)
    7.0
    """
    return POWER * spread / float(np.sqrt(num_prompts))
