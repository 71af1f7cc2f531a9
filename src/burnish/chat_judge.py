"""A judge that answers in words, behind an OpenAI-compatible server.

Everything that changes what it says is sent with each request and is part of its identity. A reply
that was cut off is a failure: what it meant to say is not known.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from burnish import images
from burnish.config import Config, ConfigError
from burnish.endpoint import Endpoint, Patience, Refused, Unanswered, token_from
from burnish.handshake import Line, find_model
from burnish.images import ImageError
from burnish.protocol import (
    ChatRequest,
    ImagePart,
    ImageUrl,
    Message,
    TextPart,
    read_reply,
)
from burnish.questions import Asked, Judge, Slot
from burnish.types import Failed

MAX_REPLY = 200_000
"""Characters of a reply; a judge that thinks for 4,096 tokens writes a tenth of that."""
_OPENAI = frozenset({"model", "messages", "max_tokens", "temperature", "top_p", "seed"})


class ChatJudgeConfig(Config):
    """Where a judge is served, and how long it is waited for; decoding belongs to the bench."""

    url: str
    """The server's address, such as http://127.0.0.1:8000."""
    model: str
    """The judge's name on the server; serve a revision that stays, as it is part of the result."""
    token_env: str | None = None
    """Name of the environment variable that holds the server's token; never the token itself."""
    dialect: Literal["vllm", "openai"] = "vllm"
    """openai leaves out what only vLLM knows (top_k, repetition penalty, templates)."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds for one reply; a judge that thinks takes its time."""
    retries: int = Field(default=3, ge=0)
    pause: float = Field(default=1.0, ge=0)
    """Seconds before the second try; doubles with each further one."""
    concurrency: int = Field(default=24, ge=1)
    """Questions asked at the same time."""


@dataclass(frozen=True)
class Decoding:
    """How the judge's words are chosen."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    seed: int = 0
    is_thinking: bool | None = None
    """Whether the chat template lets it think first; None leaves that to the server."""


def unchanged(picture: Image.Image, _: Image.Image | None) -> Image.Image:
    """The picture as it is."""
    return picture


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before it is sent."""

    name: str = "as they are"
    """Part of the judge's identity."""
    apply: Callable[[Image.Image, Image.Image | None], Image.Image] = unchanged
    """Takes the output, and the first source where there is one; sources stay as they are."""
    encode: Callable[[Image.Image], bytes] = images.encode_png


class ThoughtfulRequest(ChatRequest):
    """A chat completion that says whether the template lets the judge think."""

    chat_template_kwargs: Mapping[str, bool] | None = None


class ChatJudge(Judge):
    """Asks a server, many questions at a time."""

    def __init__(
        self, config: ChatJudgeConfig, decoding: Decoding, preparation: Preparation
    ) -> None:
        self._config, self._decoding, self._preparation = config, decoding, preparation
        patience = Patience(config.timeout, config.retries, config.pause)
        token = token_from(config.token_env)
        self._endpoint = Endpoint(config.url, token=token, patience=patience)
        self._is_known = False

    @property
    def identity(self) -> Mapping[str, Any]:
        """Model, decoding, and what is done to pictures."""
        return {
            "model": self._config.model,
            "dialect": self._config.dialect,
            "decoding": asdict(self._decoding),
            "pictures": self._preparation.name,
        }

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, str | Failed]]:
        """Replies in the order of the questions, some dozens at a time.

        Raises:
            ConfigError: no server, or one without the model.
        """
        if asked and not self._is_known:
            asyncio.run(self._greet())
            self._is_known = True
        # Small enough that little is asked again after a kill.
        size = self._config.concurrency
        for first in range(0, len(asked), size):
            block = asked[first : first + size]
            replies = asyncio.run(self._ask_all(block))
            errors = [reply for reply in replies if isinstance(reply, BaseException)]
            for one, reply in zip(block, replies, strict=True):
                if not isinstance(reply, BaseException):
                    yield one, reply
            if errors:
                raise errors[0]

    async def _greet(self) -> None:
        async with self._endpoint.client(1) as client:
            try:
                await find_model(self._line(client), self._config.model)
            except Unanswered as error:
                raise ConfigError(
                    f"need a judge at {self._endpoint.url}, got none: {error}; start its server"
                ) from None

    def _line(self, client: Any) -> Line:
        tries = self._config.retries + 1
        until = time.monotonic() + tries * (self._config.timeout + 60)
        return Line(self._endpoint, client, until)

    async def _ask_all(self, block: Sequence[Asked]) -> list[str | Failed | BaseException]:
        gate = asyncio.Semaphore(self._config.concurrency)
        async with self._endpoint.client(self._config.concurrency) as client:
            line = self._line(client)
            every = (self._ask(line, gate, one) for one in block)
            # What came is kept, even if one of them shows that the server is the wrong one.
            return await asyncio.gather(*every, return_exceptions=True)

    async def _ask(self, line: Line, gate: asyncio.Semaphore, one: Asked) -> str | Failed:
        async with gate:
            try:
                request = await asyncio.to_thread(self._request, one)
                data = await line.call("/v1/chat/completions", self._body(request))
            except (ImageError, Unanswered) as error:
                return Failed(reason=str(error))
            except Refused as error:
                # A filter, or a text that is too long: of this question, not of the server.
                return error.of_one_question()
        reply = data if isinstance(data, Failed) else read_reply(data)
        if isinstance(reply, Failed):
            return reply
        if len(reply.text) > MAX_REPLY:
            return Failed(reason=f"need at most {MAX_REPLY} characters, got {len(reply.text)}")
        return Failed(reason="the answer was cut off") if reply.is_cut_off else reply.text

    def _body(self, request: ThoughtfulRequest) -> dict[str, Any]:
        body = request.body()
        if self._config.dialect == "vllm":
            return body
        return {name: value for name, value in body.items() if name in _OPENAI}

    def _request(self, one: Asked) -> ThoughtfulRequest:
        parts: list[TextPart | ImagePart] = []
        for part in one.question.parts:
            if isinstance(part, str):
                parts.append(TextPart(text=part))
            else:
                urls = self._pictures(one, part)
                parts += [ImagePart(image_url=ImageUrl(url=url)) for url in urls]
        turn = Message(role="user", content=tuple(parts))
        system = [Message(role="system", content=one.question.system)]
        decoding = asdict(self._decoding)
        is_thinking = decoding.pop("is_thinking")
        return ThoughtfulRequest(
            model=self._config.model,
            messages=(*(system if one.question.system else ()), turn),
            chat_template_kwargs=None if is_thinking is None else {"enable_thinking": is_thinking},
            **decoding,
        )

    def _pictures(self, one: Asked, slot: Slot) -> list[str]:
        path = {Slot.OUTPUT: one.picture, Slot.OTHER: one.other}.get(slot)
        given = one.read_sources() if path is None else one.read_sources()[:1]
        shown = [images.decode(data, where=one.item.id) for data in given]
        if path is not None:
            first = shown[0] if shown else None
            shown = [self._preparation.apply(images.read(path), first)]
        elif not shown:
            raise ImageError(f"need the source picture of {one.item.id}, got none")
        return [images.data_url(self._preparation.encode(picture)) for picture in shown]
