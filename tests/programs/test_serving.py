"""A judge behind our own server: the scores of the same judge in this process, no open doors."""

import asyncio
import base64
import contextlib
import io
import json
import queue
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from PIL import Image

from burnish import images
from burnish.config import ConfigError, located
from burnish.judging import MARKER, Alphabet, question
from burnish.prompts import read_prompts
from burnish.protocol import TOP, Asking, ImagePart, ImageUrl, Message, encoded, turn
from burnish.rewards.remote import Remote, RemoteConfig
from burnish.rewards.vlm import Judge, Vlm
from burnish.serving.answering import AnswerQueue, Writer
from burnish.serving.server import app, check_token, serve
from burnish.serving.translation import Limits, Question, Written
from burnish.types import Failed, Scored, ScoreRequest

TOKEN = "a-token-of-the-tests"
LIMITS = Limits(body=200_000, pixels=100_000, tokens=64, pictures=3, batch=4, seconds=5.0)
PROMPTS = read_prompts(located("embedded:prompts/held-out.jsonl"))


def requests(count: int = 3) -> list[ScoreRequest]:
    """Pictures of several brightnesses, for drawing and for editing, also from two sources."""
    edits = PROMPTS[-count:]
    several = replace(edits[0], id="several", sources=(*edits[0].sources, *PROMPTS[-9].sources))
    chosen = [*PROMPTS[:count], *edits, several]
    return [
        ScoreRequest(prompt=prompt, image=torch.full((3, 64, 64), (n + 1) / (len(chosen) + 1)))
        for n, prompt in enumerate(chosen)
    ]


class Running:
    """A server of this process on a free port."""

    def __init__(self, served: Any, **settings: Any) -> None:
        config = uvicorn.Config(
            served, **{**settings, "host": "127.0.0.1", "port": 0, "log_level": "error"}
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """Stop it."""
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture(scope="module")
def judge(small_judge: Path) -> Judge:
    return Judge.load(small_judge)


@pytest.fixture(scope="module")
def running(judge: Judge) -> Iterator[Running]:
    server = Running(app(judge, name="small", token=TOKEN, limits=LIMITS))
    yield server
    server.close()


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60, trust_env=False) as made:
        yield made


def remote(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Remote:
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    fields = {"url": url, "model": "small", "dimension": "alignment", "max_tokens": 32}
    fields |= {"rubric": str(folder / "rubrics" / "alignment.md"), "token_env": "JUDGE_TOKEN"}
    return RemoteConfig(**{**fields, **more}).build()


@pytest.mark.parametrize("reasoning", [True, False])
def test_a_served_judge_gives_the_scores_of_the_same_judge_here(
    reasoning: bool,
    judge: Judge,
    running: Running,
    small_judge: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Vlm(judge, "alignment", reasoning=reasoning).score(requests())
    reward = remote(running.url, small_judge, monkeypatch, reasoning=reasoning)
    there = reward.score(requests())
    agreed = reward._agreed
    assert agreed and agreed.asking.digits == "exact"
    assert agreed.asking.form == ("whole" if reasoning else "bare")
    for near, far in zip(here, there, strict=True):
        assert isinstance(near, Scored) and isinstance(far, Scored)
        assert far.value == pytest.approx(near.value, abs=1e-4)
        assert far.detail["mass"] == pytest.approx(near.detail["mass"], abs=1e-4)
        assert far.note == near.note
    values = [score.value for score in here if isinstance(score, Scored)]
    assert max(values) - min(values) > 0.5, "a judge that says one thing of all proves nothing"


@pytest.mark.parametrize("form", [("whole", "top"), ("continued", "exact"), ("continued", "top")])
def test_every_form_of_question_gives_the_same_score(
    form: tuple[str, str],
    judge: Judge,
    running: Running,
    small_judge: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("burnish.handshake.ladder", lambda **_: [form])
    here = Vlm(judge, "alignment").score(requests(1))
    there = remote(running.url, small_judge, monkeypatch).score(requests(1))
    for near, far in zip(here, there, strict=True):
        assert isinstance(near, Scored) and isinstance(far, Scored)
        assert far.value == pytest.approx(near.value, abs=1e-4) and far.note == near.note


def test_a_wrong_token_stops_the_asker(
    running: Running, small_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = remote(running.url, small_judge, monkeypatch)
    monkeypatch.setenv("JUDGE_TOKEN", "another-token-of-the-tests")
    with pytest.raises(ConfigError, match="need a token"):
        remote(running.url, small_judge, monkeypatch, token_env=None).score(requests(1))
    assert isinstance(reward.score(requests(1))[0], Scored)


# --- The service -----------------------------------------------------------------------------

ROUTES = [("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/v1/chat/completions")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"]
)
def test_nobody_comes_in_without_the_token(
    running: Running, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    reply = httpx.request(method, running.url + path, headers=headers, trust_env=False)
    assert reply.status_code == 401
    assert TOKEN not in reply.text


def test_health_tells_nothing_and_there_are_no_other_pages(running: Running) -> None:
    reply = httpx.get(f"{running.url}/health", trust_env=False)
    assert reply.json() == {"status": "ok"}
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert httpx.get(running.url + path, trust_env=False).status_code == 404


@pytest.mark.parametrize(
    ("token", "host", "is_open", "message"),
    [
        (None, "127.0.0.1", False, "need a token, got none"),
        ("", "127.0.0.1", False, "need a token, got none"),
        (None, "0.0.0.0", True, "need a token on 0.0.0.0"),
        (None, "example.org", True, "need a token on example.org"),
        ("short", "127.0.0.1", False, "of 16 or more"),
    ],
)
def test_an_unprotected_server_does_not_start(
    token: str | None, host: str, is_open: bool, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_token(token, host, is_open=is_open)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_it_may_be_open_when_told_so(host: str) -> None:
    check_token(None, host, is_open=True)
    check_token(TOKEN, "0.0.0.0", is_open=False)


# --- What comes in ---------------------------------------------------------------------------


def png(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def body(judge: Judge, **changes: Any) -> dict[str, Any]:
    """A request as `remote` sends it."""
    alphabet = Alphabet.of(judge.processor.tokenizer)
    asked = turn(judge.rubric("alignment"), PROMPTS[0], [png()])
    return {**Asking("small", "bare", "exact", alphabet, 32).digit(asked, "", 0).body(), **changes}


def url_body(judge: Judge, url: str) -> dict[str, Any]:
    changed = body(judge)
    changed["messages"][0]["content"][0]["image_url"]["url"] = url
    return changed


def test_a_good_request_is_answered(judge: Judge, client: httpx.Client) -> None:
    reply = client.post("/v1/chat/completions", json=body(judge))
    assert reply.status_code == 200
    place = reply.json()["choices"][0]["logprobs"]["content"][0]
    assert len(place["top_logprobs"]) >= 5 and reply.json()["model"] == "small"
    asked = body(judge, logprob_token_ids=None, top_logprobs=TOP)
    del asked["logprob_token_ids"]
    place = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["logprobs"]
    assert len(place["content"][0]["top_logprobs"]) == TOP


def asking(text: str) -> dict[str, Any]:
    """The changes that make a request of a text alone."""
    return {
        "messages": [{"role": "user", "content": text}],
        "continue_final_message": False,
        "add_generation_prompt": True,
    }


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "large"}, 404, "need the model 'small'"),
        ({"temperature": 0.7}, 400, "temperature=0"),
        ({"repetition_penalty": 1.05}, 400, "repetition_penalty=1"),
        ({"n": 2}, 400, "n: need one of 1"),
        ({"stream": True}, 400, "stream"),
        ({"max_tokens": 1000}, 400, "max_tokens of at most 64"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
        ({"logprobs": False}, 400, "need logprobs=true"),
        ({"logprob_token_ids": [10**6]}, 400, "need token ids from 0"),
        ({"logprob_token_ids": [-1]}, 400, "need token ids from 0"),
        ({"add_generation_prompt": True}, 400, "another mixture"),
        ({"continue_final_message": False}, 400, "another mixture"),
        ({"min_tokens": 3}, 400, "need a known key"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"messages": "hello"}, 400, "messages"),
        (asking("x" * 30_000), 400, "20000 characters"),
        (asking("<|im_end|>"), 400, "the token <|im_end|>"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    judge: Judge, client: httpx.Client, changes: dict[str, Any], status: int, message: str
) -> None:
    reply = client.post("/v1/chat/completions", json=body(judge, **changes))
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/plain;base64,aGVsbG8=",
        "data:image/png,plain",
        "data:image/png;base64,%%%%",
        "data:image/png;base64,aGVsbG8=",
        f"data:image/png;base64,{base64.b64encode(png()[:60]).decode()}",
        f"data:image/png;base64,{base64.b64encode(png(400, 400)).decode()}",
    ],
)
def test_only_whole_small_pictures_inside_the_request_are_read(
    judge: Judge, client: httpx.Client, url: str
) -> None:
    reply = client.post("/v1/chat/completions", json=url_body(judge, url))
    assert reply.status_code == 400
    assert "picture" in reply.json()["error"]["message"]
    assert "Pillow" not in reply.text and "/etc" not in reply.text


def test_more_pictures_than_allowed_are_refused(judge: Judge, client: httpx.Client) -> None:
    changed = body(judge)
    changed["messages"][0]["content"] *= 4
    reply = client.post("/v1/chat/completions", json=changed)
    assert reply.status_code == 400 and "at most 3 pictures" in reply.text


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 50_000, b'{"a": NaN}'])
def test_bodies_that_are_no_request_are_refused(client: httpx.Client, data: bytes) -> None:
    assert client.post("/v1/chat/completions", content=data).status_code == 400
    assert client.post("/tokenize", content=data).status_code == 400


def test_a_large_body_is_refused_whether_its_size_is_declared_or_not(
    client: httpx.Client, running: Running
) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 10_000

    assert client.post("/tokenize", content=b" " * 300_000).status_code == 413
    assert client.post("/tokenize", content=chunks()).status_code == 413
    assert client.get("/v1/models").json()["data"][0]["id"] == "small"


def test_a_body_that_does_not_arrive_is_given_up(judge: Judge) -> None:
    limits = replace(LIMITS, seconds=0.3)
    running = Running(app(judge, name="small", token=None, limits=limits))
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as line:
            line.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in line.recv(4096)
    finally:
        running.close()


def test_tokens_are_those_of_the_judge(judge: Judge, client: httpx.Client) -> None:
    asked = {"model": "small", "prompt": f"{MARKER}5", "add_special_tokens": False}
    reply = client.post("/tokenize", json=asked).json()
    assert reply["tokens"] == judge.processor.tokenizer(f"{MARKER}5")["input_ids"]
    assert reply["count"] == len(reply["tokens"])


def test_who_asks_for_tokens_does_not_change_how_the_judge_pads(
    judge: Judge, client: httpx.Client
) -> None:
    """The judge's thread would find its batch without padding."""
    tokenizer = judge.processor.tokenizer
    tokenizer(["five", "six pictures"], padding=True, padding_side="left")
    before = tokenizer.backend_tokenizer.padding
    asked = {"model": "small", "prompt": "five", "add_special_tokens": False}
    assert client.post("/tokenize", json=asked).json()["count"] > 0
    assert before and tokenizer.backend_tokenizer.padding == before


# --- The queue and the model -----------------------------------------------------------------


class Blocked:
    """A writer that waits to be let go."""

    def __init__(self, _: Any = None) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def __call__(self, questions: Sequence[Question]) -> list[Written]:
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([question.text for question in questions])
        if any(question.text == "poison" for question in questions):
            raise RuntimeError("a poison picture")
        return [Written(text=question.text.upper()) for question in questions]


def plain(text: str, **more: Any) -> Question:
    return Question(text=text, pictures=(), max_tokens=4, **more)


def test_questions_that_wait_are_written_together_and_poison_fails_alone() -> None:
    write = Blocked()
    answers = AnswerQueue(write, places=8, batch=8)
    answers.open()
    first = answers.ask(plain("first"))
    assert write.begun.wait(30)
    futures = [answers.ask(plain(text)) for text in ("a", "poison", "gone", "b")]
    other = answers.ask(plain("c", top=3))
    assert futures[2].cancel()
    write.go.set()
    assert first.result(30).text == "FIRST"
    assert [futures[n].result(30).text for n in (0, 3)] == ["A", "B"]
    assert other.result(30).text == "C"
    with pytest.raises(RuntimeError, match="poison"):
        futures[1].result(30)
    assert write.batches[1] == ["a", "poison", "b"]
    assert all("gone" not in batch for batch in write.batches)
    answers.close()


def test_what_breaks_the_model_is_out_of_memory_before_the_next_question() -> None:
    """A card has room for the tensors of one try, the failed batch's or a single question's."""
    tensors: list[weakref.ref[torch.Tensor]] = []
    alive: list[tuple[int, int]] = []

    def write(questions: Sequence[Question]) -> list[Written]:
        large = torch.zeros(8)
        tensors.append(weakref.ref(large))
        alive.append((len(questions), sum(known() is not None for known in tensors)))
        if len(questions) > 1 or questions[0].text == "too large":
            raise torch.OutOfMemoryError("too large")
        return [Written(text="fine")]

    answers = AnswerQueue(write, places=8, batch=8)
    futures = [answers.ask(plain(text)) for text in ("a", "too large", "b")]
    answers.open()
    assert [futures[n].result(30).text for n in (0, 2)] == ["fine", "fine"]
    with pytest.raises(torch.OutOfMemoryError):
        futures[1].result(30)
    answers.close()
    assert alive == [(3, 1), (1, 1), (1, 1), (1, 1)]


def test_a_closed_desk_gives_up_what_waits() -> None:
    write = Blocked()
    answers = AnswerQueue(write, places=8, batch=1)
    answers.open()
    first, second = answers.ask(plain("first")), answers.ask(plain("second"))
    assert write.begun.wait(30)
    closing = threading.Thread(target=answers.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(30)
    write.go.set()
    closing.join(30)
    assert first.result(30).text == "FIRST" and not closing.is_alive()


def test_a_full_queue_refuses_and_says_when_to_come_back(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Blocked()
    monkeypatch.setattr("burnish.serving.server.Writer", lambda _: write)
    limits = replace(LIMITS, waiting=1)
    running = Running(app(judge, name="small", token=None, limits=limits))
    asked = body(judge)

    async def ask_five() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as client:

            def ask() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/chat/completions", json=asked))

            first = ask()
            await asyncio.to_thread(write.begun.wait, 30)
            # One is being written, one waits, and three are too many.
            others = [ask() for _ in range(4)]
            while sum(task.done() for task in others) < 3:
                await asyncio.sleep(0.05)
            write.go.set()
            return [await first, *[await task for task in others]]

    try:
        replies = asyncio.run(ask_five())
    finally:
        write.go.set()
        running.close()
    assert sorted(reply.status_code for reply in replies) == [200, 200, 503, 503, 503]
    refused = [reply for reply in replies if reply.status_code == 503]
    assert all(
        reply.headers["Retry-After"] == "1" and "too many" in reply.text for reply in refused
    )


def test_connections_of_many_askers_are_no_reason_to_refuse(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where bodies are too many, the refusal says when to come back."""
    started: list[Running] = []
    monkeypatch.setattr(
        uvicorn, "run", lambda app, **settings: started.append(Running(app, **settings))
    )
    serve(judge, name="small", token=TOKEN, limits=replace(LIMITS, waiting=1))
    (running,) = started
    begun = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    asked = {"model": "small", "prompt": "five"}

    def tokenize() -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.post(f"{running.url}/tokenize", json=asked, headers=headers, trust_env=False)

    with contextlib.ExitStack() as lines:

        def connect() -> socket.socket:
            line = socket.create_connection(("127.0.0.1", running.port), timeout=20)
            return lines.enter_context(line)

        lines.callback(running.close)
        _ = [connect() for _ in range(6)]
        assert tokenize().status_code == 200
        for _ in range(2):
            connect().sendall(f"{begun}Content-Length: 100\r\n\r\n{{".encode())
        while (refused := tokenize()).status_code == 200:
            time.sleep(0.02)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"


def test_scores_of_more_askers_than_places_only_come_later(
    judge: Judge, small_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting is neither a try nor a failure of the server."""

    class Slow(Writer):
        def __call__(self, questions: Sequence[Question]) -> list[Written]:
            time.sleep(0.2)
            return super().__call__(questions)

    monkeypatch.setattr("burnish.serving.server.Writer", Slow)
    limits = replace(LIMITS, waiting=2, batch=1)
    running = Running(app(judge, name="small", token=TOKEN, limits=limits))
    fields = {"concurrency": 5, "retries": 0, "failures": 6, "reasoning": False}
    try:
        reward = remote(running.url, small_judge, monkeypatch, **fields)
        asked = [replace(requests(1)[0], image=torch.full((3, 64, 64), n / 8)) for n in range(8)]
        scores = reward.score(asked)
    finally:
        running.close()
    assert all(isinstance(score, Scored) for score in scores), scores


def test_a_full_desk_raises() -> None:
    answers = AnswerQueue(Blocked(), places=1, batch=1)
    answers.ask(plain("first"))
    assert answers.is_full
    with pytest.raises(queue.Full):
        answers.ask(plain("second"))


def test_a_question_that_breaks_the_model_tells_nothing_of_it(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Blocked()
    write.go.set()

    def broken(questions: Sequence[Question]) -> list[Written]:
        raise RuntimeError("/secret/path: out of memory")

    monkeypatch.setattr("burnish.serving.server.Writer", lambda _: broken)
    running = Running(app(judge, name="small", token=None, limits=LIMITS))
    try:
        url = f"{running.url}/v1/chat/completions"
        reply = httpx.post(url, json=body(judge), trust_env=False)
    finally:
        running.close()
    assert reply.status_code == 500 and "secret" not in reply.text


def asked_of(judge: Judge, request: ScoreRequest, **more: Any) -> Question:
    """A question as the translator would put it."""
    prompt = request.prompt
    asked = question(judge.rubric("alignment"), prompt.text, num_sources=len(prompt.sources))
    chat = [{"role": "user", "content": asked}]
    text = judge.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    shown = tuple(images.decode(data, where="test") for data in encoded(request))
    return Question(text=text, pictures=shown, max_tokens=32, **more)


def test_answers_written_together_are_those_written_alone(judge: Judge) -> None:
    ids = Alphabet.of(judge.processor.tokenizer).digits
    questions = [asked_of(judge, request, ids=ids) for request in requests(3)[:3]]
    write = Writer(judge)
    for alone, together in zip([write([q])[0] for q in questions], write(questions), strict=True):
        assert (alone.text, alone.tokens, alone.stop) == (
            together.text,
            together.tokens,
            together.stop,
        )
        assert alone.num_asked == together.num_asked and not alone.is_cut_off
        for one, other in zip(alone.log_probs, together.log_probs, strict=True):
            assert one.keys() == other.keys()
            assert all(one[token] == pytest.approx(other[token], abs=1e-3) for token in one)


def test_an_answer_ends_with_its_stop_text_or_its_last_token(judge: Judge) -> None:
    request = requests(1)[0]
    write = Writer(judge)
    (stopped,) = write([asked_of(judge, request, stops=(MARKER,))])
    assert stopped.text == f"ok.{MARKER}" and stopped.stop == MARKER
    (cut,) = write([replace(asked_of(judge, request), max_tokens=2)])
    assert cut.text == "ok" and cut.is_cut_off and cut.stop is None
    (whole,) = write([asked_of(judge, request)])
    assert whole.text.startswith(f"ok.{MARKER}") and len(whole.text) == len(cut.text) + 10


def test_a_picture_in_a_turn_is_read_where_it_stands(judge: Judge) -> None:
    message = Message(
        role="user", content=(ImagePart(image_url=ImageUrl(url=images.data_url(png()))),)
    )
    assert json.loads(message.model_dump_json())["content"][0]["type"] == "image_url"


def test_a_picture_that_is_none_fails_by_name_at_the_asker(
    running: Running, small_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(1)[0]
    broken = replace(asked, image=torch.full((3, 64, 64), torch.nan))
    good, bad = remote(running.url, small_judge, monkeypatch).score([asked, broken])
    assert isinstance(good, Scored) and isinstance(bad, Failed) and "finite" in bad.reason
