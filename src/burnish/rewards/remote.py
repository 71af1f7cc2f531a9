"""A judge behind any OpenAI-compatible server, vLLM first: one picture, one question, one number.

A failure never becomes a number. What passes is tried again within one deadline for the whole call;
an answer that cannot be read is asked for once more with another seed; what is then still missing
is `Failed`, for this picture alone, and so is a question that the server refuses: its text or its
pictures are more than it takes. Only a wrong setting raises, such as one that makes the server
refuse all prompts of a call, and another judge than the one of the handshake: every reply must name
its model, and after a lost connection, behind which the server may have been restarted, the
handshake is made again before the next call. Such a run ends loudly instead of going on with bent
scores.

Scores are remembered by model, rubric, prompt, pictures and form of the question; failures never
are. See `burnish.protocol` for what is asked and `burnish.endpoint` for how often.
"""

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from burnish.config import Config, ConfigError, located
from burnish.endpoint import Endpoint, Patience, Refused, Unanswered, token_from
from burnish.handshake import Agreed, Deadline, Golden, Handshake, Line
from burnish.images import ImageError
from burnish.judging import Calibration, Rubric
from burnish.protocol import Message, encoded, turn
from burnish.rewards.base import Reward, RewardConfig
from burnish.types import Failed, Prompt, Score, Scored, ScoreRequest


class Knots(Config):
    """A monotone map of raw scores, see `Calibration`."""

    raw: tuple[float, ...]
    calibrated: tuple[float, ...]

    @model_validator(mode="after")
    def _rises(self) -> "Knots":
        rises = all(a < b for a, b in zip(self.raw, self.raw[1:], strict=False))
        keeps = all(a <= b for a, b in zip(self.calibrated, self.calibrated[1:], strict=False))
        if not self.raw or len(self.raw) != len(self.calibrated) or not (rises and keeps):
            raise ValueError(
                f"need as many calibrated scores as raw ones, both rising, got {self.raw} and "
                f"{self.calibrated}; fit the calibration again"
            )
        return self


class RemoteConfig(RewardConfig):
    """One dimension of one judge on a server; times in seconds."""

    span: ClassVar[float] = 4.0  # From 1 to 5.
    kind: Literal["remote"] = "remote"
    url: str
    """The server's address, such as http://127.0.0.1:8000."""
    model: str
    """The judge's name on the server."""
    dimension: str
    rubric: str
    """The Markdown file with the instructions, or `embedded:...`."""
    token_env: str | None = None
    """Name of the environment variable that holds the server's token; never the token itself."""
    reasoning: bool = True
    """Write the chain of thought first; False asks for the score at once."""
    max_tokens: int = Field(default=512, ge=1)
    """Most tokens of an answer, marker and digit included."""
    temperature: float = Field(default=0.0, ge=0)
    """Of the reasoning; at 0 asking again with another seed changes little."""
    timeout: float = Field(default=60.0, gt=0)
    """Of one try."""
    deadline: float = Field(default=600.0, gt=0)
    """Of one call of `score` with all its pictures, tries and the handshake."""
    concurrency: int = Field(default=16, ge=1)
    """Pictures asked about at the same time."""
    retries: int = Field(default=3, ge=0)
    """Tries after the first one; a busy server that says when to come back costs none."""
    pause: float = Field(default=0.5, ge=0)
    """Before the second try; doubles with each further one."""
    failures: int = Field(default=64, ge=1)
    """Failed tries in a row after which the server is left alone for `cool_down`; enough that a
    short break in the network cannot reach it."""
    cool_down: float = Field(default=30.0, ge=0)
    calibration: Knots | None = None
    cache_size: int = Field(default=4096, ge=0)
    """Scores that are remembered; 0 asks every time."""
    golden: Golden = Golden()

    @model_validator(mode="after")
    def _one_hiccup_cannot_open_the_breaker(self) -> "RemoteConfig":
        if self.failures <= self.concurrency + self.retries:
            raise ValueError(
                f"need failures above concurrency plus retries, got failures={self.failures}, "
                f"concurrency={self.concurrency} and retries={self.retries}; raise failures"
            )
        return self

    def meet(self) -> None:
        self.build().meet()

    def build(self) -> "Remote":
        rubric = Rubric(self.dimension, Rubric.read(located(self.rubric)).text)
        patience = Patience(self.timeout, self.retries, self.pause, self.failures, self.cool_down)
        endpoint = Endpoint(self.url, token=token_from(self.token_env), patience=patience)
        return Remote(self, rubric, endpoint)


class Remote(Reward):
    """A served judge as a reward: the value is its calibrated score, the note its reasoning.

    `score` runs an event loop of its own in the calling thread, so it works in every thread that
    has none running, and in several at once.
    """

    def __init__(self, config: RemoteConfig, rubric: Rubric, endpoint: Endpoint) -> None:
        self._config, self._rubric, self._endpoint = config, rubric, endpoint
        knots = config.calibration
        self._calibration = Calibration(knots.raw, knots.calibrated) if knots else Calibration()
        self._handshake = Handshake(
            model=config.model,
            rubric=rubric,
            golden=config.golden,
            calibration=self._calibration,
            is_reasoning=config.reasoning,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
        )
        self._cache = _Cache(config.cache_size)
        self._agreeing = threading.Lock()
        self._agreed: Agreed | None = None
        self._losses = 0
        """Lost connections that the agreement has seen."""

    def meet(self) -> None:
        """Shake hands, as otherwise at the first question.

        Raises:
            ConfigError: as `score`.
        """
        self._agreement(Deadline(self._config.deadline))

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order.

        Raises:
            ConfigError: the server is not there at the first call, is no judge, is another judge
                than before, or takes none of the prompts, two or more, that it is asked about.
        """
        if not requests:
            return []
        deadline = Deadline(self._config.deadline)
        agreed = self._agreement(deadline)
        if isinstance(agreed, Failed):
            return [agreed] * len(requests)
        return asyncio.run(self._score_all(agreed, requests, deadline))

    def _agreement(self, deadline: Deadline) -> Agreed | Failed:
        """What was agreed with the server, which is asked again where there is reason to."""
        with self._agreeing:
            before = self._agreed
            if before is not None and self._endpoint.losses == self._losses:
                return before
            try:
                fresh = asyncio.run(self._shake_hands(deadline))
            except (Unanswered, TimeoutError) as error:
                reason = str(error) or str(deadline)
                # A run that has begun goes on without its scores until the server is back.
                if before is not None:
                    return Failed(reason=reason)
                raise ConfigError(
                    f"need a judge at {self._endpoint.url}, got none: {reason}; start its server"
                ) from None
            difference = fresh.differs(before, self._config.golden.tolerance) if before else ""
            if difference:
                raise _another_judge(difference)
            # The first agreement stays, so that small differences cannot add up.
            self._agreed, self._losses = before or fresh, self._endpoint.losses
            return self._agreed

    async def _shake_hands(self, deadline: Deadline) -> Agreed:
        async with deadline.timeout(), self._endpoint.client(1) as client:
            return await self._handshake.shake(Line(self._endpoint, client, deadline.until))

    async def _score_all(
        self, agreed: Agreed, requests: Sequence[ScoreRequest], deadline: Deadline
    ) -> list[Score]:
        concurrency = self._config.concurrency
        gate = asyncio.Semaphore(concurrency)
        try:
            async with self._endpoint.client(concurrency) as client, asyncio.TaskGroup() as group:
                line = Line(self._endpoint, client, deadline.until)
                asked = [
                    group.create_task(self._score_one(line, gate, agreed, request, deadline))
                    for request in requests
                ]
        except ExceptionGroup as errors:
            # The group has ended the other tasks; the first error is the one to fix.
            raise errors.exceptions[0] from None
        found = [task.result() for task in asked]
        refused = [one for one in found if isinstance(one, Refused)]
        # A call is often one group, and what is wrong with its prompt is wrong with all its rows.
        if len(refused) == len(found) and len({request.prompt.id for request in requests}) > 1:
            raise refused[0]
        return [one.of_one_question() if isinstance(one, Refused) else one for one in found]

    async def _score_one(
        self,
        line: Line,
        gate: asyncio.Semaphore,
        agreed: Agreed,
        request: ScoreRequest,
        deadline: Deadline,
    ) -> Score | Refused:
        """The score of one picture; whatever is wrong with it stays with it."""
        try:
            async with deadline.timeout(), gate:
                # In a thread, because a large picture would hold up the replies to all others.
                pictures = await asyncio.to_thread(encoded, request)
                key = self._key(agreed, request.prompt, pictures)
                known = self._cache.get(key)
                if known is not None:
                    return known
                score = await self._ask(line, agreed, turn(self._rubric, request.prompt, pictures))
                if isinstance(score, Scored):
                    self._cache.put(key, score)
                return score
        except (ImageError, Unanswered) as error:
            return Failed(reason=str(error))
        except Refused as error:
            # Raises what no picture can be the reason of, which ends the call.
            error.of_one_question()
            return error
        except TimeoutError:
            return Failed(reason=str(deadline))

    async def _ask(self, line: Line, agreed: Agreed, asked: Message) -> Score:
        """Ask, and once more where the answer cannot be read."""
        score, names = await line.score(agreed.asking, asked, self._calibration)
        for name in names:
            if name and name != agreed.answers_as:
                raise _another_judge(f"a reply names {name[:60]!r}, not {agreed.answers_as!r}")
        return score

    def _key(self, agreed: Agreed, prompt: Prompt, pictures: Sequence[bytes]) -> str:
        asking = agreed.asking
        parts = {
            "judge": [agreed.answers_as, asking.model, self._rubric.digest],
            "question": [prompt.task, prompt.text],
            "pictures": [hashlib.sha256(picture).hexdigest() for picture in pictures],
            "read": [asking.form, asking.digits, asking.max_tokens, asking.temperature],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Cache:
    """The scores used last, for all threads together."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._scores: OrderedDict[str, Scored] = OrderedDict()

    def get(self, key: str) -> Scored | None:
        with self._lock:
            if key in self._scores:
                self._scores.move_to_end(key)
            return self._scores.get(key)

    def put(self, key: str, score: Scored) -> None:
        with self._lock:
            self._scores[key] = score
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


def _another_judge(what: str) -> ConfigError:
    return ConfigError(f"need the judge of the handshake, got another one: {what}; stop and look")
