"""When gradients run away, and when they only differ from step to step."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.stability import FACTOR, WINDOW, RunawayWarning, norms, runaway, warn_of_runaway

seeds = st.integers(0, 10_000)


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(1e-3, 1e3))
def test_gradients_that_shrink_or_stay_do_not_run_away(seed: int, scale: float) -> None:
    """Whatever their size, with the spread of single steps and a spike now and then."""
    rng = np.random.default_rng(seed)
    trend = scale * np.exp(-rng.uniform(0, 2) * np.linspace(0, 1, 200))
    sizes = trend * np.exp(0.3 * rng.standard_normal(200))
    sizes[rng.choice(200, 8, replace=False)] *= 30
    assert runaway(sizes.tolist()) is None
    assert runaway((sizes * 1e-6).tolist()) == runaway(sizes.tolist())


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(3 * WINDOW, 150))
def test_growth_is_found_soon_after_it_passes_the_factor(seed: int, start: int) -> None:
    rng = np.random.default_rng(seed)
    # It grows by a tenth a step, so that it has passed the factor some windows later.
    trend = np.exp(0.1 * np.maximum(0, np.arange(300) - start))
    sizes = (trend * np.exp(0.2 * rng.standard_normal(300))).tolist()
    found = runaway(sizes)
    assert found is not None and found.times > FACTOR
    assert start < found.step <= start + np.log(FACTOR) / 0.1 + 3 * WINDOW
    # What comes later changes nothing.
    assert runaway(sizes[: found.step + 1]) == found and runaway(sizes[: found.step]) is None


def test_it_is_told_once_at_the_step_where_it_begins() -> None:
    rows = [{"policy/grad_norm": size} for size in [0.2] * 20 + [2.0] * 40]
    told = []
    for count in range(1, len(rows) + 1):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_runaway(rows[:count], "teacher")
        told += [(count, one) for one in seen]
    ((count, warning),) = told
    assert count == 30 and warning.category is RunawayWarning
    assert "teacher run away: at step 29 its gradients were 10 times" in str(warning.message)


@pytest.mark.parametrize("size", [None, 0.0])
def test_steps_without_a_gradient_do_not_count(size: float | None) -> None:
    """A step whose groups all agree, and one that taught nothing."""
    rows = [{"policy/grad_norm": size}] * 30 + [{"policy/grad_norm": 0.5}] * 30
    assert runaway(norms(rows)) is None
