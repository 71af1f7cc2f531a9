"""A server as its caller sees it: tries, pauses, a size cap, and a breaker; it knows no judges.

Decided here is what another try can help. The network, 408, 429 and 5xx pass: they are tried again
with growing, jittered pauses, never sooner than `Retry-After` says and never beyond the deadline.
A server that answers 429 or 503 with `Retry-After` is there and busy: the question waits its turn
until the deadline, and is neither a try nor a failure. Every other status is a wrong setting, which
no try helps: a `ConfigError` at once. A reply that is too large or no JSON is a `Failed` for
whoever asked. Redirects are not followed: they would carry the token to another host. After many
failures in a row the breaker opens, and nothing is asked until a pause has passed, so that a dead
server costs a run seconds and not hours.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from burnish.config import ConfigError
from burnish.types import Failed

MAX_REPLY = 16 << 20
"""Most bytes of a reply that are read; a long answer with all its log-probabilities has 1 MB."""

_TRY_AGAIN = (408, 429)
_OF_ONE_QUESTION = (400, 413, 422)
_BUSY = (429, 503)
"""With `Retry-After`; without it nobody knows whether a 503 ends."""
# Not the global generator: its state belongs to whoever seeded it.
_jitter = random.Random()


class Unanswered(Exception):
    """No answer could be had in all tries; the message is one line."""


class Refused(ConfigError):
    """The server is there and does not take the request."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status

    def of_one_question(self) -> Failed:
        """The failure of the question alone, for whoever knows that the server takes others.

        Raises:
            Refused: no text and no picture makes a server answer with this status.
        """
        if self.status not in _OF_ONE_QUESTION:
            raise self
        return Failed(reason=f"the server refuses the question: {self}")


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for; times in seconds."""

    timeout: float = 60.0
    """Of one try, connecting and the last byte of the reply included."""
    retries: int = 3
    """Tries after the first one."""
    pause: float = 0.5
    """Before the second try; doubles with each further one, times 0.5 to 1.5 by chance."""
    failures: int = 64
    """Failures in a row after which nothing more is asked for a while."""
    cool_down: float = 30.0
    """That while."""


class Breaker:
    """Counts failures in a row, for all threads together."""

    def __init__(self, failures: int, cool_down: float) -> None:
        self._failures, self._cool_down = failures, cool_down
        self._lock = threading.Lock()
        self._in_a_row, self._closed_again = 0, 0.0

    @property
    def is_open(self) -> bool:
        """Whether the server should be left alone now."""
        with self._lock:
            return self._in_a_row >= self._failures and time.monotonic() < self._closed_again

    def note(self, *, is_failure: bool) -> None:
        """Count one try; after the pause, a single further failure opens it again."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if is_failure else 0
            if self._in_a_row >= self._failures:
                self._closed_again = time.monotonic() + self._cool_down


@dataclass(frozen=True)
class _Again:
    """Why a try may be repeated, and after how many seconds at the soonest."""

    problem: str
    after: float = 0.0
    is_busy: bool = False
    """The server asked to wait, so this was no try."""


class Endpoint:
    """One server; may be used from several threads, each with a client of its own."""

    def __init__(self, url: str, *, token: str | None = None, patience: Patience) -> None:
        self.url = base_url(url)
        self.losses = 0
        """Connections lost so far: behind any of them the server may have been restarted."""
        self._token, self._patience = token, patience
        self._breaker = Breaker(patience.failures, patience.cool_down)
        # Loading the certificates is the slow part of a client.
        self._tls = httpx.create_ssl_context()

    def client(self, concurrency: int) -> httpx.AsyncClient:
        """A client for one event loop, with at most so many connections."""
        return httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=self._patience.timeout,
            limits=httpx.Limits(max_connections=concurrency),
            verify=self._tls,
            follow_redirects=False,
            # Neither proxies nor a .netrc that somebody set for other programs.
            trust_env=False,
        )

    async def call(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        until: float,
    ) -> Any:
        """GET, or POST where there is a body; the JSON of the reply, or `Failed` where it has none.

        Args:
            client: from `client`.
            path: behind the server's address.
            body: plain data.
            until: no pause reaches beyond this moment of `time.monotonic`, and a busy server is
                waited for until then; who needs the call to end by then cancels it.

        Raises:
            Unanswered: every try failed, or the breaker is open.
            ConfigError: the server answered and does not take the request.
        """
        content = None if body is None else json.dumps(body).encode()
        asked, tried = 0, 0
        while not self._breaker.is_open:
            result = await self._try(client, path, content)
            if not isinstance(result, _Again):
                return result
            asked += 1
            tried += not result.is_busy
            pause = self._patience.pause * 2 ** max(tried - 1, 0) * _jitter.uniform(0.5, 1.5)
            # Spread, because those that were sent away together would come back together.
            pause = max(pause, result.after * _jitter.uniform(1.0, 1.5))
            if tried > self._patience.retries or time.monotonic() + pause >= until:
                times = "1 try" if asked == 1 else f"{asked} tries"
                raise Unanswered(f"{self.url}: {result.problem}, after {times}")
            await asyncio.sleep(pause)
        raise Unanswered(f"{self.url} failed too often in a row, so it is left alone")

    async def _try(self, client: httpx.AsyncClient, path: str, content: bytes | None) -> Any:
        """One try: JSON, `Failed`, or `_Again`."""
        method = "GET" if content is None else "POST"
        # Not compressed: a small reply could hold gigabytes.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._patience.timeout),
                client.stream(method, path, content=content, headers=headers) as response,
            ):
                data = await _read(response)
        except TimeoutError:
            return self._lost(f"no answer in {self._patience.timeout:g} s")
        except httpx.RequestError as error:
            return self._lost(" ".join(f"{type(error).__name__} {error}".split())[:120])
        status, after = response.status_code, _retry_after(response)
        if status in _BUSY and after:
            return _Again(f"status {status}", after, is_busy=True)
        if status >= 500:
            self._breaker.note(is_failure=True)
            return _Again(f"status {status}", after)
        self._breaker.note(is_failure=False)
        if status in _TRY_AGAIN:
            return _Again(f"status {status}", after)
        if status != 200:
            raise self._refusal(path, status, data or b"", 0 if content is None else len(content))
        if data is None:
            return Failed(reason=f"need a reply of at most {MAX_REPLY} bytes, got more")
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            return Failed(reason=f"need JSON in the reply, got {len(data)} bytes of something else")

    def _lost(self, problem: str) -> _Again:
        self.losses += 1
        self._breaker.note(is_failure=True)
        return _Again(problem)

    def _refusal(self, path: str, status: int, data: bytes, size: int) -> Refused:
        got = f"got status {status} from {self.url}{path}"
        if status in (401, 403):
            line = f"need a token that the server takes, {got}; check the variable of `token_env`"
        elif status == 413:
            line = f"need a request within the server's limit, {got} for {size} bytes; raise it"
        elif 300 <= status < 400:
            line = f"need the server's own address, {got}, a redirect; correct `url`"
        else:
            line = f"need a server that takes this request, {got}{self._words(data)}; check `url`"
        return Refused(line, status)

    def _words(self, data: bytes) -> str:
        """The server's own explanation, as a few harmless words."""
        text = " ".join(data[:2000].decode("utf-8", "replace").split())
        if self._token:
            text = text.replace(self._token, "***")
        shown = "".join(letter for letter in text if letter.isprintable())[:200]
        return f" ({shown})" if shown else ""


def base_url(url: str) -> str:
    """A server's address without its `/v1`.

    Raises:
        ConfigError: no http or https address, or one with a password or a query in it.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
        raise ConfigError(
            f"need an address such as http://127.0.0.1:8000, got {url[:80]!r}; fix it"
        )
    if parsed.userinfo:
        raise ConfigError("need an address without a password, got one with; use `token_env`")
    return str(parsed.copy_with(fragment=None)).rstrip("/").removesuffix("/v1")


def token_from(variable: str | None) -> str | None:
    """The token in an environment variable; None where no variable is named.

    Raises:
        ConfigError: the variable is not set, or what it holds cannot stand in a header.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"need a token in the environment variable {variable}, got "
            f"{'none' if not token else 'characters that no token has'}; export it"
        )
    return token


async def _read(response: httpx.Response) -> bytes | None:
    """The body; None where it is larger than `MAX_REPLY`, of which no more is read."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_REPLY:
            return None
        parts.append(part)
    return b"".join(parts)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for; 0 where it asks for none, or for nonsense."""
    text = response.headers.get("Retry-After", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
