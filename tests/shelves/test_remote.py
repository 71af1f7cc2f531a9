"""A judge on a server that fails in every way we could think of: no failure becomes a number.

Each fault is a case of one list. For each the same five pictures are scored by a real server on
this machine, which misbehaves for one of them or for all; the others must get the very scores of
the run without a fault. `test_the_table_of_faults` writes what was seen as Markdown, to the path in
the environment variable BURNISH_FAULT_TABLE where there is one.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import images
from burnish.algorithms.base import AdvantagesConfig, reward_advantages
from burnish.config import ConfigError, config_hash, dump_yaml
from burnish.endpoint import MAX_REPLY
from burnish.handshake import scored
from burnish.judging import MARKER, SCALE, Alphabet, Calibration
from burnish.protocol import (
    Answer,
    Asking,
    Message,
    encoded,
    read_digit,
    read_reply,
    read_whole,
)
from burnish.rewards.base import AsyncRewardSet, RewardSet
from burnish.rewards.remote import Knots, Remote, RemoteConfig
from burnish.runtime import ALONE
from burnish.types import Failed, Group, Prompt, Score, Scored, ScoreRequest

HIT = 2
"""The picture that a fault hits."""
QUICK: dict[str, Any] = {"timeout": 20.0, "deadline": 60.0, "retries": 2, "pause": 0.02}
QUICK |= {"concurrency": 3, "failures": 40}
IMPATIENT: dict[str, Any] = {"timeout": 2.5, "retries": 1}
Fault = Callable[[Any], None]


def pictures(count: int = 5) -> list[ScoreRequest]:
    draws = torch.Generator().manual_seed(3)
    return [
        ScoreRequest(
            prompt=Prompt(id=str(number), text=f"star {number}"),
            image=torch.rand(3, 32, 32, generator=draws),
        )
        for number in range(count)
    ]


def hash_of(request: ScoreRequest) -> str:
    return hashlib.sha256(encoded(request)[-1]).hexdigest()


@pytest.fixture
def build(rubric: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Remote]:
    """Builds the reward that asks a fake."""
    monkeypatch.setenv("JUDGE_TOKEN", "canary-0123456789")

    def make(fake: Any, **settings: Any) -> Remote:
        fields = {"url": fake.url, "model": "judge", "dimension": "alignment"}
        return RemoteConfig(**{**fields, "rubric": str(rubric), **QUICK, **settings}).build()

    return make


# --- The faults ------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any], Any], Any]) -> Fault:
    """Answer with a reply that `change(reply, exchange)` has spoilt."""

    def fault(exchange: Any) -> None:
        reply = exchange.reply()
        spoilt = change(reply, exchange)
        exchange.send(200, reply if spoilt is None else spoilt)

    return fault


def first(times: int, fault: Fault) -> Fault:
    """Only the first times that a picture is asked about."""
    return lambda exchange: fault(exchange) if exchange.number < times else exchange.proper()


def status(code: int, payload: Any = b"", **headers: str) -> Fault:
    return lambda exchange: exchange.send(code, payload, **headers)


def choice(reply: dict[str, Any]) -> dict[str, Any]:
    return reply["choices"][0]


def digit_place(reply: dict[str, Any]) -> dict[str, Any]:
    """The place of the digit: the last but one, before the end of the turn."""
    return choice(reply)["logprobs"]["content"][-2]


def told(value: Any, digit: int = 1) -> Fault:
    """Another log-probability of one digit."""

    def change(reply: dict[str, Any], _: Any) -> None:
        name = f"token_id:{ord(str(digit))}"
        place = digit_place(reply)
        for entry in (place, *place["top_logprobs"]):
            if entry["token"] == name:
                entry["logprob"] = value

    return changed(change)


def shifted(by: float) -> Fault:
    def change(reply: dict[str, Any], _: Any) -> None:
        for entry in (digit_place(reply), *digit_place(reply)["top_logprobs"]):
            entry["logprob"] += by

    return changed(change)


def written(text: str) -> Fault:
    """Other words, spelled in tokens as they stand, each digit as unsure as the right one."""

    def change(reply: dict[str, Any], exchange: Any) -> None:
        choice(reply)["message"]["content"] = text
        if choice(reply)["logprobs"] is None:
            choice(reply)["stop_reason"] = None
            return
        known = digit_place(reply)["top_logprobs"]
        choice(reply)["logprobs"]["content"] = [
            {"token": f"token_id:{byte}", "logprob": -1.0, "top_logprobs": known}
            for byte in text.encode()
        ]
        for place in choice(reply)["logprobs"]["content"]:
            likely = {entry["token"]: entry["logprob"] for entry in known}
            place["logprob"] = likely.get(place["token"], -1.0)

    return changed(change)


def without_digit(reply: dict[str, Any], _: Any) -> None:
    """The token of one digit is not told, not even as the written one."""
    place = digit_place(reply)
    place["token"] = "token_id:999"
    place["top_logprobs"] = [e for e in place["top_logprobs"] if e["token"] != "token_id:53"]


def cut_off(reply: dict[str, Any], _: Any) -> None:
    choice(reply)["finish_reason"] = "length"
    choice(reply)["message"]["content"] = "I see"
    choice(reply)["logprobs"]["content"] = choice(reply)["logprobs"]["content"][:5]


def content(text: str | None) -> Fault:
    return changed(lambda reply, _: choice(reply)["message"].update(content=text))


def partial(exchange: Any) -> None:
    """Promise more than is sent, then break the connection."""
    exchange.handler.send_response(200)
    exchange.handler.send_header("Content-Length", "5000")
    exchange.handler.end_headers()
    exchange.handler.wfile.write(b'{"model": ')
    exchange.reset()


def slow(exchange: Any) -> None:
    """One byte after the other, each in time."""
    data = json.dumps(exchange.reply()).encode()
    exchange.handler.send_response(200)
    exchange.handler.send_header("Content-Length", str(len(data)))
    exchange.handler.end_headers()
    exchange.handler.close_connection = True
    for byte in data:
        exchange.handler.wfile.write(bytes([byte]))
        if exchange.fake.closing.wait(0.1):
            return


def oversized(exchange: Any) -> None:
    exchange.handler.send_response(200)
    exchange.handler.send_header("Content-Length", str(MAX_REPLY * 2))
    exchange.handler.end_headers()
    exchange.handler.close_connection = True
    for _ in range(2 * MAX_REPLY >> 20):
        exchange.handler.wfile.write(b" " * (1 << 20))


def no_http(exchange: Any) -> None:
    exchange.handler.wfile.write(b"220 mail server ready\r\n")
    exchange.handler.close_connection = True


def late(exchange: Any) -> None:
    """Pictures are answered in another order than they were asked about."""
    time.sleep(0.3 * (int(exchange.picture[:4], 16) % 3))
    exchange.proper()


def renamed(reply: dict[str, Any], _: Any) -> None:
    reply["model"] = "another"


@dataclass(frozen=True)
class Case:
    """One fault and what must come of it."""

    name: str
    fault: Fault
    expected: str
    """`same`: the score of the run without a fault; `failed` or `stopped`: that, with `reason`."""
    reason: str = ""
    is_everywhere: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    tries: int | None = None
    """Requests for the picture that was hit."""


CASES = [
    Case("connection reset, always", lambda x: x.reset(), "failed", "after 3 tries", tries=3),
    Case("connection reset, once", first(1, lambda x: x.reset()), "same", tries=2),
    Case("connection broken in the body", partial, "failed", "after 3 tries"),
    Case("no answer, ever", lambda x: x.hang(), "failed", "no answer in 2.5 s", False, IMPATIENT),
    Case("body one byte at a time", slow, "failed", "no answer in 2.5 s", False, IMPATIENT),
    Case("something else than HTTP", no_http, "failed", "after 3 tries"),
    Case("429 with Retry-After, once", first(1, status(429, Retry_After="0.4")), "same", tries=2),
    Case("429 with an hour to wait", status(429, Retry_After="3600"), "failed", "429", tries=1),
    Case("408, once", first(1, status(408)), "same", tries=2),
    Case("503 twice, then fine", first(2, status(503)), "same", tries=3),
    Case("503 for ever", status(503), "failed", "status 503, after 3 tries", tries=3),
    Case("500 for one picture (poison)", status(500), "failed", "status 500", tries=3),
    Case("no choice", changed(lambda r, _: r.update(choices=[])), "failed", "got 0", tries=2),
    Case("two choices", changed(lambda r, _: r["choices"].append(choice(r))), "failed", "got 2"),
    Case("answers in another order", late, "same", is_everywhere=True),
    Case("log-probability NaN", told(math.nan), "failed", "at most 0"),
    Case("log-probability above 0", told(0.7), "failed", "at most 0"),
    Case("log-probability in quotes", told("-0.5"), "failed", "another shape"),
    Case("log-probability null", told(None), "failed", "another shape"),
    Case("mass below 0.9", shifted(-0.2), "failed", "of the probability on the digits"),
    Case("mass above 1", shifted(0.3), "failed", "sum to at most 1"),
    Case("score 26", written(f"Good.{MARKER}26"), "failed", "got '26'", tries=2),
    Case("score 4.5", written(f"Good.{MARKER}4.5"), "failed", "got '4.5'"),
    Case("score 26 in the words alone", written("I give it 26."), "failed", "got 0"),
    Case("two markers", written(f"a{MARKER}5 or{MARKER}1"), "failed", "got 2", tries=2),
    Case("no marker", written("A fine picture."), "failed", "one score marker"),
    Case("marker at the very end", written(f"Good.{MARKER}"), "failed", "cut off"),
    Case("a digit is not told", changed(without_digit), "failed", "all five digits"),
    Case("cut off before the score", changed(cut_off), "failed", "cut off before its score"),
    Case("empty answer", content(""), "failed", "need words"),
    Case("no answer in the reply", content(None), "failed", "need words"),
    Case(
        "refusal",
        changed(lambda r, _: choice(r)["message"].update(refusal="I cannot\nhelp")),
        "failed",
        "refused: I cannot help",
    ),
    Case("refusal in words", written("I'm sorry, I cannot rate this."), "failed", "got 0"),
    Case("unreadable once", first(1, content("")), "same", tries=2),
    Case("malformed JSON", status(200, b'{"model": "judge", '), "failed", "need JSON", tries=2),
    Case("JSON of another shape", status(200, [1, 2]), "failed", "another shape at the top"),
    Case("answer of 32 MB", oversized, "failed", f"at most {MAX_REPLY} bytes", tries=2),
    Case("another model after a restart", changed(renamed), "stopped", "'another', not 'judge'"),
    Case("token refused (401)", status(401), "stopped", "check the variable of `token_env`"),
    Case("token without rights (403)", status(403), "stopped", "need a token"),
    Case("unknown model (404)", status(404), "stopped", "status 404"),
    Case("request too large (413)", status(413), "failed", "within the server's limit", tries=1),
    Case("request refused (400)", status(400, {"message": "no"}), "failed", '"message": "no"'),
    Case("request refused (422)", status(422), "failed", "refuses the question", tries=1),
    Case("all prompts refused (400)", status(400), "stopped", "status 400", is_everywhere=True),
    Case("redirect", status(307, Location="http://127.0.0.1:1/"), "stopped", "a redirect"),
]


@dataclass(frozen=True)
class Seen:
    """What came of a case."""

    what: str
    words: str
    others: bool
    """Whether the other pictures got the scores of the run without a fault."""
    tries: int


SEEN: dict[str, Seen] = {}
CLEAN: list[Score] = []
"""The scores of the run without a fault; every fake gives the same."""


def observe(case: Case, build: Callable[..., Remote], fake: Any) -> Seen:
    """Run a case; the judge has shaken hands before the fault begins."""
    if case.name in SEEN:
        return SEEN[case.name]
    asked = pictures()
    if not CLEAN:
        CLEAN.extend(build(fake).score(asked))
    expected = CLEAN
    assert all(isinstance(score, Scored) for score in expected)
    remote = build(fake, **case.settings)
    remote.score([replace(asked[0], prompt=Prompt(id="first", text="before the fault"))])
    fake.recount()
    fake.fault, fake.poisoned = case.fault, None if case.is_everywhere else hash_of(asked[HIT])
    try:
        scores = remote.score(asked)
    except ConfigError as error:
        seen = Seen("stopped", str(error), True, 0)
    else:
        others = [score == expected[n] for n, score in enumerate(scores) if n != HIT]
        hit = scores[HIT]
        what = "failed" if isinstance(hit, Failed) else "same" if hit == expected[HIT] else "else"
        words = hit.reason if isinstance(hit, Failed) else ""
        seen = Seen(what, words, all(others), fake.times(hash_of(asked[HIT])))
    SEEN[case.name] = seen
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_mended_named_or_stops_the_run(
    case: Case, build: Callable[..., Remote], fake: Any
) -> None:
    seen = observe(case, build, fake)
    assert seen.what == case.expected, seen
    assert case.reason in seen.words and "\n" not in seen.words
    assert seen.others, "the fault of one picture changed the scores of others"
    if case.tries is not None:
        assert seen.tries == case.tries


def test_the_table_of_faults(
    build: Callable[..., Remote], start_fake: Callable[..., Any], tmp_path: Path
) -> None:
    names = {"same": "scored as without the fault", "failed": "`Failed`", "stopped": "run stops"}
    lines = ["| fault | outcome | said | other pictures |", "|---|---|---|---|"]
    for case in CASES:
        seen = observe(case, build, start_fake())
        said = re.sub(r"http://127\.0\.0\.1:\d+", "URL", seen.words.replace("|", "/"))
        others = (
            "run stops" if seen.what == "stopped" else "unchanged" if seen.others else "CHANGED"
        )
        lines.append(f"| {case.name} | {names[seen.what]} | {said} | {others} |")
    path = Path(os.environ.get("BURNISH_FAULT_TABLE", tmp_path / "faults.md"))
    path.write_text("\n".join(lines) + "\n")
    assert len(CASES) >= 20 and len(path.read_text().splitlines()) == len(CASES) + 2


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_prompt_that_a_server_refuses_fails_alone_even_where_it_is_all_that_is_asked(
    code: int, build: Callable[..., Remote], fake: Any
) -> None:
    """A call is one group in a run, and a run goes on without it."""
    remote = build(fake)
    remote.meet()
    fake.fault = status(code)
    group = [replace(request, prompt=pictures(1)[0].prompt) for request in pictures(3)]
    for asked in (group, group[:1]):
        scores = remote.score(asked)
        assert all(isinstance(s, Failed) and f"status {code}" in s.reason for s in scores)
    with pytest.raises(ConfigError, match=f"status {code}"):
        remote.score(pictures(2))
    fake.fault = None
    assert all(isinstance(score, Scored) for score in remote.score(group))


@pytest.mark.parametrize("name", ["503 for ever", "log-probability NaN", "score 26", "refusal"])
def test_groups_without_the_fault_train_as_without_it(
    name: str,
    build: Callable[..., Remote],
    fake: Any,
    grouped: Callable[..., Group],
) -> None:
    asked = pictures(8)
    groups = [
        grouped(Prompt(id=who, text=f"two of {who}"), [r.image for r in asked[start : start + 4]])
        for who, start in (("hit", 0), ("spared", 4))
    ]

    def advantages(remote: Remote) -> torch.Tensor:
        configs = {"judge": remote._config}
        scored = RewardSet(configs, {"judge": remote}).score(groups)
        return reward_advantages(scored, configs, AdvantagesConfig(), ALONE)[0].advantages

    expected = advantages(build(fake))
    remote = build(fake)
    remote.score(pictures(1))
    fake.fault = next(case.fault for case in CASES if case.name == name)
    fake.poisoned = hash_of(asked[HIT])
    found = advantages(remote)
    assert torch.equal(found[1], expected[1]) and bool((expected[1] != 0).any())
    assert found[0, HIT] == 0 and bool((found[0, [0, 1, 3]] != 0).any())


# --- What a picture can be -------------------------------------------------------------------


def test_a_picture_that_is_none_fails_alone(build: Callable[..., Remote], fake: Any) -> None:
    asked = pictures(3)
    expected = build(fake).score(asked)
    asked.insert(1, replace(asked[0], image=torch.full((3, 32, 32), torch.nan)))
    broken = Prompt(id="e", text="make it red", task="edit", sources=(b"no picture",))
    asked.insert(2, replace(asked[0], prompt=broken))
    scores = build(fake).score(asked)
    assert isinstance(scores[1], Failed) and "finite" in scores[1].reason
    assert isinstance(scores[2], Failed) and "need a whole PNG" in scores[2].reason
    assert [scores[0], *scores[3:]] == expected


# --- The handshake ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "prepare", "message"),
    [
        ({"model": "jugde"}, None, "did you mean 'judge'"),
        ({"token_env": "JUDGE_TOKEN"}, lambda f: setattr(f, "token", "another"), "need a token"),
        ({"golden": {"score": 9.0}}, None, "need 9 within 0.05 for the golden picture"),
        ({"golden": {"image": "nowhere.png"}}, None, "need a readable image file"),
        ({}, lambda f: setattr(f, "fault", status(404)), "status 404"),
        ({}, lambda f: setattr(f, "fault", written("no")), "whole, exact: need one score marker"),
        ({}, lambda f: setattr(f, "fault", status(500)), "got none"),
        ({"deadline": 2.0}, lambda f: setattr(f, "fault", lambda x: x.hang()), "deadline of 2 s"),
        ({}, lambda f: setattr(f, "splits", True), "one token for the digit 1"),
        ({}, lambda f: f.close(), "need a judge at"),
    ],
)
def test_a_server_that_is_no_judge_is_refused_before_the_first_score(
    settings: dict[str, Any],
    prepare: Callable[[Any], None] | None,
    message: str,
    build: Callable[..., Remote],
    fake: Any,
) -> None:
    if prepare:
        prepare(fake)
    with pytest.raises(ConfigError) as caught:
        build(fake, **settings).score(pictures(2))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "flags", "form"),
    [
        ({}, {}, ("whole", "exact")),
        ({}, {"knows_ids": False}, ("whole", "top")),
        ({}, {"tells_ids": False}, ("continued", "exact")),
        ({}, {"tells_ids": False, "knows_ids": False}, ("continued", "top")),
        ({}, {"has_tokenizer": False, "tells_ids": False}, ("continued", "top")),
        ({"reasoning": False}, {}, ("bare", "exact")),
        ({"reasoning": False}, {"has_tokenizer": False}, ("bare", "top")),
    ],
)
def test_each_form_that_a_server_honours_gives_the_same_scores(
    settings: dict[str, Any],
    flags: dict[str, bool],
    form: tuple[str, str],
    build: Callable[..., Remote],
    fake: Any,
) -> None:
    def values(scores: list[Score]) -> list[float]:
        return [score.value for score in scores if isinstance(score, Scored)]

    expected = values(build(fake).score(pictures()))
    for name, value in flags.items():
        setattr(fake, name, value)
    remote = build(fake, **settings)
    assert values(remote.score(pictures())) == expected and len(expected) == 5
    asking = remote._agreed and remote._agreed.asking
    assert asking and (asking.form, asking.digits) == form


def test_a_form_that_a_server_refuses_is_passed_over(
    build: Callable[..., Remote], fake: Any
) -> None:
    def picky(exchange: Any) -> None:
        if "logprob_token_ids" in exchange.body:
            exchange.send(400, {"message": "unknown field"})
        else:
            exchange.proper()

    fake.fault = picky
    assert all(isinstance(score, Scored) for score in build(fake).score(pictures(2)))


def test_a_judge_that_came_back_as_another_one_stops_the_run(
    build: Callable[..., Remote], start_fake: Callable[..., Any]
) -> None:
    before = start_fake()
    remote = build(before, retries=0)
    expected = remote.score(pictures())
    before.close()
    fresh = [replace(r, prompt=Prompt(id=r.prompt.id, text="new")) for r in pictures()]
    assert all(isinstance(score, Failed) for score in remote.score(fresh))
    same = start_fake(port=before.port)
    assert remote.score(pictures()) == expected
    assert all(isinstance(score, Scored) for score in remote.score(fresh))
    same.close()
    fresh = [replace(r, prompt=Prompt(id=r.prompt.id, text="newer")) for r in pictures()]
    assert all(isinstance(score, Failed) for score in remote.score(fresh))
    other = start_fake(port=before.port)
    other.mood = "kind"
    with pytest.raises(ConfigError, match="need the judge of the handshake"):
        remote.score(fresh)


# --- Patience, memory, threads ---------------------------------------------------------------


def test_a_dead_server_is_left_alone_until_a_pause_has_passed(
    build: Callable[..., Remote], fake: Any
) -> None:
    remote = build(fake, retries=1, failures=4, cool_down=1.0, concurrency=1)
    expected = remote.score(pictures())
    fresh = [replace(r, prompt=Prompt(id=r.prompt.id, text="new")) for r in pictures(20)]
    fake.recount()
    fake.fault = status(503)
    scores = remote.score(fresh)
    assert all(isinstance(score, Failed) for score in scores)
    assert fake.paths["/v1/chat/completions"] == 4
    assert isinstance(scores[-1], Failed) and "left alone" in scores[-1].reason
    fake.fault = None
    time.sleep(1.1)
    assert all(isinstance(score, Scored) for score in remote.score(fresh))
    assert remote.score(pictures()) == expected


def test_one_deadline_holds_for_all_pictures_of_a_call(
    build: Callable[..., Remote], fake: Any
) -> None:
    remote = build(fake, deadline=4.0, concurrency=1)
    remote.score(pictures(1))
    fresh = [replace(r, prompt=Prompt(id=r.prompt.id, text="new")) for r in pictures()]
    fake.fault = lambda exchange: exchange.hang()
    start = time.monotonic()
    scores = remote.score(fresh)
    assert time.monotonic() - start < 8
    assert all(isinstance(s, Failed) and "deadline of 4 s" in s.reason for s in scores)


def test_scores_are_remembered_and_failures_are_not(
    build: Callable[..., Remote], fake: Any
) -> None:
    remote = build(fake)
    fake.poisoned = hash_of(pictures()[HIT])
    fake.fault = status(500)
    once = remote.score(pictures())
    fake.fault = None
    fake.recount()
    twice = remote.score(pictures())
    assert fake.paths["/v1/chat/completions"] == 1
    assert isinstance(once[HIT], Failed) and isinstance(twice[HIT], Scored)
    assert [s for n, s in enumerate(twice) if n != HIT] == [
        s for n, s in enumerate(once) if n != HIT
    ]
    other = [replace(r, prompt=replace(r.prompt, text="other")) for r in pictures()]
    fake.recount()
    assert remote.score(other) != twice
    assert fake.paths["/v1/chat/completions"] == len(other)


def test_a_small_memory_forgets_the_oldest(build: Callable[..., Remote], fake: Any) -> None:
    remote = build(fake, cache_size=2, concurrency=1)
    remote.score(pictures())
    fake.recount()
    remote.score(pictures()[-2:])
    assert fake.paths["/v1/chat/completions"] == 0
    remote.score(pictures()[:1])
    assert fake.paths["/v1/chat/completions"] == 1


def test_threads_share_one_handshake_and_get_the_scores_of_one_call(
    build: Callable[..., Remote], fake: Any, grouped: Callable[..., Group]
) -> None:
    expected = build(fake).score(pictures())
    fake.recount()
    remote = build(fake)
    groups = [grouped(request.prompt, [request.image]) for request in pictures()]
    with AsyncRewardSet(RewardSet({"judge": remote._config}, {"judge": remote}), 3) as scorer:
        for group in groups:
            scorer.submit([group])
        collected = scorer.collect()
    assert [collected[g.prompt.id].scores["judge"][0] for g in groups] == expected
    assert fake.paths["/v1/models"] == 1


# --- What is sent and read -------------------------------------------------------------------

SAMPLING = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "n": 1,
    "stream": False,
}


@pytest.mark.parametrize("tells_ids", [True, False])
def test_nothing_that_changes_the_sampling_is_left_to_the_server(
    build: Callable[..., Remote], fake: Any, tells_ids: bool
) -> None:
    fake.tells_ids = tells_ids
    build(fake).score(pictures(1))
    for body in fake.bodies:
        assert {name: body[name] for name in SAMPLING} == SAMPLING
        assert "seed" in body and "max_tokens" in body
        urls = [p["image_url"]["url"] for p in body["messages"][0]["content"][:1]]
        assert urls[0].startswith("data:image/png;base64,")
    last = fake.bodies[-1]
    if tells_ids:
        assert last["logprob_token_ids"] == [ord(str(number)) for number in SCALE]
    else:
        assert last["continue_final_message"] and not last["add_generation_prompt"]
        assert last["messages"][-1]["content"].endswith(MARKER) and last["max_tokens"] == 1


@pytest.mark.parametrize("count", [1, 2, 8])
def test_an_edit_is_sent_with_its_sources_first(
    count: int, build: Callable[..., Remote], fake: Any
) -> None:
    sources = tuple(
        images.encode_png(images.to_pil(torch.full((3, 32, 32), n / 8))) for n in range(count)
    )
    prompt = Prompt(id="e", text="make it red", task="edit", sources=sources)
    remote = build(fake)
    remote.score([replace(pictures(1)[0], prompt=prompt)])
    *parts, words = fake.bodies[-1]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * (count + 1)
    sent = [part["image_url"]["url"] for part in parts[:-1]]
    assert sent == [images.data_url(source) for source in sources]
    assert "Instruction: make it red" in words["text"]
    # Another order is another question, and the same one is not asked again.
    fake.recount()
    for given in (sources, sources[::-1]):
        remote.score([replace(pictures(1)[0], prompt=replace(prompt, sources=given))])
    assert bool(fake.bodies) == (count > 1)


def test_a_golden_edit_shows_that_a_server_takes_as_many_sources(
    build: Callable[..., Remote], fake: Any, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        images.to_pil(torch.zeros(3, 32, 32)).save(tmp_path / f"{name}.png")
    golden = {"sources": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]}
    build(fake, golden=golden).score(pictures(1))
    asked = [body for body in fake.bodies if "messages" in body]
    assert [part["type"] for part in asked[0]["messages"][0]["content"]].count("image_url") == 3


def test_another_seed_is_asked_once_where_the_answer_is_unreadable(
    build: Callable[..., Remote], fake: Any
) -> None:
    remote = build(fake)
    remote.score(pictures(1))
    fake.recount()
    fake.fault = written("nothing")
    remote.score([replace(pictures(1)[0], prompt=Prompt(id="n", text="new"))])
    assert [body["seed"] for body in fake.bodies] == [0, 1]


def test_so_it_is_about_the_golden_picture(build: Callable[..., Remote], fake: Any) -> None:
    """Else the next form, which may be a worse one, would be agreed on."""
    (expected,) = build(fake).score(pictures(1))
    fake.recount()
    fake.fault = first(1, content(""))
    assert build(fake).score(pictures(1)) == [expected]
    assert [body["seed"] for body in fake.bodies] == [0, 1, 0, 1]


def test_a_calibration_is_applied_to_the_raw_score(build: Callable[..., Remote], fake: Any) -> None:
    (plain,) = build(fake).score(pictures(1))
    knots = Knots(raw=(1.0, 5.0), calibrated=(0.0, 1.0))
    (scaled,) = build(fake, calibration=knots, golden={"tolerance": 0.0}).score(pictures(1))
    assert isinstance(plain, Scored) and isinstance(scaled, Scored)
    assert scaled.value == pytest.approx((plain.value - 1) / 4)
    assert scaled.detail["raw"] == plain.detail["raw"]


def test_the_score_is_the_expectation_and_numbers_in_the_words_are_none(
    build: Callable[..., Remote], fake: Any
) -> None:
    (score,) = build(fake).score(pictures(1))
    known = fake.log_probs(fake.bodies[-1])
    shares = {number: math.exp(known[ord(str(number))]) for number in SCALE}
    assert isinstance(score, Scored) and "26" in score.note
    assert score.value == pytest.approx(sum(k * p for k, p in shares.items()) / 0.98)
    assert score.detail["mass"] == pytest.approx(0.98)


RECORDED: dict[str, Any] = {
    # The shape of vLLM's replies to `logprob_token_ids`, written by hand after its documentation,
    # with Qwen's ids of the digits.
    "id": "chatcmpl-8f2e",
    "object": "chat.completion",
    "created": 1790000000,
    "model": "alignment-judge",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": f"3 of 3 stars{MARKER}4",
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": {
                "content": [
                    {
                        "token": f"token_id:{token}",
                        "logprob": logprob,
                        "bytes": list(f"token_id:{token}".encode()),
                        "top_logprobs": [
                            {"token": f"token_id:{token}", "logprob": logprob, "bytes": None},
                            *(
                                {"token": f"token_id:{15 + k}", "logprob": p, "bytes": None}
                                for k, p in enumerate(digits, start=1)
                            ),
                        ],
                    }
                    for token, logprob, digits in [
                        (18, -0.3, [-4.0, -3.0, -0.3, -2.0, -9999.0]),
                        (9542, -0.1, [-9999.0] * 5),
                        (366, -0.01, [-25.0] * 5),
                        (12338, 0.0, [-25.0] * 5),
                        (29, 0.0, [-25.0] * 5),
                        (19, math.log(0.6), [math.log(p) for p in (0.01, 0.04, 0.1, 0.6, 0.24)]),
                        (151645, 0.0, [-30.0] * 5),
                    ]
                ]
            },
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
        }
    ],
    "service_tier": None,
    "system_fingerprint": None,
    "usage": {"prompt_tokens": 1234, "total_tokens": 1241, "completion_tokens": 7},
    "prompt_logprobs": None,
    "kv_transfer_params": None,
}
QWEN = Alphabet(marker=(366, 12338, 29), digits=(16, 17, 18, 19, 20))


def test_a_reply_as_vllm_writes_it_has_the_expectation_at_the_marked_place() -> None:
    reply = read_reply(json.loads(json.dumps(RECORDED)))
    assert not isinstance(reply, Failed)
    answer = read_whole(reply, QWEN)
    assert isinstance(answer, Answer)
    score = scored(answer, Calibration())
    expected = (0.01 + 2 * 0.04 + 3 * 0.1 + 4 * 0.6 + 5 * 0.24) / 0.99
    assert isinstance(score, Scored) and score.value == pytest.approx(expected)
    assert score.detail["mass"] == pytest.approx(0.99) and score.note == "3 of 3 stars"


def test_digits_may_be_told_as_text_where_there_is_one_token() -> None:
    data = json.loads(json.dumps(RECORDED))
    choice(data)["logprobs"]["content"] = [choice(data)["logprobs"]["content"][-2]]
    for entry in choice(data)["logprobs"]["content"][0]["top_logprobs"]:
        entry["token"] = str(int(entry["token"].split(":")[1]) - 15)
    reply = read_reply(data)
    assert not isinstance(reply, Failed)
    answer = read_digit(reply, "why", None)
    assert isinstance(answer, Answer) and answer.log_probs[4] == pytest.approx(math.log(0.6))
    assert answer.reasoning == "why" and len(answer.log_probs) == 5


def test_the_answer_is_asked_for_up_to_the_marker_where_it_is_continued() -> None:
    asking = Asking("judge", "continued", "top", None, 64)
    body = asking.answer(Message(role="user", content="?"), 0).body()
    assert body["stop"] == [MARKER] and body["include_stop_str_in_output"]
    assert "logprob_token_ids" not in body and not body["logprobs"]


# --- Settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_env": "NO_SUCH_TOKEN"}, "need a token in the environment variable NO_SUCH_TOKEN"),
        ({"url": "ftp://judge"}, "need an address"),
        ({"url": "judge:8000"}, "need an address"),
        ({"url": "http://user:secret@judge"}, "without a password"),
        ({"rubric": "nowhere.md"}, "need a rubric file"),
        ({"failures": 5, "retries": 2}, "need failures above concurrency plus retries"),
        ({"calibration": {"raw": [1.0, 2.0], "calibrated": [2.0, 1.0]}}, "both rising"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, build: Callable[..., Remote]
) -> None:
    class Nowhere:
        url = "http://127.0.0.1:1"

    with pytest.raises(ValueError) as caught:
        build(Nowhere, **settings)
    assert message in str(caught.value) and "secret" not in str(caught.value)


def test_the_address_may_be_written_with_its_version(
    build: Callable[..., Remote], fake: Any
) -> None:
    (score,) = build(fake, url=f"{fake.url}/v1/").score(pictures(1))
    assert isinstance(score, Scored)


def test_the_token_is_sent_and_stands_in_no_setting(
    build: Callable[..., Remote], fake: Any
) -> None:
    fake.token = "canary-0123456789"
    remote = build(fake, token_env="JUDGE_TOKEN")
    (score,) = remote.score(pictures(1))
    assert isinstance(score, Scored)
    shown = dump_yaml(remote._config) + repr(remote._config) + config_hash(remote._config)
    assert "canary" not in shown and "JUDGE_TOKEN" in shown
    fake.fault = lambda exchange: exchange.send(400, dict(exchange.handler.headers.items()))
    with pytest.raises(ConfigError, match="status 400") as caught:
        remote.score(pictures(3)[1:])
    assert "canary" not in str(caught.value)


def test_a_judge_is_met_before_a_run(fake: Any, build: Callable[..., Remote]) -> None:
    """Server, model, digits and golden picture; what a question would find out later."""
    build(fake).meet()
    with pytest.raises(ConfigError, match="need the model 'other'"):
        build(fake, model="other").meet()
    gone = {"url": "http://127.0.0.1:9", "retries": 0}
    with pytest.raises(ConfigError, match=r"need a judge at http://127\.0\.0\.1:9, got none"):
        build(fake, **gone).meet()
