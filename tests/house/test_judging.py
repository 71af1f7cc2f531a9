"""How a judge is asked and read: expectation over digits, one marker, failures by name."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.config import ConfigError
from burnish.judging import (
    MARKER,
    SCALE,
    Alphabet,
    Calibration,
    Rubric,
    answer,
    question,
    read_score,
)
from burnish.policies.parts.qwen_tokens import byte_tokenizer
from burnish.types import Failed, Scored

shares = st.lists(st.floats(0.01, 1), min_size=5, max_size=5)


def logs(values: list[float], mass: float = 1.0) -> dict[int, float]:
    total = sum(values)
    return {k: math.log(mass * v / total) for k, v in zip(SCALE, values, strict=True)}


@given(shares, st.floats(0.91, 1))
def test_the_score_is_the_expectation_whatever_the_mass(values: list[float], mass: float) -> None:
    score = read_score(logs(values, mass), Calibration())
    assert isinstance(score, Scored)
    expected = sum(k * v for k, v in zip(SCALE, values, strict=True)) / sum(values)
    assert score.value == pytest.approx(expected)
    assert score.detail["mass"] == pytest.approx(mass)
    assert 0 <= score.detail["entropy"] <= math.log(5) + 1e-9


@given(shares)
def test_more_weight_on_higher_digits_never_lowers_the_score(values: list[float]) -> None:
    raised = [*values[:-1], values[-1] + 1]
    low, high = (read_score(logs(v), Calibration()) for v in (values, raised))
    assert isinstance(low, Scored) and isinstance(high, Scored) and high.value >= low.value


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({5: None}, "all five digits"),
        ({1: math.nan}, "at most 0"),
        ({1: 0.7}, "at most 0"),
        (dict.fromkeys(SCALE, -9.0), "of the probability"),
        (dict.fromkeys(SCALE, -0.01), "sum to at most 1"),
    ],
)
def test_what_is_no_score_is_a_failure(changed: dict[int, float | None], reason: str) -> None:
    found: dict[int, float | None] = {**logs([1.0] * 5), **changed}
    score = read_score({k: v for k, v in found.items() if v is not None}, Calibration())
    assert isinstance(score, Failed) and reason in score.reason


def test_a_calibration_keeps_order_and_is_flat_beyond_its_knots() -> None:
    calibrate = Calibration((2.0, 3.0, 4.0), (1.5, 3.5, 4.5))
    assert [calibrate(x) for x in (1.0, 2.5, 5.0)] == [1.5, 2.5, 4.5]
    assert Calibration()(3.3) == 3.3


class TestTheMarker:
    alphabet = Alphabet.of(byte_tokenizer())

    def ids(self, text: str) -> list[int]:
        return byte_tokenizer()(text)["input_ids"]

    def test_the_digit_after_the_one_marker_is_found(self) -> None:
        ids = self.ids(answer("Two of 3 stars are there.", 4) + "<|im_end|>")
        place = self.alphabet.place_of_digit(ids)
        assert isinstance(place, int) and ids[place] == self.alphabet.digits[3]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("no score", "got 0"),
            (f"a{MARKER}5 b{MARKER}1", "got 2"),
            (f"a{MARKER}", "cut off"),
            ("", "got 0"),
        ],
    )
    def test_another_number_of_markers_is_a_failure(self, text: str, reason: str) -> None:
        place = self.alphabet.place_of_digit(self.ids(text))
        assert isinstance(place, Failed) and reason in place.reason

    def test_reasoning_may_not_hold_the_marker(self) -> None:
        with pytest.raises(ValueError, match="without the marker"):
            answer("I say <score>5", 5)

    def test_a_tokenizer_that_splits_digits_is_refused(self) -> None:
        class Splitting:
            def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
                return {"input_ids": [b for c in text for b in (ord(c), 0)]}

        with pytest.raises(ConfigError, match="one token for the digit 1"):
            Alphabet.of(Splitting())


def test_a_rubric_is_a_file_known_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "alignment.md"
    path.write_text("Is everything there?\n")
    rubric = Rubric.read(path)
    assert rubric.dimension == "alignment"
    parts = question(rubric, "a red star", num_sources=0)
    assert [part["type"] for part in parts] == ["image", "text"]
    assert parts[-1]["text"].endswith("Prompt: a red star")
    *pictures, words = question(rubric, "make it red", num_sources=1)
    assert len(pictures) == 2
    assert words["text"] == "Is everything there?\nInstruction: make it red"
    # Judges are trained on one source; of several they are told which pictures those are.
    *pictures, words = question(rubric, "make it red", num_sources=3)
    assert len(pictures) == 4 and "You see 4 pictures: first 3 sources" in words["text"]
    assert words["text"].endswith("Instruction: make it red")
    path.write_text("Is all there?\n")
    assert Rubric.read(path).digest != rubric.digest
    path.write_text("say <score>")
    with pytest.raises(ConfigError, match="without the marker"):
        Rubric.read(path)
    with pytest.raises(ConfigError, match="no file"):
        Rubric.read(tmp_path / "portrait.md")
