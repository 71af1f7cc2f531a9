"""What travels between a judge's server and whoever asks it: bodies and replies, no network.

Both ends share these schemas: `burnish.rewards.remote` builds a `ChatRequest` and reads a
`ChatReply`, `burnish.serving.server` does the reverse. The format is the chat completion of
OpenAI-compatible servers with the fields that vLLM added to it. Decided here:

- Every field that changes what is sampled is sent, because servers fill in what is missing from
  the model's own generation settings, a repetition penalty among them.
- The digit is read in one of three forms. `whole`: one call writes everything, and the place after
  the marker is found among token ids. `continued`: one call writes the reasoning up to the marker,
  a second one continues the same turn for one token; for servers that tell no token ids. `bare`:
  no reasoning, the marker is put into the judge's mouth.
- The five log-probabilities come by id (`exact`), or out of the `TOP` most probable tokens (`top`)
  where a server ignores the ids; then a digit may be missing, which is a failure.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from burnish import images
from burnish.config import Config
from burnish.judging import MARKER, SCALE, Alphabet, Rubric, question
from burnish.types import Failed, Prompt, ScoreRequest

TOP = 20
"""Most probable tokens that servers tell of each place, at most."""
LOWEST = -9999.0
"""What stands for minus infinity, which JSON cannot write."""

Form = Literal["whole", "continued", "bare"]
"""How the place of the digit is reached; see the module."""
Digits = Literal["exact", "top"]
"""How the five log-probabilities are asked for."""

_ID = "token_id:"
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


# --- What is sent ----------------------------------------------------------------------------


class TextPart(Config):
    """Words of a turn."""

    type: Literal["text"] = "text"
    text: str


class ImageUrl(Config):
    """Where a picture is; here always a `data:` URL, which carries it."""

    url: str


class ImagePart(Config):
    """A picture of a turn."""

    type: Literal["image_url"] = "image_url"
    image_url: ImageUrl


class Message(Config):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[TextPart | ImagePart, ...]


class ChatRequest(Config):
    """The body of a chat completion; every default leaves the model's distribution as it is."""

    model: str
    messages: tuple[Message, ...] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    n: Literal[1] = 1
    stream: Literal[False] = False
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off in every version of vLLM; the 0 that newer ones also take was once refused."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=TOP)
    logprob_token_ids: tuple[int, ...] | None = None
    return_tokens_as_token_ids: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def body(self) -> dict[str, Any]:
        """Plain data for JSON, without the fields that are None."""
        return self.model_dump(mode="json", exclude_none=True)


def turn(rubric: Rubric, prompt: Prompt, pictures: Sequence[bytes]) -> Message:
    """The user's turn with its pictures in place.

    Args:
        rubric: the instructions.
        prompt: what the picture was made for.
        pictures: encoded images, the sources of an edit first.
    """
    left = iter(pictures)
    return Message(
        role="user",
        content=tuple(
            ImagePart(image_url=ImageUrl(url=images.data_url(next(left))))
            if part["type"] == "image"
            else TextPart(text=part["text"])
            for part in question(rubric, prompt.text, num_sources=len(prompt.sources))
        ),
    )


def encoded(request: ScoreRequest) -> list[bytes]:
    """The pictures of a request as PNG files, the sources of an edit first.

    Sources are decoded and encoded again, so that a broken one fails here, by name, and its
    metadata stay at home.

    Raises:
        ImageError: a picture that is not finite, or no picture.
    """
    drawn = images.encode_png(images.to_pil(request.image))
    sources = [images.decode(data, where=request.prompt.id) for data in request.prompt.sources]
    return [*map(images.encode_png, sources), drawn]


@dataclass(frozen=True)
class Asking:
    """How one judge is asked: all that stays the same from picture to picture."""

    model: str
    form: Form
    digits: Digits
    alphabet: Alphabet | None
    """None where the server tells no token ids; then digits are known by their text."""
    max_tokens: int
    """Most tokens of an answer, marker and digit included."""
    temperature: float = 0.0

    def answer(self, asked: Message, seed: int) -> ChatRequest:
        """The call that writes: everything (`whole`), or all before the digit (`continued`)."""
        if self.form == "whole":
            more = self._log_probs()
        else:
            more = {"stop": (MARKER,), "include_stop_str_in_output": True}
        return self._request((asked,), seed, max_tokens=self.max_tokens, **more)

    def digit(self, asked: Message, reasoning: str, seed: int) -> ChatRequest:
        """The call that continues the judge's own turn behind the marker, by one token."""
        begun = Message(role="assistant", content=f"{reasoning}{MARKER}")
        return self._request(
            (asked, begun),
            seed,
            max_tokens=1,
            add_generation_prompt=False,
            continue_final_message=True,
            **self._log_probs(),
        )

    def _request(self, messages: tuple[Message, ...], seed: int, **more: Any) -> ChatRequest:
        return ChatRequest(
            model=self.model, messages=messages, temperature=self.temperature, seed=seed, **more
        )

    def _log_probs(self) -> dict[str, Any]:
        has_ids = self.alphabet is not None
        asked: dict[str, Any] = {"logprobs": True, "return_tokens_as_token_ids": has_ids}
        if self.digits == "exact" and self.alphabet is not None:
            return {**asked, "logprob_token_ids": self.alphabet.digits}
        return {**asked, "top_logprobs": TOP}


def ladder(*, is_reasoning: bool, has_ids: bool) -> list[tuple[Form, Digits]]:
    """The forms to try on a server, the best first.

    Args:
        is_reasoning: the judge writes its reasons before the score.
        has_ids: the server's tokenizer was asked and answered.
    """
    forms: list[Form] = ["bare"]
    kinds: list[Digits] = ["exact", "top"] if has_ids else ["top"]
    if is_reasoning:
        forms = ["whole", "continued"] if has_ids else ["continued"]
    return [(form, kind) for form in forms for kind in kinds]


# --- What comes back -------------------------------------------------------------------------


class TokenLogProb(BaseModel):
    """A token, as `token_id:N` or as text, and its natural log-probability among all tokens."""

    token: str
    logprob: float


class TokenPosition(TokenLogProb):
    """One written token, and what else was likely there."""

    top_logprobs: list[TokenLogProb] = []


class LogProbs(BaseModel):
    """The written tokens in order."""

    content: list[TokenPosition] | None = None


class ReplyMessage(BaseModel):
    """What the judge said."""

    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    """One answer."""

    index: int = 0
    message: ReplyMessage
    logprobs: LogProbs | None = None
    finish_reason: str | None = None
    """`length` where the answer was cut off."""
    stop_reason: int | str | None = None
    """The stop string that ended it, where vLLM serves."""


class ChatReply(BaseModel):
    """The body of an answer to a `ChatRequest`."""

    model: str
    choices: list[Choice]

    @property
    def text(self) -> str:
        """What was written."""
        return self.choices[0].message.content or ""

    @property
    def is_cut_off(self) -> bool:
        """Whether the answer is longer than was allowed."""
        return self.choices[0].finish_reason == "length"

    @property
    def positions(self) -> list[TokenPosition]:
        """The written tokens with their log-probabilities; empty where the server tells none."""
        told = self.choices[0].logprobs
        return (told.content or []) if told else []


@dataclass(frozen=True)
class Answer:
    """What the judge wrote before the marker, and what it would write behind it."""

    reasoning: str
    log_probs: dict[int, float]
    """Digit -> natural log-probability; may lack digits."""


def read_reply(data: Any) -> ChatReply | Failed:
    """Check that a reply is one answer with words in it; `Failed` says what else it is."""
    try:
        # Strict, so that a log-probability in quotes is no number.
        reply = ChatReply.model_validate(data, strict=True)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the top"
        return Failed(reason=f"need a chat completion, got another shape at {place}")
    if len(reply.choices) != 1:
        return Failed(reason=f"need one choice in the reply, got {len(reply.choices)}")
    refusal = reply.choices[0].message.refusal
    if refusal:
        words = "".join(letter for letter in " ".join(refusal.split()) if letter.isprintable())
        return Failed(reason=f"the judge refused: {words[:80]}")
    if not reply.text:
        return Failed(reason="need words in the reply, got none")
    return reply


def read_whole(reply: ChatReply, alphabet: Alphabet) -> Answer | Failed:
    """The answer out of the one call of the form `whole`."""
    ids = [_id_of(place.token) for place in reply.positions]
    known = [number for number in ids if number is not None]
    if not ids or len(known) != len(ids):
        return Failed(reason="need token ids in the reply, got none")
    place = alphabet.place_of_digit(known)
    if isinstance(place, Failed):
        cut = Failed(reason="the answer was cut off before its score")
        return cut if reply.is_cut_off and reply.text.count(MARKER) == 0 else place
    reasoning, _, rest = reply.text.rpartition(MARKER)
    wrong = _not_one_digit(rest)
    return wrong or _at(reply.positions[place], reasoning, alphabet)


def read_reasoning(reply: ChatReply) -> str | Failed:
    """The reasoning out of the first call of the form `continued`."""
    if reply.is_cut_off:
        return Failed(reason="the answer was cut off before its score")
    # Without a sign that the marker was the end, the judge may just have fallen silent.
    if not reply.text.endswith(MARKER) and reply.choices[0].stop_reason != MARKER:
        return Failed(reason="need one score marker in the answer, got 0")
    return reply.text.removesuffix(MARKER)


def read_digit(reply: ChatReply, reasoning: str, alphabet: Alphabet | None) -> Answer | Failed:
    """The answer out of the call that continues by one token."""
    if len(reply.positions) != 1:
        return Failed(reason=f"need one token in the reply, got {len(reply.positions)}")
    return _at(reply.positions[0], reasoning, alphabet)


def _at(place: TokenPosition, reasoning: str, alphabet: Alphabet | None) -> Answer | Failed:
    """The digits' log-probabilities among those told of one place."""
    names = {str(number): number for number in SCALE}
    if alphabet is not None:
        names |= {name_of(token): k for k, token in zip(SCALE, alphabet.digits, strict=True)}
    found: dict[int, float] = {}
    for told in (place, *place.top_logprobs):
        number = names.get(told.token)
        if number is None:
            continue
        # The written token is told twice, with the same value; NaN equals nothing.
        before = found.setdefault(number, told.logprob)
        if before != told.logprob and not math.isnan(before):
            return Failed(reason=f"need one probability of the digit {number}, got two")
    return Answer(reasoning.strip(), found)


def _not_one_digit(text: str) -> Failed | None:
    """A complaint where what stands behind the marker is a number off the scale, such as 26."""
    match = _NUMBER.match(text)
    written = match[0] if match else text.strip()[:20]
    if written in {str(number) for number in SCALE}:
        return None
    return Failed(reason=f"need a digit from 1 to 5 behind the marker, got {written!r}")


def name_of(token: int) -> str:
    """How a token is told by its id."""
    return f"{_ID}{token}"


def _id_of(token: str) -> int | None:
    digits = token.removeprefix(_ID)
    is_id = token.startswith(_ID) and digits.isdecimal() and len(digits) < 12
    return int(digits) if is_id else None
