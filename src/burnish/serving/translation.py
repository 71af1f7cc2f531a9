"""From requests of the protocol to questions for a local judge, and from its answers to replies.

No network and no model here; the processor lends its chat template and its words. What cannot be
honoured is refused: a field that would change what a greedy judge writes is an error and never
ignored, because an ignored field gives another score. Pictures come as `data:` URLs and are decoded
with a cap on pixels; no address is fetched and no file is read. Messages repeat nothing of what a
decoder said.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from burnish import images
from burnish.judging import control_token
from burnish.protocol import (
    LOWEST,
    ChatReply,
    ChatRequest,
    Choice,
    ImagePart,
    LogProbs,
    Message,
    ReplyMessage,
    TokenLogProb,
    TokenPosition,
    name_of,
)
from burnish.types import MAX_SOURCES

_NEUTRAL = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The values of the fields that would change what is written; the others do nothing to it."""


class Refusal(Exception):
    """A request that is not answered, as a status of HTTP and one line."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


@dataclass(frozen=True)
class Limits:
    """What one asker can cost a server."""

    waiting: int = 64
    """Questions in the queue."""
    batch: int = 8
    """Questions that are written together; 1 makes every score independent of its neighbours."""
    body: int = 48 << 20
    """Bytes of a request."""
    seconds: float = 30.0
    """For a body to arrive."""
    pictures: int = MAX_SOURCES + 1
    """Pictures of a request: the sources of an edit and its result."""
    pixels: int = images.MAX_PIXELS
    """Width times height of a picture."""
    text: int = 20_000
    """Characters of all turns; writing takes longer than in proportion."""
    tokens: int = 2048
    """Tokens of an answer."""


@dataclass(frozen=True)
class Question:
    """What one asker wants written."""

    text: str
    """All that the model sees, its own begun answer included."""
    pictures: tuple[Image.Image, ...]
    max_tokens: int
    stops: tuple[str, ...] = ()
    """Texts that end the answer; they stand at its end."""
    ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are wanted at every place."""
    top: int = 0
    """Or this many of the most probable ones, where no ids are given."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Questions of one kind can be written in one batch."""
        return (len(self.pictures), self.max_tokens, self.stops, self.ids, self.top)


@dataclass(frozen=True)
class Written:
    """One answer."""

    text: str
    """Without special tokens, with the stop text that ended it."""
    tokens: tuple[int, ...] = ()
    """With the token that ended it."""
    log_probs: tuple[dict[int, float], ...] = field(default=(), repr=False)
    """Of each place: the written token first, then those asked for."""
    stop: str | None = None
    """The stop text that ended it."""
    is_cut_off: bool = False
    num_asked: int = 0
    """Tokens of the question."""


@dataclass(frozen=True)
class Translator:
    """The two directions for one judge."""

    name: str
    """The model's name."""
    processor: Any
    limits: Limits

    def check_model(self, name: str) -> None:
        """Raise `Refusal` where another model is asked for."""
        if name != self.name:
            raise Refusal(404, f"need the model {self.name!r}, got {name[:60]!r}")

    def question(self, asked: ChatRequest) -> Question:
        """The request as the model will see it.

        Raises:
            Refusal: another model, a field that cannot be honoured, too many tokens or pictures,
                or a picture that is none.
        """
        self.check_model(asked.model)
        self._check_fields(asked)
        pictures: list[Image.Image] = []
        turns, begun = list(asked.messages), ""
        if asked.continue_final_message:
            last = turns.pop().content
            if not isinstance(last, str):
                raise Refusal(400, "need the begun answer as text, got parts")
            begun = last
        self._check_texts([*_texts(turns), begun])
        text = self.processor.apply_chat_template(
            [{"role": turn.role, "content": self._content(turn, pictures)} for turn in turns],
            add_generation_prompt=True,
            tokenize=False,
        )
        return Question(
            text=f"{text}{begun}",
            pictures=tuple(pictures),
            max_tokens=asked.max_tokens,
            stops=asked.stop or (),
            ids=asked.logprob_token_ids or (),
            top=asked.top_logprobs or 0,
        )

    def reply(self, asked: ChatRequest, written: Written) -> ChatReply:
        """The answer in the shape that was asked for."""
        text, stop = written.text, written.stop
        if stop is not None and not asked.include_stop_str_in_output:
            text = text.removesuffix(stop)
        told = None
        if asked.logprobs:
            places = zip(written.tokens, written.log_probs, strict=True)
            told = LogProbs(content=[self._at(asked, token, known) for token, known in places])
        choice = Choice(
            message=ReplyMessage(content=text),
            logprobs=told,
            finish_reason="length" if written.is_cut_off else "stop",
            stop_reason=stop,
        )
        return ChatReply(model=self.name, choices=[choice])

    def _check_fields(self, asked: ChatRequest) -> None:
        """Refuse what would not be honoured."""
        for name, value in _NEUTRAL.items():
            given = getattr(asked, name)
            if given != value:
                raise Refusal(400, f"need {name}={value:g}, got {given:g}; this judge is greedy")
        if asked.max_tokens > self.limits.tokens:
            raise Refusal(
                400, f"need max_tokens of at most {self.limits.tokens}, got {asked.max_tokens}"
            )
        size = len(self.processor.tokenizer)
        if not all(0 <= token < size for token in asked.logprob_token_ids or ()):
            raise Refusal(400, f"need token ids from 0 to {size - 1}, got others")
        if (asked.logprob_token_ids or asked.top_logprobs) and not asked.logprobs:
            raise Refusal(400, "need logprobs=true to tell log-probabilities, got false")
        is_begun = asked.messages[-1].role == "assistant"
        if (asked.continue_final_message, asked.add_generation_prompt) != (is_begun, not is_begun):
            raise Refusal(
                400,
                "need continue_final_message with a begun answer and add_generation_prompt with a "
                "question, got another mixture",
            )

    def _check_texts(self, texts: Sequence[str]) -> None:
        """Refuse texts that are too long, or more than words."""
        length = sum(map(len, texts))
        if length > self.limits.text:
            raise Refusal(400, f"need at most {self.limits.text} characters, got {length}")
        for text in texts:
            token = control_token(text, self.processor.tokenizer)
            if token is not None:
                raise Refusal(400, f"need words, got the token {token} among them")

    def _content(self, turn: Message, pictures: list[Image.Image]) -> Any:
        """The content of a turn for the chat template; its pictures go to the end of the list."""
        if isinstance(turn.content, str):
            return turn.content
        parts: list[dict[str, str]] = []
        for part in turn.content:
            if not isinstance(part, ImagePart):
                parts.append({"type": "text", "text": part.text})
                continue
            if len(pictures) >= self.limits.pictures:
                raise Refusal(400, f"need at most {self.limits.pictures} pictures, got more")
            pictures.append(_picture(part.image_url.url, self.limits.pixels))
            parts.append({"type": "image"})
        return parts

    def _at(self, asked: ChatRequest, token: int, known: Mapping[int, float]) -> TokenPosition:
        def told(number: int) -> TokenLogProb:
            is_id = asked.return_tokens_as_token_ids
            name = name_of(number) if is_id else self.processor.tokenizer.decode([number])
            return TokenLogProb(token=name, logprob=max(known[number], LOWEST))

        written = told(token)
        return TokenPosition(
            token=written.token,
            logprob=written.logprob,
            top_logprobs=[told(number) for number in known],
        )


def _texts(turns: Sequence[Message]) -> Iterator[str]:
    """All texts of some turns."""
    for turn in turns:
        if isinstance(turn.content, str):
            yield turn.content
        else:
            yield from (part.text for part in turn.content if not isinstance(part, ImagePart))


def _picture(url: str, max_pixels: int) -> Image.Image:
    """The picture inside a data URL."""
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Refusal(400, "need pictures as data:image/png;base64,..., got another URL")
    try:
        # Both errors are ValueErrors: of the coding, and of the picture.
        encoded = base64.b64decode(data, validate=True)
        return images.decode(encoded, where="a picture", max_pixels=max_pixels)
    except ValueError:
        raise Refusal(
            400, f"need whole pictures of at most {max_pixels} pixels, got another"
        ) from None
