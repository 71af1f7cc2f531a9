"""A local judge behind HTTP: the other half of `burnish.rewards.remote`.

The server speaks the part of the OpenAI protocol that a judge needs, with the fields that vLLM
added (`burnish.protocol`), so a judge can move between this server and vLLM without a change of
recipe. Decided here:

- Bodies come from strangers: they are read up to a cap and within a time, and a field that is not
  known is an error. What is inside them is the business of `burnish.serving.translation`.
- Everything but `/health` needs the bearer token, compared in constant time. A server without a
  token starts only on loopback and only when told so. Encryption is the work of a proxy in front.
- Few wait. Where the queue is full, or twice as many requests are inside, the answer is 503 with
  `Retry-After`, before the body is read. Connections are not counted: a limit of them would refuse
  without `Retry-After`, and askers keep theirs. Who went away is not answered: he asks again, and
  the queue would fill with his old questions.

It needs the extra `burnish[serve]`.
"""

import asyncio
import contextlib
import copy
import hmac
import ipaddress
import json
import logging
import queue
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from burnish.config import Config, ConfigError, ConfigT, parse
from burnish.protocol import ChatRequest
from burnish.rewards.vlm import Judge
from burnish.serving.answering import AnswerQueue, Writer
from burnish.serving.translation import Limits, Refusal, Translator, Written

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse
except ImportError:
    raise ConfigError(
        "need FastAPI and uvicorn to serve a judge, got none; pip install 'burnish[serve]'"
    ) from None

_SHORTEST_TOKEN = 16
_PATIENCE = 1.0
"""Seconds between two looks whether the asker is still there."""
_log = logging.getLogger(__name__)


class TokenizeRequest(Config):
    """The body of `/tokenize`."""

    model: str
    prompt: str
    add_special_tokens: bool = False


def app(judge: Judge, *, name: str, token: str | None, limits: Limits | None = None) -> FastAPI:
    """The application that serves one judge.

    Args:
        judge: what is served; its rubrics and calibrations are the asker's business.
        name: the model's name; change it with the weights, because askers know a judge by it.
        token: what the askers must send; None admits everybody, so keep it off the network.
        limits: what one asker can cost.
    """
    limits = limits or Limits()
    answers = AnswerQueue(Writer(judge), places=limits.waiting, batch=limits.batch)
    # A processor of its own: the queue's thread sets how the other's tokenizer pads.
    translator = Translator(name, copy.deepcopy(judge.processor), limits)
    service = _Service(translator, answers, token)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answers.open()
        yield
        await asyncio.to_thread(answers.close)

    served = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    served.add_exception_handler(Refusal, _problem)
    served.add_api_route("/health", service.health, response_model=None)
    guarded = [Depends(service.admit)]
    for path, handler, method in (
        ("/v1/models", service.models, "GET"),
        ("/tokenize", service.tokenize, "POST"),
        ("/v1/chat/completions", service.chat, "POST"),
    ):
        served.add_api_route(
            path, handler, methods=[method], dependencies=guarded, response_model=None
        )
    return served


def serve(
    judge: Judge,
    *,
    name: str,
    token: str | None,
    host: str = "127.0.0.1",
    port: int = 8000,
    is_open: bool = False,
    limits: Limits | None = None,
) -> None:
    """Serve a judge until the process is told to stop.

    Args:
        judge: see `app`, as for the name, the token and the limits.
        name: of the model.
        token: what the askers must send.
        host: the address to listen on.
        port: the port.
        is_open: go without a token; only where no other machine can connect.
        limits: what one asker can cost.

    Raises:
        ConfigError: no token, a short one, or none on an address that others can reach.
    """
    check_token(token, host, is_open=is_open)
    uvicorn.run(
        app(judge, name=name, token=token or None, limits=limits),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
    )


def check_token(token: str | None, host: str, *, is_open: bool) -> None:
    """Refuse to start without protection.

    Raises:
        ConfigError: no token, a short one, or none on an address that others can reach.
    """
    if token:
        if len(token) < _SHORTEST_TOKEN or not token.isascii() or " " in token:
            raise ConfigError(
                f"need a token of {_SHORTEST_TOKEN} or more letters and digits, got another of "
                f"{len(token)}; draw a new one"
            )
        return
    if not is_open:
        raise ConfigError(
            "need a token, got none; set BURNISH_TOKEN, or admit everybody on loopback with --open"
        )
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        raise ConfigError(
            f"need a token on {host}, got none; set BURNISH_TOKEN, or listen on 127.0.0.1"
        )


class _Service:
    """Everything between a request and the queue."""

    def __init__(self, translator: Translator, answers: AnswerQueue, token: str | None) -> None:
        self._translator, self._answers, self._limits = translator, answers, translator.limits
        self._token = None if token is None else token.encode()
        self._inside = 0
        """Requests that were admitted and have no answer."""

    async def admit(self, request: Request) -> AsyncIterator[None]:
        """Let a request in, if it carries the token and there is room."""
        self._check(request)
        # Bodies are held in memory while their questions wait.
        if self._inside >= 2 * self._limits.waiting:
            raise _full()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _check(self, request: Request) -> None:
        """Refuse a request that does not carry the token."""
        if self._token is None:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # The time of a plain comparison would tell how much of the token was right.
        is_right = hmac.compare_digest(given.strip().encode(), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(401, "need the bearer token", {"WWW-Authenticate": "Bearer"})

    async def health(self) -> dict[str, str]:
        """Whether the server is up; tells nothing else."""
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        entry = {"id": self._translator.name, "object": "model", "owned_by": "burnish"}
        return {"object": "list", "data": [entry]}

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """The token ids of a text."""
        asked = await self._body(TokenizeRequest, request)
        self._translator.check_model(asked.model)
        tokenizer = self._translator.processor.tokenizer
        ids = tokenizer(asked.prompt, add_special_tokens=asked.add_special_tokens)["input_ids"]
        return {"count": len(ids), "tokens": list(ids)}

    async def chat(self, request: Request) -> JSONResponse:
        """One answer to one question."""
        if self._answers.is_full:
            raise _full()
        asked = await self._body(ChatRequest, request)
        # Decoding takes a while, and the others should be heard meanwhile.
        question = await asyncio.to_thread(self._translator.question, asked)
        try:
            future = self._answers.ask(question)
        except queue.Full:
            raise _full() from None
        written = await _finished(request, future)
        reply = self._translator.reply(asked, written).model_dump()
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        usage = {"prompt_tokens": written.num_asked, "completion_tokens": len(written.tokens)}
        return JSONResponse({**head, "created": int(time.time()), **reply, "usage": usage})

    async def _body(self, schema: type[ConfigT], request: Request) -> ConfigT:
        """The body of a request as one of our records, read up to the cap."""
        most, parts, size = self._limits.body, [], 0
        too_large = Refusal(413, f"need a body of at most {most} bytes, got more")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Refusal(408, f"need the body within {self._limits.seconds:g} s") from None
        return await asyncio.to_thread(_record, schema, b"".join(parts))


def _record(schema: type[ConfigT], data: bytes) -> ConfigT:
    """A body as one of our records; every fault of it is a 400 that names the field."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        raise Refusal(400, "need JSON in the body, got something else") from None
    if not isinstance(plain, dict):
        raise Refusal(400, "need a JSON object in the body, got something else")
    try:
        return parse(schema, plain)
    except ConfigError as error:
        raise Refusal(400, str(error)[:300]) from None
    except (ValueError, RecursionError):
        raise Refusal(400, "need plain JSON in the body, got numbers or depths of no use") from None


async def _finished(request: Request, future: "Future[Written]") -> Written:
    """Wait for an answer as long as its asker does."""
    waiting = asyncio.wrap_future(future)
    while not (await asyncio.wait([waiting], timeout=_PATIENCE))[0]:
        if await request.is_disconnected():
            waiting.cancel()
            raise Refusal(408, "the asker went away")
    error = waiting.exception()
    if error is not None:
        # The asker learns nothing of the inside of the server.
        _log.error("a question could not be answered", exc_info=error)
        raise Refusal(500, "the judge could not answer this question")
    return waiting.result()


def _full() -> Refusal:
    return Refusal(503, "too many questions wait; ask again later", {"Retry-After": "1"})


async def _problem(_: Request, error: Exception) -> JSONResponse:
    """Refusals in the shape of the protocol."""
    assert isinstance(error, Refusal)
    body = {"error": {"message": error.message, "type": "refusal", "code": error.status}}
    return JSONResponse(body, status_code=error.status, headers=error.headers)
