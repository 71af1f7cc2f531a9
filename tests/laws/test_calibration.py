"""What a reward has to say is found where it was planted."""

from typing import Any

import numpy as np
import pytest

from burnish.calibration import calibrate, correlation, loudness, propose
from burnish.rewards.base import check_weights
from burnish.rewards.oracle import OracleConfig

CONFIGS = {
    "alignment": OracleConfig(
        dimension="alignment", floor=0.1, weights={"default": 0.6, "typography": 0.8}
    ),
    "quality": OracleConfig(dimension="quality", floor=0.1, weights={"default": 0.4}),
}


def rows(
    category: str, alignment: float, quality: float, count: int = 300, rho: float = 0.0
) -> list[dict[str, Any]]:
    """Groups of 16 whose rewards have these standard deviations; group means differ wildly."""
    rng = np.random.default_rng(len(category))
    found = []
    for number in range(count):
        x, y = rng.normal(size=(2, 16))
        y = rho * x + (1 - rho**2) ** 0.5 * y
        offset = rng.normal(0, 10)
        found.append(
            {
                "prompt": f"{category}-{number}",
                "category": category,
                "scores": {
                    "alignment": list(offset + alignment * x),
                    "quality": list(quality * y - offset),
                },
            }
        )
    return found


@pytest.mark.parametrize("spread", [0.11, 0.2, 1.0])
def test_spread_inside_groups_is_measured_whatever_their_means(spread: float) -> None:
    found = loudness(rows("general", spread, 1.0), "alignment", 0.1)
    assert found is not None
    assert found.spread == pytest.approx(spread, rel=0.03)
    assert found.signal == pytest.approx(max(0, 1 - 0.01 / found.spread**2))
    assert found.missing == 0 and found.prompts == 300


def test_what_failed_has_no_say_and_is_counted() -> None:
    some = rows("general", 1.0, 1.0, count=20)
    for row in some:
        row["scores"]["alignment"][0] = None
    found = loudness(some, "alignment", 0.1)
    assert found is not None and found.missing == pytest.approx(1 / 16)
    for row in some:
        row["scores"]["alignment"] = [None] * 16
    assert loudness(some, "alignment", 0.1) is None
    assert loudness(some, "portrait", 0.1) is None


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.9])
def test_rewards_that_go_together_are_found_inside_groups(rho: float) -> None:
    """Between groups these rewards are opposites, which is no answer to the question."""
    assert correlation(rows("general", 1.0, 3.0, rho=rho), "alignment", "quality") == pytest.approx(
        rho, abs=0.05
    )
    assert correlation(rows("general", 0.0, 1.0, count=9), "alignment", "portrait") is None


def test_how_rewards_go_together_is_told_for_each_category() -> None:
    some = [*rows("general", 1.0, 1.0, rho=0.9), *rows("typography", 1.0, 1.0, rho=-0.5)]
    found = calibrate(some, CONFIGS)["correlation"]
    planted = {"all": 0.2, "general": 0.9, "typography": -0.5}
    assert {name: pairs["alignment quality"] for name, pairs in found.items()} == pytest.approx(
        planted, abs=0.05
    )


def test_weights_sum_to_one_and_what_is_heard_keeps_its_own() -> None:
    loud = propose([*rows("general", 1.0, 1.0), *rows("typography", 1.0, 1.0)], CONFIGS)
    assert loud["general"] == pytest.approx({"alignment": 0.6, "quality": 0.4}, abs=0.01)
    assert loud["typography"] == pytest.approx({"alignment": 2 / 3, "quality": 1 / 3}, abs=0.01)


def test_a_reward_without_a_signal_is_turned_down() -> None:
    # A spread of half the floor is noise: nothing is left.
    found = propose(rows("general", 0.05, 1.0), CONFIGS)
    assert found["general"] == {"alignment": 0.0, "quality": 1.0}
    # A spread of twice the floor is three quarters signal.
    found = propose(rows("general", 0.2, 100.0), CONFIGS)
    assert found["general"]["alignment"] == pytest.approx(0.45 / 0.85, abs=0.02)


def test_a_category_that_says_nothing_keeps_the_recipe() -> None:
    few = propose(rows("general", 0.05, 1.0, count=7), CONFIGS)
    silent = propose(rows("general", 0.01, 0.01), CONFIGS)
    assert few == silent == {"general": {"alignment": 0.6, "quality": 0.4}}


def two_tasks(alignment: float, instruction: float) -> list[dict[str, Any]]:
    """Groups of two tasks that share a reward; the others speak on one task each."""
    drawn = rows("general", alignment, 1.0, count=40)
    edits = rows("general", instruction, 1.0, count=40)
    for row in edits:
        row["scores"]["instruction"] = row["scores"].pop("alignment")
    return [*drawn, *edits]


def test_what_is_proposed_for_two_tasks_is_what_a_recipe_takes() -> None:
    shared = {
        "alignment": CONFIGS["alignment"].model_copy(update={"tasks": ("t2i",)}),
        "instruction": OracleConfig(
            dimension="instruction", tasks=("edit",), floor=0.1, weights={"default": 0.6}
        ),
        "quality": CONFIGS["quality"],
    }
    found = propose(two_tasks(1.0, 1.0), shared)["general"]
    taken = {
        name: config.model_copy(update={"weights": {"default": found[name]}})
        for name, config in shared.items()
    }
    check_weights(taken, ("t2i", "edit"))
    assert found == pytest.approx({"alignment": 0.6, "instruction": 0.6, "quality": 0.4}, abs=0.01)
    # Half of what is heard of one task alone, and no weight of the shared reward is right for both.
    assert propose(two_tasks(0.14, 1.0), shared) == {}
    # Nor where there are prompts of the one task alone: the other shares the reward all the same.
    assert propose(two_tasks(0.14, 1.0)[:40], shared) == {}
    assert propose(two_tasks(1.0, 1.0)[:40], shared)["general"] == pytest.approx(found, abs=0.01)


def test_a_reward_that_failed_keeps_its_weight() -> None:
    """Nothing was heard of it, which is not that it says nothing."""
    some = rows("general", 1.0, 1.0, count=20)
    for number, row in enumerate(some):
        if number > 3:
            row["scores"]["quality"] = [None] * 16
    assert propose(some, CONFIGS)["general"] == pytest.approx(
        {"alignment": 0.6, "quality": 0.4}, abs=0.01
    )
