"""One contract for every reward on the shelf, and for the rubric that joins them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from burnish.config import located, shelf
from burnish.prompts import read_prompts
from burnish.rewards.base import AsyncRubric, Reward, RewardConfig, Rubric, scored_values
from burnish.rewards.oracle import OracleConfig
from burnish.types import (
    Failed,
    Group,
    NotApplicable,
    Prompt,
    Score,
    Scored,
    ScoreRequest,
    Trajectory,
)

CONFIGS = shelf("burnish.rewards", RewardConfig)
PROMPTS = read_prompts(located("embedded:prompts/held-out.jsonl"))
SOME = [*PROMPTS[:6], *PROMPTS[-6:]]


def requests(prompts: Sequence[Prompt], seed: int = 0) -> list[ScoreRequest]:
    draws = torch.Generator().manual_seed(seed)
    return [
        ScoreRequest(prompt=prompt, image=torch.rand(3, 64, 64, generator=draws))
        for prompt in prompts
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
class TestEveryReward:
    def test_one_score_for_each_request_finite_or_named(self, config: type[RewardConfig]) -> None:
        for score in config().build().score(requests(SOME)):
            if isinstance(score, Scored):
                assert abs(score.value) < float("inf")
            else:
                assert score.reason

    def test_order_and_batching_change_nothing(self, config: type[RewardConfig]) -> None:
        reward, asked = config().build(), requests(SOME)
        whole = reward.score(asked)
        assert reward.score(asked[::-1]) == whole[::-1]
        assert [reward.score([request])[0] for request in asked] == whole

    def test_an_image_that_is_not_finite_fails_by_name(self, config: type[RewardConfig]) -> None:
        request = replace(requests(SOME[:1])[0], image=torch.full((3, 64, 64), torch.nan))
        assert isinstance(config().build().score([request])[0], Failed)


def test_the_oracle_has_no_say_without_facts() -> None:
    request = requests([Prompt(id="plain", text="a red circle")])[0]
    assert isinstance(OracleConfig().build().score([request])[0], NotApplicable)


def group(prompt: Prompt, size: int = 3) -> Group:
    empty = torch.zeros(0)
    steps = torch.zeros(0, 2, 2)
    trajectories = tuple(
        Trajectory(
            seed=number,
            latents=steps,
            next_latents=steps,
            sigmas=empty,
            sigmas_next=empty,
            noise=steps,
            guided=steps,
            conditional=steps,
            clean=torch.zeros(2, 2),
            image=torch.full((3, 64, 64), 0.1 * number),
        )
        for number in range(size)
    )
    return Group(prompt=prompt, trajectories=trajectories)


class Brightness(Reward):
    """The mean of the image; fails where it is black."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        means = [float(request.image.mean()) for request in requests]
        return [Scored(value=m) if m > 0 else Failed(reason="black") for m in means]


def rubric() -> Rubric:
    configs = {
        "all": OracleConfig(),
        "portraits": OracleConfig(weights={"portrait": 2.0, "default": 0.0}),
    }
    return Rubric(configs, {"all": Brightness(), "portraits": Brightness()})


def test_a_rubric_asks_a_reward_only_where_it_has_weight() -> None:
    prompts = [replace(PROMPTS[0], id="p", category="portrait"), replace(PROMPTS[0], id="g")]
    portrait, other = rubric().score([group(prompt) for prompt in prompts])
    assert set(portrait.scores) == {"all", "portraits"}
    assert set(other.scores) == {"all"}


def test_a_failure_stays_a_failure_in_its_place() -> None:
    (scored,) = rubric().score([group(PROMPTS[0])])
    assert isinstance(scored.scores["all"][0], Failed)
    assert scored_values(scored.scores["all"]) == [None, pytest.approx(0.1), pytest.approx(0.2)]


def test_asynchronous_scores_are_those_of_one_call() -> None:
    groups = [group(prompt) for prompt in SOME]
    expected = {g.prompt.id: g.scores for g in rubric().score(groups)}
    with AsyncRubric(rubric(), workers=3) as scorer:
        for start in range(0, len(groups), 2):
            scorer.submit(groups[start : start + 2])
        collected = scorer.collect()
    assert {name: g.scores for name, g in collected.items()} == expected


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="need weights of at least 0"):
        OracleConfig(weights={"default": -1.0})
