"""A judge's server in vLLM's manner, on a real socket of this machine, that can be made to fail.

It knows no model: what it says of a picture follows from the bytes of the picture and the words of
the question, so that answers that got mixed up would be noticed. Its tokens are bytes.
"""

import base64
import hashlib
import json
import math
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.judging import MARKER, SCALE
from burnish.types import Group, Prompt, Trajectory

REASONING = "26 of 30 stars."
"""Holds numbers that are no score."""
END = 300
"""The token that ends an answer."""
OTHERS = tuple(range(301, 320))
"""Tokens that no answer holds."""


class Exchange:
    """One request to the fake, and the ways to answer it, good and bad."""

    def __init__(self, handler: BaseHTTPRequestHandler, fake: "FakeJudge", body: Any) -> None:
        self.handler, self.fake, self.body = handler, fake, body
        self.path = handler.path
        self.picture = picture_of(body)
        self.number = 0
        """How often this picture was asked about before."""

    def reply(self) -> dict[str, Any]:
        """The right answer."""
        return self.fake.reply(self.body)

    def send(self, status: int, payload: Any, **headers: str) -> None:
        """An answer with this status; payloads that are no bytes become JSON."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.handler.send_response(status)
        self.handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(data)

    def proper(self) -> None:
        """Answer as a server should."""
        self.send(200, self.reply())

    def reset(self) -> None:
        """Break the connection."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # Under the handler's hands: its own way of closing says goodbye first.
        os.close(self.handler.connection.detach())
        self.handler.close_connection = True

    def hang(self) -> None:
        """Never answer, until the server is closed."""
        self.fake.closing.wait(60)
        self.handler.close_connection = True


def picture_of(body: Any) -> str:
    """The hash of the judged picture in a body; empty where there is none."""
    messages = body.get("messages", []) if isinstance(body, dict) else []
    for message in messages[:1]:
        urls = [p["image_url"]["url"] for p in message["content"] if p["type"] == "image_url"]
        if urls:
            return hashlib.sha256(base64.b64decode(urls[-1].split(",")[1])).hexdigest()
    return ""


class FakeJudge:
    """The server; `fault` decides what happens to the pictures it is told of."""

    def __init__(self, port: int = 0, model: str = "judge") -> None:
        self.model, self.token = model, ""
        self.knows_ids = True
        """Whether it honours `logprob_token_ids`."""
        self.tells_ids = True
        """Whether it tells tokens by their ids."""
        self.has_tokenizer = True
        self.splits = False
        """Whether its tokenizer splits digits."""
        self.mood = ""
        """Another mood is another judge."""
        self.fault: Callable[[Exchange], None] | None = None
        self.poisoned: str | None = None
        """The one picture that the fault hits; None for all."""
        self.bodies: list[Any] = []
        self.paths: Counter[str] = Counter()
        self.closing = threading.Event()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.answer(Exchange(self, fake, None))

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                fake.answer(Exchange(self, fake, json.loads(data)))

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # Faults break connections under the handlers on purpose.
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, exchange: Exchange) -> None:
        """Answer a request, or do to it what the fault says."""
        path, body = exchange.path, exchange.body
        with self._lock:
            self.paths[path] += 1
            if exchange.picture:
                exchange.number = self._asked[exchange.picture]
                self._asked[exchange.picture] += 1
                self.bodies.append(body)
        is_hit = exchange.picture and self.poisoned in (None, exchange.picture)
        given = exchange.handler.headers.get("Authorization", "")
        if self.token and given != f"Bearer {self.token}":
            exchange.send(401, {"error": {"message": f"wrong token {given}"}})
        elif self.fault is not None and is_hit:
            self.fault(exchange)
        elif path == "/v1/models":
            exchange.send(200, {"object": "list", "data": [{"id": self.model}]})
        elif path == "/tokenize" and self.has_tokenizer:
            tokens = [byte for byte in body["prompt"].encode() for _ in range(1 + self.splits)]
            exchange.send(200, {"count": len(tokens), "max_model_len": 4096, "tokens": tokens})
        elif path == "/v1/chat/completions":
            exchange.proper()
        else:
            exchange.send(404, {"detail": "Not Found"})

    def recount(self) -> None:
        """Forget what was asked so far."""
        with self._lock:
            self._asked.clear()
            self.paths.clear()
            self.bodies.clear()

    def times(self, picture: str) -> int:
        """How often a picture was asked about."""
        with self._lock:
            return self._asked[picture]

    def log_probs(self, body: Any) -> dict[int, float]:
        """Token -> log-probability at the digit's place; 0.98 of the mass lies on the digits."""
        words = [p["text"] for p in body["messages"][0]["content"] if p["type"] == "text"]
        seed = hashlib.sha256(f"{picture_of(body)}{words}{self.mood}".encode()).digest()
        weights = {ord(str(number)): 1 + seed[number] for number in SCALE}
        total = sum(weights.values())
        told = {token: math.log(0.98 * w / total) for token, w in weights.items()}
        return told | {token: math.log(0.02 / len(OTHERS)) for token in OTHERS}

    def reply(self, body: Any) -> dict[str, Any]:
        """The right answer to a body, in the form it asks for."""
        known = self.log_probs(body)
        digit = max(known, key=lambda token: known[token])
        stops = body.get("stop") or []
        if body["continue_final_message"]:
            return self._reply(body, chr(digit), [(digit, known)], "length")
        if MARKER in stops:
            text = REASONING + (MARKER if body["include_stop_str_in_output"] else "")
            return self._reply(body, text, [], "stop", MARKER)
        written = f"{REASONING}{MARKER}".encode()
        sure = dict.fromkeys((*map(ord, "12345"), *OTHERS), -20.0)
        places: list[tuple[int, dict[int, float]]] = [(t, {**sure, t: -0.001}) for t in written]
        places += [(digit, known), (END, {**sure, END: -0.001})]
        return self._reply(body, written.decode() + chr(digit), places, "stop")

    def _reply(
        self,
        body: Any,
        text: str,
        places: Sequence[tuple[int, dict[int, float]]],
        finish: str,
        stop: str | None = None,
    ) -> dict[str, Any]:
        told = [self._place(body, token, known) for token, known in places]
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": {"content": told} if body["logprobs"] else None,
                    "finish_reason": finish,
                    "stop_reason": stop,
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": len(places)},
        }

    def _place(self, body: Any, token: int, known: dict[int, float]) -> dict[str, Any]:
        def name(number: int) -> str:
            if self.tells_ids and body.get("return_tokens_as_token_ids"):
                return f"token_id:{number}"
            return chr(number)

        ids = body.get("logprob_token_ids") if self.knows_ids else None
        if ids is None:
            # An older server has never heard of the ids, and nobody asked it for the most likely.
            ids = sorted(known, key=lambda t: -known[t])[: body.get("top_logprobs", 0)]
        others = [{"token": name(number), "logprob": known[number]} for number in ids]
        return {"token": name(token), "logprob": known[token], "bytes": None} | {
            "top_logprobs": others
        }


@pytest.fixture
def start_fake() -> Iterator[Callable[..., FakeJudge]]:
    """Starts servers for one test; call it with a port to come back at the same place."""
    started: list[FakeJudge] = []

    def start(**settings: Any) -> FakeJudge:
        started.append(FakeJudge(**settings))
        return started[-1]

    yield start
    for server in started:
        if not server.closing.is_set():
            server.close()


@pytest.fixture
def fake(start_fake: Callable[..., FakeJudge]) -> FakeJudge:
    """A server of its own for one test."""
    return start_fake()


@pytest.fixture(scope="session")
def rubric(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The instructions of one dimension."""
    path = tmp_path_factory.mktemp("rubrics") / "alignment.md"
    path.write_text("Is everything there?")
    return path


@pytest.fixture
def grouped() -> Callable[[Prompt, Sequence[Tensor]], Group]:
    """A group whose trajectories have images and nothing else."""
    empty, steps = torch.zeros(0), torch.zeros(0, 2, 2)

    def make(prompt: Prompt, drawn: Sequence[Tensor]) -> Group:
        return Group(
            prompt=prompt,
            trajectories=tuple(
                Trajectory(
                    seed=number,
                    latents=steps,
                    sigmas=empty,
                    sigmas_next=empty,
                    noise=steps,
                    guided=steps,
                    conditional=steps,
                    unconditional=steps,
                    clean=torch.zeros(2, 2),
                    image=image,
                )
                for number, image in enumerate(drawn)
            ),
        )

    return make
