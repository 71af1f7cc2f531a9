"""The voting page over HTTP: every vote counts once, and nothing says whose picture it is."""

import io
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image, PngImagePlugin

from burnish import images
from burnish.arena import server
from burnish.arena.ballots import RUINED, Ballots, VoteError, read_votes
from burnish.arena.contest import Contest
from burnish.config import ConfigError, located
from burnish.prompts import read_prompts
from burnish.types import Prompt

NAMES = ("aardvark", "buffalo", "cormorant")
HERE = "http://localhost"


def contest(folder: Path, count: int = 6, task: str = "t2i") -> Contest:
    """Pictures that say whose they are, where a viewer does not look."""
    every = read_prompts(located("embedded:prompts/held-out.jsonl"))
    prompts = [prompt for prompt in every if prompt.task == task][:count]
    pictures: dict[str, dict[str, Path]] = {}
    for level, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for prompt in prompts:
            path = folder / name / f"{prompt.id}.png"
            told = PngImagePlugin.PngInfo()
            told.add_text("model", name)
            picture = images.to_pil(torch.full((3, 64, 64), 0.2 + 0.3 * level))
            picture.save(path, pnginfo=told)
            pictures.setdefault(name, {})[prompt.id] = path
    return Contest(prompts=tuple(prompts), pictures=pictures)


@pytest.fixture
def ballots(tmp_path: Path) -> Ballots:
    return Ballots(tmp_path / "votes.sqlite", contest(tmp_path), gold=0.0)


@pytest.fixture
def client(ballots: Ballots) -> Iterator[TestClient]:
    with TestClient(server.app(ballots._contest, ballots), base_url=HERE) as found:
        yield found


def token(page: httpx.Response) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page.text)
    assert found, page.text[:400]
    return found[1]


def pictures(page: httpx.Response) -> list[str]:
    return re.findall(r'src="(/picture/[^"]+)"', page.text)


def votes(ballots: Ballots) -> list[Any]:
    return read_votes(ballots._path)[0]


# --- Exactly once ----------------------------------------------------------------------------


def test_a_vote_counts_once_however_often_it_is_sent(client: TestClient, ballots: Ballots) -> None:
    form = {"token": token(client.get("/")), "winner": "a"}
    for _ in range(3):
        assert client.post("/vote", data=form).status_code == 200
    assert [vote.winner for vote in votes(ballots)] == ["a"]
    other = client.post("/vote", data=form | {"winner": "b"})
    assert other.status_code == 409 and "You have voted on this pair already" in other.text
    assert [vote.winner for vote in votes(ballots)] == ["a"]


def test_a_reload_shows_the_same_pair_and_a_vote_the_next(client: TestClient) -> None:
    first, again = client.get("/"), client.get("/")
    assert token(first) == token(again) and pictures(first) == pictures(again)
    after = client.post("/vote", data={"token": token(first), "winner": "tie"})
    assert token(after) != token(first)


def test_undo_brings_the_pair_back_and_takes_the_vote_away(
    client: TestClient, ballots: Ballots
) -> None:
    assert "not for you" in client.post("/undo", data={}, headers={"content-length": "0"}).text
    first = token(client.get("/"))
    client.post("/vote", data={"token": first, "winner": "a"})
    back = re.search(r'name="undo" value="([^"]+)"', client.get("/").text)
    assert back is not None
    form = {"undo": back[1]}
    assert token(client.post("/undo", data=form)) == first and votes(ballots) == []
    client.post("/vote", data={"token": first, "winner": "b"})
    assert [vote.winner for vote in votes(ballots)] == ["b"]
    # Sent twice, it takes back one vote.
    second = token(client.get("/"))
    client.post("/vote", data={"token": second, "winner": "tie"})
    form = {"undo": second}
    for _ in range(2):
        assert token(client.post("/undo", data=form)) == second
        assert [vote.winner for vote in votes(ballots)] == ["b"]


def test_votes_at_once_are_counted_once(ballots: Ballots) -> None:
    """Twenty threads vote on one battle, half of them otherwise."""
    shown = ballots.show("me")
    assert shown is not None
    said: list[str] = []

    def send(winner: str) -> None:
        try:
            ballots.vote(shown.token, "me", winner)
            said.append(winner)
        except VoteError:
            pass

    threads = [threading.Thread(target=send, args=("ab"[n % 2],)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (vote,) = votes(ballots)
    assert set(said) == {vote.winner} and len(said) == 10


@pytest.mark.parametrize("spoil", ["x", ".", "none.none"])
def test_forged_and_foreign_tokens_count_nothing(
    spoil: str, client: TestClient, ballots: Ballots
) -> None:
    own = token(client.get("/"))
    for forged in (spoil, own[:-1] + ("0" if own[-1] != "0" else "1"), f"{spoil}{own}"):
        assert client.post("/vote", data={"token": forged, "winner": "a"}).status_code == 409
    theirs = ballots.show("somebody else")
    assert theirs is not None
    assert client.post("/vote", data={"token": theirs.token, "winner": "a"}).status_code == 409
    assert client.post("/vote", data={"token": own, "winner": "left"}).status_code == 409
    assert votes(ballots) == []


def test_everything_is_seen_once_and_then_it_is_over(client: TestClient, ballots: Ballots) -> None:
    page = client.get("/")
    while 'name="token"' in page.text:
        page = client.post("/vote", data={"token": token(page), "winner": "a"})
    assert "You have seen every pair" in page.text
    seen = {(vote.prompt, frozenset((vote.a, vote.b))) for vote in votes(ballots)}
    assert len(seen) == len(votes(ballots)) == 6 * 3
    assert 3 < sum(vote.a < vote.b for vote in votes(ballots)) < 15


# --- Anonymity and defence -------------------------------------------------------------------


def test_nothing_names_a_model(client: TestClient) -> None:
    page = client.get("/")
    left, right = (client.get(place) for place in pictures(page))
    for answer in (page, left, right):
        told = [*answer.headers.keys(), *answer.headers.values(), str(answer.url)]
        text = answer.text if answer is page else answer.content.decode("latin-1")
        for name in NAMES:
            assert name not in text and not any(name in part for part in told)
    for picture in (left, right):
        found = Image.open(io.BytesIO(picture.content))
        assert found.format == "PNG" and found.size == (64, 64) and not found.info
    assert left.content != right.content and set(left.headers) == set(right.headers)
    assert page.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_picture_is_for_whom_it_was_shown(client: TestClient, ballots: Ballots) -> None:
    place = pictures(client.get("/"))[0]
    with TestClient(server.app(ballots._contest, ballots), base_url=HERE) as stranger:
        assert stranger.get(place).status_code == 404
    assert client.get(place[:-1] + "x").status_code == 404
    assert client.get("/picture/none").status_code == 404
    assert client.get(place.replace(".a.", ".b.")).status_code == 404


def test_forms_of_other_sites_and_large_ones_are_refused(
    client: TestClient, ballots: Ballots
) -> None:
    form = {"token": token(client.get("/")), "winner": "a"}
    evil = client.post("/vote", data=form, headers={"origin": "https://evil.example"})
    assert evil.status_code == 403
    assert client.post("/vote", data=form | {"x": "y" * 5000}).status_code == 413
    assert votes(ballots) == []
    own = client.post("/vote", data=form, headers={"origin": HERE})
    assert own.status_code == 200 and len(votes(ballots)) == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example:8200", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example", 421),
     ("[evil.example]", 421), ("127.0.0.1:8200", 200), ("[::1]:8200", 200), ("LOCALHOST", 200),
     ("arena.example:8200", 200)],
)  # fmt: skip
def test_names_of_other_sites_that_lead_here_are_refused(
    host: str, status: int, ballots: Ballots
) -> None:
    """A page may let its own name mean loopback, so that host and origin agree."""
    served = server.app(ballots._contest, ballots, names=("Arena.example",))
    with TestClient(served, base_url=HERE) as client:
        page = client.get("/")
        assert client.get("/", headers={"host": host}).status_code == status
        headers = {"host": host, "origin": f"http://{host}"}
        form = {"token": token(page), "winner": "a"}
        sent = client.post("/vote", data=form, headers=headers, follow_redirects=False)
    assert sent.status_code == (303 if status == 200 else status)
    assert len(votes(ballots)) == (status == 200)


def test_a_voter_who_is_too_fast_must_wait(
    client: TestClient, ballots: Ballots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_RATE", 3)
    page = client.get("/")
    for _ in range(3):
        page = client.post("/vote", data={"token": token(page), "winner": "a"})
    slow = client.post("/vote", data={"token": token(page), "winner": "a"})
    assert slow.status_code == 429 and "wait a minute" in slow.text and len(votes(ballots)) == 3


def test_an_edit_shows_what_was_to_be_changed(tmp_path: Path) -> None:
    edits = contest(tmp_path, task="edit")
    with TestClient(server.app(edits, Ballots(tmp_path / "v", edits)), base_url=HERE) as client:
        page = client.get("/")
        (place,) = re.findall(r'src="(/source/[^"]+)"', page.text)
        assert Image.open(io.BytesIO(client.get(place).content)).size == (64, 64)
        assert client.get(place.replace("/source/", "/picture/")).status_code == 404


def test_an_edit_shows_all_its_sources_in_order(tmp_path: Path) -> None:
    shades = [images.encode_png(Image.new("RGB", (8, 8), (level,) * 3)) for level in (9, 99, 199)]
    edits = contest(tmp_path, count=1, task="edit")
    prompt = replace(edits.prompts[0], sources=tuple(shades))
    edits = Contest(prompts=(prompt,), pictures=edits.pictures)
    with TestClient(server.app(edits, Ballots(tmp_path / "v", edits)), base_url=HERE) as client:
        page = client.get("/").text
        places = re.findall(r'src="(/source/[^"]+)"', page)
        shown = [Image.open(io.BytesIO(client.get(place).content)) for place in places]
        assert [picture.getpixel((0, 0)) for picture in shown] == [(n,) * 3 for n in (9, 99, 199)]
        assert re.findall(r"changed, (\d of \d)", page) == ["1 of 3", "2 of 3", "3 of 3"]
        # A name is signed, the place of its source included.
        assert client.get(places[0].replace("source-0", "source-1")).status_code == 404


def test_words_of_a_prompt_are_words(tmp_path: Path) -> None:
    sly = contest(tmp_path, count=1)
    prompt = Prompt(id=sly.prompts[0].id, text="<script>alert(1)</script>")
    sly = Contest(prompts=(prompt,), pictures=sly.pictures)
    with TestClient(server.app(sly, Ballots(tmp_path / "v", sly)), base_url=HERE) as client:
        assert "<script>alert" not in client.get("/").text


# --- The file --------------------------------------------------------------------------------


def test_pairs_meet_evenly_and_the_chance_is_written_down(tmp_path: Path) -> None:
    ballots = Ballots(tmp_path / "votes.sqlite", contest(tmp_path, count=30), gold=0.0)
    for voter in range(20):
        for _ in range(6):
            shown = ballots.show(f"v{voter}")
            assert shown is not None
            ballots.vote(shown.token, f"v{voter}", "a")
    rows = (
        sqlite3.connect(tmp_path / "votes.sqlite")
        .execute("SELECT a, b, probability FROM battles")
        .fetchall()
    )
    met: dict[frozenset[str], int] = {}
    for a, b, chance in rows:
        assert 0 < chance <= 1
        met[frozenset((a, b))] = met.get(frozenset((a, b)), 0) + 1
    assert len(met) == 3 and np.ptp(list(met.values())) < 0.25 * len(rows)


def test_gold_pairs_tell_who_looks_and_are_no_votes(tmp_path: Path) -> None:
    own = contest(tmp_path)
    ballots = Ballots(tmp_path / "votes.sqlite", own, gold=1.0)
    shown = ballots.show("me")
    assert shown is not None and RUINED in (shown.a, shown.b)
    ballots.vote(shown.token, "me", "b" if shown.a == RUINED else "a")
    again = ballots.show("me")
    assert again is not None
    ballots.vote(again.token, "me", "tie")
    found, gold = read_votes(tmp_path / "votes.sqlite")
    assert found == [] and gold == {"me": (1, 2)}
    with TestClient(server.app(own, ballots), base_url=HERE) as client:
        sizes = [Image.open(io.BytesIO(client.get(p).content)).size
                 for p in pictures(client.get("/"))]  # fmt: skip
    assert sizes == [(64, 64), (64, 64)]


def test_every_model_stands_in_gold_pairs_and_no_voter_sees_one_twice(tmp_path: Path) -> None:
    """However many are asked for; pairs that count are not used up by them."""
    ballots = Ballots(tmp_path / "votes.sqlite", contest(tmp_path, count=4), gold=1.0)
    owners: list[tuple[str, str]] = []
    for _ in range(4 * 3 * 2):
        shown = ballots.show("me")
        assert shown is not None
        if RUINED in (shown.a, shown.b):
            owners.append((shown.prompt, shown.a if shown.b == RUINED else shown.b))
        ballots.vote(shown.token, "me", "a")
    assert len(set(owners)) == len(owners) == len(votes(ballots)) == 4 * 3
    assert {name for _, name in owners} == set(NAMES) and ballots.show("me") is None


def test_a_file_of_another_contest_version_or_kind_is_refused(tmp_path: Path) -> None:
    own = contest(tmp_path)
    path = tmp_path / "votes.sqlite"
    Ballots(path, own)
    Ballots(path, own)
    with pytest.raises(ConfigError, match="need the models, pictures and prompts that"):
        Ballots(path, Contest(prompts=own.prompts[:3], pictures=own.pictures))
    # What was to be changed and where a vote counts belong to it as the pictures do.
    for other in ({"category": "other"}, {"sources": (b"other",)}, {"task": "edit"}):
        prompts = (replace(own.prompts[0], **other), *own.prompts[1:])
        with pytest.raises(ConfigError, match="need the models, pictures and prompts that"):
            Ballots(path, Contest(prompts=prompts, pictures=own.pictures))
    database = sqlite3.connect(path)
    database.execute("UPDATE facts SET value = '2' WHERE name = 'version'")
    database.commit()
    # Votes of an older version are counted as ever; nobody votes on.
    assert read_votes(path) == ([], {})
    with pytest.raises(ConfigError, match="has version 2"):
        Ballots(path, own)
    database.execute("UPDATE facts SET value = '99' WHERE name = 'version'")
    database.commit()
    with pytest.raises(ConfigError, match=r"need votes of version 3, .* has version 99"):
        Ballots(path, own)
    with pytest.raises(ConfigError, match=r"need votes of version 3, .* has version 99"):
        read_votes(path)
    (tmp_path / "text").write_text("no database at all, but long enough to look at" * 50)
    with pytest.raises(ConfigError, match="need an SQLite file of votes"):
        Ballots(tmp_path / "text", own)
    with pytest.raises(ConfigError, match="need an SQLite file of votes"):
        read_votes(tmp_path / "nothing")


_SERVER = """
import sys
from pathlib import Path
import uvicorn
from tests.programs.test_voting import contest
from burnish.arena import server
from burnish.arena.ballots import Ballots
folder = Path(sys.argv[1])
own = contest(folder, count=60)
uvicorn.run(server.app(own, Ballots(folder / "votes.sqlite", own, gold=0.0)), port=int(sys.argv[2]),
            log_level="warning")
"""


def test_no_vote_is_lost_or_doubled_when_the_server_is_killed(tmp_path: Path) -> None:
    """Ten voters over real HTTP repeat what was not answered; the server is killed once."""

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _SERVER, str(tmp_path), str(port)], cwd=root)

    process, stop = [begin()], time.monotonic() + 150
    done: dict[int, int] = {}

    def asked(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
        while time.monotonic() < stop:
            try:
                return client.request(method, path, **options)
            except httpx.TransportError:
                time.sleep(0.1)
        raise TimeoutError

    def person(number: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", follow_redirects=True) as client:
            page = asked(client, "GET", "/")
            for _ in range(20):
                form = {"token": token(page), "winner": ("a", "b", "tie", "both_bad")[number % 4]}
                page = asked(client, "POST", "/vote", data=form)
                assert page.status_code == 200
                done[number] = done.get(number, 0) + 1

    people = [threading.Thread(target=person, args=(number,)) for number in range(10)]
    try:
        for one in people:
            one.start()
        while sum(done.values()) < 60 and time.monotonic() < stop:
            time.sleep(0.02)
        process[0].kill()
        process[0].wait()
        process.append(begin())
        for one in people:
            one.join()
    finally:
        process[-1].kill()
    found, _ = read_votes(tmp_path / "votes.sqlite")
    assert done == dict.fromkeys(range(10), 20)
    by_voter: dict[str, int] = {}
    for vote in found:
        by_voter[vote.voter] = by_voter.get(vote.voter, 0) + 1
    assert sorted(by_voter.values()) == [20] * 10
    assert len({vote.battle for vote in found}) == len(found) == 200
