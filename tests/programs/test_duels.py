"""A judge in words in the arena, behind real HTTP, asked in both orders."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.programs.test_bench import Server
from tests.programs.test_voting import NAMES, contest

from burnish import cli, images
from burnish.arena.battles import read_battles
from burnish.arena.board import rate
from burnish.arena.duels import DuelConfig, question, read_choice
from burnish.protocol import ImagePart
from burnish.questions import Asked, Item, Slot
from burnish.types import Failed, Prompt


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


Judge = Callable[..., int]


@pytest.fixture
def judge(tmp_path: Path, server: Server) -> Judge:
    """The command, over pictures that are darker for one name than for the next."""
    contest(tmp_path, count=14)

    def run(name: str = "battles.jsonl", **settings: Any) -> int:
        told = {"url": server.url, "model": "q-judger", "retries": 0, **settings}
        places = [f"{name}={tmp_path / name}" for name in NAMES]
        out = str(tmp_path / name)
        return cli.main(["arena", "judge", *places, "--judge", json.dumps(told), "--out", out])

    return run


def brightness(body: dict[str, Any]) -> list[float]:
    """Of the pictures in a question, in order."""
    urls = [p["image_url"]["url"] for p in body["messages"][0]["content"] if p["type"] != "text"]
    data = [base64.b64decode(url.partition(",")[2]) for url in urls]
    return [float(np.asarray(images.decode(own, where="sent")).mean()) for own in data]


def test_a_judge_who_looks_agrees_with_itself_and_rates_what_it_prefers(
    judge: Judge, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def brighter(body: dict[str, Any]) -> str:
        first, second = brightness(body)
        return f"They differ.\nChoice: {'first' if first > second else 'second'}"

    server.reply = brighter
    assert judge() == 0
    assert "chose alike in both orders on 100% of the pairs" in capsys.readouterr().out
    battles = read_battles(tmp_path / "battles.jsonl")
    # Three pairs of fourteen prompts, in both orders.
    assert len(battles) == len(server.sent) == 84
    assert {battle.voter for battle in battles} == {"judge:q-judger"}
    board = rate(battles, anchor=NAMES[0], resamples=200)["board"]
    assert [row["model"] for row in board["rows"]] == list(NAMES[::-1])
    assert abs(board["left_side"]) < 1
    texts = [str(body["messages"]) for body in server.sent]
    assert not any(name in text for text in texts for name in NAMES)


def test_a_judge_who_only_likes_the_left_rates_nobody(
    judge: Judge, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda body: "Choice: first"
    assert judge() == 0
    assert "on 0% of the pairs" in capsys.readouterr().out
    board = rate(read_battles(tmp_path / "battles.jsonl"), anchor=NAMES[0], resamples=200)["board"]
    assert board["left_side"] > 400
    assert max(abs(row["elo"] - 1000) for row in board["rows"]) < 1


def test_what_was_answered_is_not_asked_again(
    judge: Judge, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda body: 500 if len(server.sent) % 3 == 0 else "Choice: tie"
    assert judge() == 2 and not (tmp_path / "battles.jsonl").exists()
    assert "status 500" in capsys.readouterr().err
    count = len(server.sent)
    server.reply = lambda body: "Choice: tie"
    assert judge() == 0
    assert len(server.sent) - count == 84 // 3


def test_a_judge_without_choices_gives_no_votes(
    judge: Judge, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda body: "Both have their merits."
    assert judge() == 2
    told = capsys.readouterr().err
    assert "need a choice on 99% of 84 questions, got 0" in told and "need a line" in told
    assert not (tmp_path / "battles.jsonl").exists()


def test_the_replies_of_another_judge_are_no_replies(
    judge: Judge, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda body: "nothing"
    assert judge() == 2
    assert judge(max_tokens=99) == 2
    assert "need the judge as they were" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Choice: first", "a"),
        ("**Choice:** Second.", "b"),
        ("Choice: first\nOn second thought:\nChoice: both bad", "both_bad"),
        ("choice - TIE", "tie"),
    ],
)
def test_choices_are_read(reply: str, choice: str) -> None:
    assert read_choice(reply) == choice


@pytest.mark.parametrize("reply", ["", "first", "Choice: third", "The choice: firstly"])
def test_anything_else_is_no_choice(reply: str) -> None:
    assert isinstance(read_choice(reply), Failed)


def test_an_edit_is_judged_beside_its_source() -> None:
    prompt = Prompt(id="x", text="make it night", task="edit", sources=(b"",))
    slots = [part for part in question(prompt, "").parts if isinstance(part, Slot)]
    assert slots == [Slot.SOURCE, Slot.OUTPUT, Slot.OTHER]


def test_a_judge_in_words_sees_all_sources_in_order_before_the_pictures(tmp_path: Path) -> None:
    shades = [images.encode_png(Image.new("L", (8, 8), level)) for level in (0, 60, 120, 180)]
    for name, data in zip("ab", shades[2:], strict=True):
        (tmp_path / f"{name}.png").write_bytes(data)
    prompt = Prompt(id="x", text="join them", task="edit", sources=tuple(shades[:2]))
    asked = Asked(
        Item(prompt=prompt),
        0,
        question(prompt, ""),
        tmp_path / "a.png",
        other=tmp_path / "b.png",
        read_sources=lambda: prompt.sources,
    )
    judge = DuelConfig(url="http://127.0.0.1:9", model="none").build()
    parts = judge._request(asked).messages[-1].content
    sent = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    levels = [
        images.decode(base64.b64decode(url.split(",")[1]), where="x").getpixel((0, 0))
        for url in sent
    ]
    assert levels == [(level,) * 3 for level in (0, 60, 120, 180)]
    assert "Pictures were changed" in str(parts[0])
