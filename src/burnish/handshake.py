"""One question to a served judge, and the handshake that comes before the first one.

The handshake finds out what no later reply tells: that the server has the model, that each digit is
one token in its tokenizer, which form of question it honours, and what the judge says of one golden
picture. Servers ignore fields they do not know, so a form counts as honoured only when it led to a
score. The agreement is kept; `Agreed.differs` compares it with a later one, because a server that
was restarted under the same name may hold another judge.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
from PIL import Image
from pydantic import Field

from burnish import images
from burnish.config import Config, ConfigError
from burnish.endpoint import Endpoint, Refused
from burnish.judging import MARKER, SCALE, Alphabet, Calibration, Rubric, read_score
from burnish.protocol import (
    Answer,
    Asking,
    ChatReply,
    ChatRequest,
    Message,
    encoded,
    ladder,
    read_digit,
    read_reasoning,
    read_reply,
    read_whole,
    turn,
)
from burnish.types import MAX_SOURCES, Failed, Prompt, Score, Scored, ScoreRequest
from burnish.wording import nearest


class Golden(Config):
    """The picture by which a judge is known again."""

    image: str | None = None
    """A file; None draws a plain gradient."""
    sources: tuple[str, ...] = Field(default=(), max_length=MAX_SOURCES)
    """The files that `image` was edited from, for judges that only know edits; as many as prompts
    have show before a run that the server takes so many pictures."""
    prompt: str = "a smooth gradient from dark to bright"
    score: float | None = None
    """What the judge must say of it; None takes its first word as right."""
    tolerance: float = Field(default=0.05, ge=0)
    """Largest difference between two scores of it."""

    def request(self) -> ScoreRequest:
        """The picture as something to be scored.

        Raises:
            ConfigError: a file is no picture.
        """
        try:
            picture = _gradient() if self.image is None else images.read(self.image)
            sources = tuple(images.encode_png(images.read(path)) for path in self.sources)
        except images.ImageError as error:
            raise ConfigError(str(error)) from None
        task = "edit" if sources else "t2i"
        prompt = Prompt(id="golden", text=self.prompt, task=task, sources=sources)
        return ScoreRequest(prompt=prompt, image=images.to_tensor(picture))


class Deadline:
    """The moment by which all that belongs to one call must be over."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.until = time.monotonic() + seconds
        """On the clock of `time.monotonic`."""

    def timeout(self) -> asyncio.Timeout:
        """A context that raises TimeoutError at that moment, whenever it is entered."""
        return asyncio.timeout(max(self.until - time.monotonic(), 0.0))

    def __str__(self) -> str:
        return f"the deadline of {self.seconds:g} s passed before an answer"


@dataclass(frozen=True)
class Agreed:
    """What a handshake found out."""

    asking: Asking
    golden: float
    """The calibrated score of the golden picture."""
    answers_as: str
    """The model's name in replies, which may be another one than it is asked by."""

    def differs(self, before: "Agreed", tolerance: float) -> str:
        """What shows that this is another judge than before; empty where nothing does."""
        if (self.asking, self.answers_as) != (before.asking, before.answers_as):
            return "it has another tokenizer or name, or honours another form"
        if abs(self.golden - before.golden) > tolerance:
            return f"the golden picture has {self.golden:.3f}, not {before.golden:.3f}"
        return ""


@dataclass(frozen=True)
class Line:
    """A connection to one judge, inside one event loop."""

    endpoint: Endpoint
    client: httpx.AsyncClient
    until: float
    """The deadline, on the clock of `time.monotonic`."""

    async def answer(
        self, asking: Asking, asked: Message, seed: int
    ) -> tuple[Answer | Failed, str]:
        """The judge's answer, and the model that the last reply names (empty where none does).

        Raises:
            Unanswered: no reply could be had.
            ConfigError: the server does not take the request.
        """
        reasoning = ""
        if asking.form != "bare":
            reply = await self._reply(asking.answer(asked, seed))
            if isinstance(reply, Failed):
                return reply, ""
            if asking.form == "whole" and asking.alphabet is not None:
                return read_whole(reply, asking.alphabet), reply.model
            found = read_reasoning(reply)
            if isinstance(found, Failed):
                return found, reply.model
            reasoning = found
        reply = await self._reply(asking.digit(asked, reasoning, seed))
        if isinstance(reply, Failed):
            return reply, ""
        return read_digit(reply, reasoning, asking.alphabet), reply.model

    async def score(
        self, asking: Asking, asked: Message, calibration: Calibration
    ) -> tuple[Score, list[str]]:
        """The score that an answer stands for or, where that cannot be read, another one; and the
        models that the replies name, as in `answer`.

        Raises:
            Unanswered, ConfigError: as `answer`.
        """
        answer, name = await self.answer(asking, asked, seed=0)
        score, names = scored(answer, calibration), [name]
        if not isinstance(score, Scored):
            answer, name = await self.answer(asking, asked, seed=1)
            score, names = scored(answer, calibration), [*names, name]
        return score, names

    async def _reply(self, request: ChatRequest) -> ChatReply | Failed:
        data = await self.call("/v1/chat/completions", request.body())
        return data if isinstance(data, Failed) else read_reply(data)

    async def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """`Endpoint.call` with what belongs to this line."""
        return await self.endpoint.call(self.client, path, body, until=self.until)


async def find_model(line: Line, model: str) -> None:
    """Look whether a server has a model.

    Raises:
        ConfigError: it has others.
        Unanswered: the server does not answer.
    """
    listed = await line.call("/v1/models")
    entries = listed.get("data") if isinstance(listed, dict) else None
    known = [
        str(entry.get("id"))
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]
    if model not in known:
        hint = nearest(model, known)
        advice = f"did you mean {hint!r}?" if hint else "correct `model` or `url`"
        names = ", ".join(known)[:200] or "no model"
        raise ConfigError(f"need the model {model!r} on {line.endpoint.url}, got {names}; {advice}")


def scored(answer: Answer | Failed, calibration: Calibration) -> Score:
    """The score that an answer stands for, with its reasoning as the note."""
    if isinstance(answer, Failed):
        return answer
    score = read_score(answer.log_probs, calibration)
    return replace(score, note=answer.reasoning) if isinstance(score, Scored) else score


@dataclass(frozen=True)
class Handshake:
    """What is asked of every server before it is trusted."""

    model: str
    rubric: Rubric
    golden: Golden
    calibration: Calibration
    is_reasoning: bool
    max_tokens: int
    temperature: float

    async def shake(self, line: Line) -> Agreed:
        """Agree with the server on everything, or say what is missing.

        Raises:
            ConfigError: the model, the digits or the golden score are not as they should be.
            Unanswered: the server does not answer.
        """
        await find_model(line, self.model)
        agreed = await self._score_golden(line, await self._alphabet(line))
        expected, tolerance = self.golden.score, self.golden.tolerance
        if expected is not None and abs(agreed.golden - expected) > tolerance:
            raise ConfigError(
                f"need {expected:g} within {tolerance:g} for the golden picture, got "
                f"{agreed.golden:.3f}; serve the judge that was meant, or correct `golden.score`"
            )
        return agreed

    async def _alphabet(self, line: Line) -> Alphabet | None:
        """The tokens of marker and digits; None where the server has no tokenizer to ask."""
        ids: dict[str, list[int]] = {}
        for text in (MARKER, *map(str, SCALE), *(f"{MARKER}{number}" for number in SCALE)):
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            try:
                told = await line.call("/tokenize", body)
            except Refused as error:
                if error.status in (404, 405):
                    return None
                raise
            tokens = told.get("tokens") if isinstance(told, dict) else None
            if not isinstance(tokens, list) or not all(isinstance(n, int) for n in tokens):
                raise ConfigError(
                    f"need token ids from {line.endpoint.url}/tokenize, got something else; "
                    "serve the judge with vLLM or with Burnish"
                )
            ids[text] = tokens
        return Alphabet.of(lambda text, add_special_tokens: {"input_ids": ids[text]})

    async def _score_golden(self, line: Line, alphabet: Alphabet | None) -> Agreed:
        """The golden picture, read in the best form that works on this server."""
        request = self.golden.request()
        asked = turn(self.rubric, request.prompt, encoded(request))
        refused: list[str] = []
        has_ids = alphabet is not None
        for form, digits in ladder(is_reasoning=self.is_reasoning, has_ids=has_ids):
            asking = Asking(self.model, form, digits, alphabet, self.max_tokens, self.temperature)
            try:
                score, names = await line.score(asking, asked, self.calibration)
            except Refused as error:
                # A server may refuse the fields of one form and take those of the next.
                if error.status not in (400, 422):
                    raise
                refused.append(f"{form}, {digits}: {error}")
                continue
            if isinstance(score, Scored):
                return Agreed(asking, score.value, names[-1])
            refused.append(f"{form}, {digits}: {score.reason}")
        raise ConfigError(
            f"need a judge that scores the golden picture, got {' | '.join(refused)}; serve a "
            "judge that writes the marker and one digit, or choose another `golden.image`"
        )


def _gradient() -> Image.Image:
    """The same square of 64 pixels everywhere."""
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    return Image.fromarray(np.stack([across, down, np.full_like(across, 128)], axis=-1))
