"""What a judge is asked, and how its answer becomes a score; no model, no network.

A judge reasons in words, writes one marker, and then one digit from 1 to 5. The score is not the
digit it wrote but the expectation over the probabilities of all five at that place (arXiv
2606.27608, section 3.1):

    s = sum_k k p_k / sum_k p_k,        mass = sum_k p_k

Pictures of one prompt mostly get the same digit, and only the expectation ranks them. Where less
than `SMALLEST_MASS` of the probability lies on the digits, the judge did not answer on the scale,
and that is a failure, not a low score. The marker is looked for among token ids, never in running
text, and must stand there exactly once.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config import ConfigError
from burnish.types import Failed, Score, Scored

SCALE = (1, 2, 3, 4, 5)
"""The scores a judge may give."""
MARKER = " <score>"
"""Stands between the reasoning and the digit. A space, because Qwen's tokenizer spells it alike
after any text; a line break would be one token with the full stop before it."""
SMALLEST_MASS = 0.9
"""Probability on the five digits below which an answer is off the scale."""


@dataclass(frozen=True)
class Rubric:
    """The instructions of one dimension: a readable file, known by its hash."""

    dimension: str
    text: str

    @classmethod
    def read(cls, path: Path) -> "Rubric":
        """A Markdown file; its name is the dimension.

        Raises:
            ConfigError: no such file, no text in it, or the marker in it.
        """
        if not path.is_file():
            raise ConfigError(f"need a rubric file, got {path}, which is no file; check the path")
        text = path.read_text(encoding="utf-8").strip()
        if not text or MARKER.strip() in text:
            raise ConfigError(
                f"need a rubric with text and without the marker {MARKER.strip()}, got {path}; "
                "fix the file"
            )
        return cls(path.stem, text)

    @property
    def digest(self) -> str:
        """Changes with every change of the text; part of the key of a cached score."""
        return hashlib.sha256(f"{self.dimension}\n{self.text}".encode()).hexdigest()[:16]


def question(rubric: Rubric, text: str, *, num_sources: int) -> list[dict[str, Any]]:
    """The user's turn as chat content: the sources of an edit, the picture, then what is asked.

    Pictures are placeholders `{"type": "image"}`, in the order sources, output; whoever sends the
    turn puts the pictures in their place. Rubrics speak of one source, so where there are several
    the words say which pictures they are.

    Args:
        rubric: the instructions.
        text: what was asked for.
        num_sources: source images of an edit; 0 is text to image.
    """
    told = f"Instruction: {text}" if num_sources else f"Prompt: {text}"
    if num_sources > 1:
        told = (
            f"You see {num_sources + 1} pictures: first {num_sources} sources, in the order in "
            f"which the instruction counts them, then the result.\n{told}"
        )
    pictures = [{"type": "image"}] * (num_sources + 1)
    return [*pictures, {"type": "text", "text": f"{rubric.text}\n{told}"}]


def control_token(text: str, tokenizer: Any) -> str | None:
    """A token in a text of somebody else that would be more to the model than words, if any."""
    known = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    return next((token for token in known if token and token in text), None)


def answer(reasoning: str, score: int) -> str:
    """What a judge should write."""
    if MARKER.strip() in reasoning:
        raise ValueError(f"need reasoning without the marker, got {MARKER.strip()} in it")
    return f"{reasoning}{MARKER}{score}"


@dataclass(frozen=True)
class Alphabet:
    """The token ids of the marker and of the five digits, in one tokenizer."""

    marker: tuple[int, ...]
    digits: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Alphabet":
        """Find them, and prove that they mean the same wherever they stand.

        Raises:
            ConfigError: a digit is not one token, or it merges with the marker before it.
        """

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        marker, digits = ids(MARKER), []
        for number in SCALE:
            alone, placed = ids(str(number)), ids(f"{MARKER}{number}")
            if len(alone) != 1 or placed != (*marker, *alone):
                raise ConfigError(
                    f"need a tokenizer with one token for the digit {number}, also after the "
                    f"marker, got {len(alone)} alone and {len(placed) - len(marker)} after it; "
                    "choose a judge of the Qwen-VL line"
                )
            digits.append(alone[0])
        return cls(marker, tuple(digits))

    def place_of_digit(self, ids: Sequence[int]) -> int | Failed:
        """Index of the token after the one marker in an answer."""
        width = len(self.marker)
        places = [
            start
            for start in range(len(ids) - width + 1)
            if tuple(ids[start : start + width]) == self.marker
        ]
        if len(places) != 1:
            return Failed(reason=f"need one score marker in the answer, got {len(places)}")
        place = places[0] + width
        if place >= len(ids):
            return Failed(reason="the answer was cut off before its score")
        return place


@dataclass(frozen=True)
class Calibration:
    """A monotone map of raw scores, fitted on held-out annotations and kept with the judge.

    Linear between its knots and flat beyond them; without knots it changes nothing.
    """

    raw: tuple[float, ...] = ()
    calibrated: tuple[float, ...] = ()

    def __call__(self, score: float) -> float:
        """The calibrated score."""
        if not self.raw:
            return score
        return float(np.interp(score, self.raw, self.calibrated))


def read_score(log_probs: Mapping[int, float], calibration: Calibration) -> Score:
    """The score of one answer from the log-probabilities at the digit's place.

    Args:
        log_probs: digit -> natural logarithm of its probability among all tokens.
        calibration: of the judge.

    Returns:
        `Scored` with `raw`, `mass` and `entropy` (nats, of the five digits alone) in its detail;
        `Failed` where a digit is missing, a value is not a log-probability, or the mass is small.
    """
    missing = [number for number in SCALE if number not in log_probs]
    if missing:
        return Failed(reason=f"need the probabilities of all five digits, got none of {missing}")
    values = [float(log_probs[number]) for number in SCALE]
    if any(math.isnan(value) or value > 1e-3 for value in values):
        return Failed(reason=f"need log-probabilities of at most 0, got {values}")
    probabilities = np.exp(np.asarray(values, dtype=np.float64))
    mass = float(probabilities.sum())
    if mass < SMALLEST_MASS:
        return Failed(
            reason=f"need {SMALLEST_MASS:g} of the probability on the digits, got {mass:.3g}"
        )
    if mass > 1 + 1e-3:
        return Failed(reason=f"need probabilities that sum to at most 1, got {mass:.4g}")
    shares = probabilities / mass
    raw = float(shares @ np.asarray(SCALE, dtype=np.float64))
    entropy = float(-(shares * np.log(np.maximum(shares, 1e-12))).sum())
    return Scored(
        value=calibration(raw), detail={"raw": raw, "mass": mass, "entropy": max(entropy, 0.0)}
    )
