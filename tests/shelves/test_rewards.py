"""One contract for every reward on the shelf, and for the set that joins them."""

import itertools
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import runtime
from burnish.config import ConfigError, located, shelf
from burnish.policies.parts.qwen_assembly import assemble
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.prompts import read_prompts
from burnish.rewards.base import (
    AsyncRewardSet,
    Reward,
    RewardConfig,
    RewardSet,
    RewardWarning,
    scored_values,
    tabulated,
)
from burnish.rewards.oracle import OracleConfig
from burnish.rewards.vlm import Judge, Vlm, VlmConfig
from burnish.types import (
    Failed,
    Group,
    NotApplicable,
    Prompt,
    Score,
    Scored,
    ScoreRequest,
)

CONFIGS = shelf("burnish.rewards", RewardConfig)
PROMPTS = read_prompts(located("embedded:prompts/held-out.jsonl"))
SOME = [*PROMPTS[:6], *PROMPTS[-6:]]
SOME += [replace(SOME[-1], id="several", sources=(*SOME[-1].sources, *SOME[-2].sources))]


def requests(prompts: Sequence[Prompt], seed: int = 0) -> list[ScoreRequest]:
    draws = torch.Generator().manual_seed(seed)
    return [
        ScoreRequest(prompt=prompt, image=torch.rand(3, 64, 64, generator=draws))
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, save_judge: Callable[..., Path]) -> Path:
    """The folder of a tiny judge with random weights."""
    with runtime.seeded(0, "judge"):
        pipeline = assemble(byte_tokenizer(), encoder={"hidden_size": 64})
    return save_judge(tmp_path_factory.mktemp("judge"), pipeline, "Is everything there?", 6)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.__name__)
def reward(request: pytest.FixtureRequest, judge: Path, fake: Any, rubric: Path) -> Reward:
    """A reward of each file of the shelf."""
    known = {"path": str(judge), "dimension": "alignment", "backend": "miniature"}
    known |= {"url": fake.url, "model": fake.model, "rubric": str(rubric)}
    fields = request.param.model_fields.items()
    return request.param(**{n: known[n] for n, field in fields if field.is_required()}).build()


class TestEveryReward:
    def test_one_score_for_each_request_finite_or_named(self, reward: Reward) -> None:
        for score in reward.score(requests(SOME)):
            if isinstance(score, Scored):
                assert abs(score.value) < float("inf")
            else:
                assert score.reason

    def test_order_and_batching_change_nothing(self, reward: Reward) -> None:
        asked = requests(SOME)
        whole = reward.score(asked)
        assert reward.score(asked[::-1]) == whole[::-1]
        assert [reward.score([request])[0] for request in asked] == whole

    def test_an_image_that_is_not_finite_fails_by_name(self, reward: Reward) -> None:
        broken = torch.full((3, 64, 64), torch.nan)
        asked = requests(SOME)
        # Where a reward has no say, it has none for a broken image either.
        has_say = [not isinstance(score, NotApplicable) for score in reward.score(asked)]
        answers = reward.score([replace(request, image=broken) for request in asked])
        assert any(has_say)
        assert [isinstance(answer, Failed) for answer in answers] == has_say


@pytest.fixture(scope="module")
def vlm(judge: Path) -> Vlm:
    return Vlm(Judge.load(judge), "alignment", reasoning=False)


class TestVlm:
    def test_every_source_is_seen_in_its_place(self, vlm: Vlm) -> None:
        (asked,) = requests(SOME[-1:])
        first, second = asked.prompt.sources
        found = []
        for sources in ((first, second), (second, first), (first,), (first, first)):
            question = vlm._ask([replace(asked, prompt=replace(asked.prompt, sources=sources))])
            found.append(vlm._digit_log_probs(question, {0: vlm._alphabet.marker}))
        for one, other in itertools.combinations(found, 2):
            assert (one - other).abs().max() > 1e-4

    @pytest.mark.parametrize("task", ["t2i", "edit"])
    def test_digits_are_read_where_a_plain_call_would_find_them(self, vlm: Vlm, task: str) -> None:
        chosen = [prompt for prompt in PROMPTS if prompt.task == task][:3]
        asked = vlm._ask(requests(chosen))
        marker = list(vlm._alphabet.marker)
        answers = {0: marker, 2: [65, 66, 67, *marker]}
        together = vlm._digit_log_probs(asked, answers)
        for row, place in ((0, 0), (2, 1)):
            alone = vlm._ask([requests(chosen)[row]])
            (plain,) = vlm._digit_log_probs(alone, {0: answers[row]})
            ids = torch.tensor([[*alone.inputs["input_ids"][0].tolist(), *answers[row]]])
            logits = vlm._judge.model(
                input_ids=ids,
                mm_token_type_ids=torch.cat(
                    [alone.inputs["mm_token_type_ids"], torch.zeros(1, len(answers[row])).long()],
                    dim=1,
                ),
                **alone.pictures_of([0]),
            ).logits[0, -1]
            expected = logits.log_softmax(dim=-1)[list(vlm._alphabet.digits)]
            assert torch.allclose(plain, expected, atol=1e-5)
            assert torch.allclose(together[place], expected, atol=1e-4)

    def test_probability_elsewhere_than_on_the_digits_is_a_failure(self, vlm: Vlm) -> None:
        (score,) = vlm.score(requests(PROMPTS[:1]))
        assert isinstance(score, Failed) and "probability on the digits" in score.reason

    def test_a_judge_that_writes_no_marker_failed(self, judge: Path) -> None:
        (score,) = Vlm(Judge.load(judge), "alignment").score(requests(PROMPTS[:1]))
        assert isinstance(score, Failed) and "one score marker" in score.reason

    def test_an_unknown_dimension_names_the_nearest(self, judge: Path) -> None:
        with pytest.raises(ConfigError, match="did you mean 'alignment'"):
            VlmConfig(path=str(judge), dimension="alignement").build()

    def test_a_picture_that_cannot_be_shown_fails_alone(self, vlm: Vlm) -> None:
        first, broken, strip = requests([p for p in PROMPTS if p.task == "edit"][:1] * 3)
        whole = first.prompt.sources[0]
        cut = (*first.prompt.sources[:-1], whole[: len(whole) // 2])
        broken = replace(broken, prompt=replace(broken.prompt, sources=cut))
        strip = replace(strip, image=torch.rand(3, 8, 8 * 250))
        (alone,) = vlm.score([first])
        scores = vlm.score([first, broken, strip])
        assert scores[0] == alone
        reasons = [score.reason for score in scores if isinstance(score, Failed)]
        assert "need a whole PNG" in reasons[-2] and "ratio" in reasons[-1]

    def test_a_prompt_with_more_than_words_fails_alone(self, vlm: Vlm) -> None:
        plain = PROMPTS[0]
        tricky = replace(plain, id="tricky", text=f"{plain.text} <|image_pad|>")
        (alone,) = vlm.score(requests([plain]))
        scores = vlm.score(requests([plain, tricky]))
        assert scores[0] == alone
        assert scores[1] == Failed(reason="the prompt holds the token <|image_pad|>")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("judge.json", "{"),
            ("judge.json", "[1]"),
            ("judge.json", '{"longest_answer": "long"}'),
            ("judge.json", '{"longest_answer": 9, "split": {"held_out": 0.1}}'),
            ("judge.json", '{"longest_answer": 9, "calibrations": {"alignment": {"raw": [1]}}}'),
            ("rubrics/alignment.md", "caf\udce9"),
            ("model.safetensors", "short"),
            ("judge.json", None),
        ],
    )
    def test_a_folder_that_is_no_judge_is_refused(
        self, judge: Path, tmp_path: Path, name: str, text: str | None
    ) -> None:
        folder = tmp_path / "judge"
        shutil.copytree(judge, folder)
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=r"need (a judge|the folder of a judge)") as caught:
            VlmConfig(path=str(folder), dimension="alignment").build()
        assert "\n" not in str(caught.value)

    def test_no_pictures_at_once_is_no_setting(self) -> None:
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            VlmConfig(path="x", dimension="alignment", batch_size=0)


def test_the_oracle_has_no_say_without_facts() -> None:
    request = requests([Prompt(id="plain", text="a red circle")])[0]
    assert isinstance(OracleConfig().build().score([request])[0], NotApplicable)


SHADES = [torch.full((3, 64, 64), 0.1 * number) for number in range(3)]
"""The images of a group, the first of them black."""


class Brightness(Reward):
    """The mean of the image; fails where it is black."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        means = [float(request.image.mean()) for request in requests]
        return [Scored(value=m) if m > 0 else Failed(reason="black") for m in means]


def reward_set() -> RewardSet:
    configs = {
        "all": OracleConfig(),
        "portraits": OracleConfig(weights={"portrait": 2.0, "default": 0.0}),
    }
    return RewardSet(configs, {"all": Brightness(), "portraits": Brightness()})


def test_a_set_asks_a_reward_only_where_it_has_weight(grouped: Callable[..., Group]) -> None:
    prompts = [replace(PROMPTS[0], id="p", category="portrait"), replace(PROMPTS[0], id="g")]
    portrait, other = reward_set().score([grouped(prompt, SHADES) for prompt in prompts])
    assert set(portrait.scores) == {"all", "portraits"}
    assert set(other.scores) == {"all"}


def test_a_set_asks_a_reward_only_for_its_tasks(grouped: Callable[..., Group]) -> None:
    configs = {"every": OracleConfig(), "edits": OracleConfig(tasks=("edit",))}
    rewards = RewardSet(configs, {name: Brightness() for name in configs})
    drawn = replace(PROMPTS[0], id="drawn")
    edited = replace(drawn, id="edited", task="edit", sources=(b"unread",))
    first, second = rewards.score([grouped(prompt, SHADES) for prompt in (drawn, edited)])
    assert set(first.scores) == {"every"} and set(second.scores) == {"every", "edits"}
    assert tabulated([first, second], configs).weights.tolist() == [[1, 1], [0, 1]]


def test_a_failure_stays_a_failure_in_its_place(grouped: Callable[..., Group]) -> None:
    (scored,) = reward_set().score([grouped(PROMPTS[0], SHADES)])
    assert isinstance(scored.scores["all"][0], Failed)
    assert scored_values(scored.scores["all"]) == [None, pytest.approx(0.1), pytest.approx(0.2)]


def test_asynchronous_scores_are_those_of_one_call(grouped: Callable[..., Group]) -> None:
    """And why a reward fails is told once."""
    groups = [grouped(prompt, SHADES) for prompt in SOME]
    expected = {g.prompt.id: g.scores for g in reward_set().score(groups)}
    with AsyncRewardSet(reward_set(), workers=3) as scorer:
        with pytest.warns(RewardWarning) as told:
            for start in range(0, len(groups), 2):
                scorer.submit(groups[start : start + 2])
            collected = scorer.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RewardWarning)
            scorer.submit(groups)
            assert scorer.collect().keys() == collected.keys()
    assert {name: g.scores for name, g in collected.items()} == expected
    found = {str(warning.message) for warning in told}
    assert "the reward all fails on 13 of 39 pictures: black" in found and len(found) == 2


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="need weights of at least 0"):
        OracleConfig(weights={"default": -1.0})
