"""Votes of a judge in words, which sees both pictures of a pair, in both orders.

A judge prefers places as well as pictures. Each pair is asked twice, the other way round the second
time, and both answers are votes: what the place is worth is fitted with the ratings, and how often
the judge stays with a picture is told. Replies are kept as they come, so that an interrupted vote
goes on; a reply without a choice is a failure and no tie.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from burnish.arena.battles import Battle, Winner
from burnish.arena.contest import Contest
from burnish.chat_judge import ChatJudge, ChatJudgeConfig, Decoding, Preparation
from burnish.config import ConfigError
from burnish.ledger import Ledger, pin, read_ledger
from burnish.progress import progress
from burnish.questions import Asked, Item, Question, Slot
from burnish.runtime import Runtime
from burnish.significance import MIN_COVERAGE
from burnish.tracking import lock
from burnish.types import Failed, Prompt

_CHOICES: Mapping[str, Winner] = {
    "first": "a", "second": "b", "tie": "tie", "both bad": "both_bad",
}  # fmt: skip
_CHOICE = re.compile(r"\W{0,9}choice\W{1,9}(first|second|tie|both bad)\b", re.IGNORECASE)
_REPLIES = "replies"


class DuelConfig(ChatJudgeConfig):
    """A served judge, and how it may answer."""

    max_tokens: int = Field(default=2048, ge=16)
    """Most tokens of an answer, thoughts included."""
    thinking: bool | None = None
    """Whether its template lets it think first; None leaves that to the server."""

    def build(self) -> ChatJudge:
        """The judge."""
        decoding = Decoding(max_tokens=self.max_tokens, is_thinking=self.thinking)
        return ChatJudge(self, decoding, Preparation())


@dataclass(frozen=True)
class Duels:
    """What the judge said."""

    battles: list[Battle]
    agreement: float
    """Share of pairs on which it said the same in both orders."""


def question(prompt: Prompt, name: str) -> Question:
    """What is asked about a pair; it names no model.

    Args:
        prompt: of both pictures.
        name: of the question, which the judge does not see.
    """
    task = "Two pictures were made for one prompt."
    parts: list[str | Slot] = [f"{task} Say which one somebody who wrote it would choose.\n"]
    if prompt.task == "edit":
        given = "Pictures were" if len(prompt.sources) > 1 else "One picture was"
        task = f"{given} changed in two ways, by one instruction."
        parts = [f"{task} Say which change somebody who wrote it would choose.\nBefore:"]
        parts += [Slot.SOURCE]
    kind = "Instruction" if prompt.task == "edit" else "Prompt"
    parts += [f"{kind}: {prompt.text}\nFirst picture:", Slot.OUTPUT]
    parts += ["Second picture:", Slot.OTHER]
    parts += [
        "Look at what was asked for, then at how well each is made. End with one line: "
        "'Choice: first', 'Choice: second', 'Choice: tie', or 'Choice: both bad'."
    ]
    return Question(name=name, parts=tuple(parts))


def read_choice(reply: str) -> Winner | Failed:
    """The last choice of a reply.

    >>> read_choice("<think>Choice: second?</think>Choice: **First**")
    'a'
    """
    lines = reply.rpartition("</think>")[2].splitlines()
    found = next((match for line in reversed(lines) if (match := _CHOICE.match(line))), None)
    if found is None:
        return Failed(reason="need a line with a choice in the reply, got none")
    return _CHOICES[found[1].lower()]


def duel(
    contest: Contest,
    judge: ChatJudge,
    folder: Path,
    rt: Runtime,
    *,
    per_prompt: int | None = None,
    seed: int = 0,
    again: bool = False,
) -> Duels:
    """Ask about every pair in both orders.

    Args:
        contest: who meets whom.
        judge: that answers.
        folder: for its replies; what is there is not asked again.
        rt: whose rank this is.
        per_prompt: pairs of each prompt; None is all.
        seed: of which pairs meet.
        again: ask anew where a reply has no choice.

    Raises:
        ConfigError: no judge, or one that does not choose.
        RunError: the folder has replies of another judge, or another process is in it.
    """
    lock(folder)
    identity = json.dumps(judge.identity, sort_keys=True)
    if not read_ledger(folder, _REPLIES):
        # What a judge never answered to binds nobody to it.
        (folder / "judge.json").unlink(missing_ok=True)
    pin(folder, "judge", {"the judge": hashlib.sha256(identity.encode()).hexdigest()[:16]})
    asked = [
        one
        for prompt, a, b in contest.pairs(seed, per_prompt)
        for one in (_asked(contest, prompt, a, b), _asked(contest, prompt, b, a))
    ]
    digests: dict[Any, str] = {one.key: _digest(one) for one in asked}
    said: dict[Any, str | Failed] = {
        key: row["reply"]
        for row in read_ledger(folder, _REPLIES)
        if digests.get(key := (row.get("item"), 0, row.get("pair"))) == row.get("asked", "")
        and isinstance(row.get("reply"), str)
        and not (again and isinstance(read_choice(row["reply"]), Failed))
    }
    ledger = Ledger(folder, _REPLIES, rt)
    with progress("judge pairs", len(asked), done=len(said)) as bar:
        for one, reply in judge.answer([one for one in asked if one.key not in said]):
            row = {"item": one.item.id, "pair": one.question.name, "asked": digests[one.key]}
            is_lost = isinstance(reply, Failed)
            ledger.add([row | ({"failed": reply.reason} if is_lost else {"reply": reply})])
            said[one.key] = reply
            bar.advance(1)
    return _counted(asked, said, str(judge.identity["model"]))


def _asked(contest: Contest, prompt: Prompt, a: str, b: str) -> Asked:
    name = json.dumps([a, b])
    return Asked(
        Item(prompt=prompt),
        0,
        question(prompt, name),
        contest.pictures[a][prompt.id],
        other=contest.pictures[b][prompt.id],
        read_sources=lambda: prompt.sources,
    )


def _digest(one: Asked) -> str:
    """Changes with all that the judge is shown."""
    found = hashlib.sha256(repr(one.question.parts).encode())
    pictures = [path.read_bytes() for path in (one.picture, one.other) if path is not None]
    for data in (*pictures, *one.read_sources()):
        found.update(hashlib.sha256(data).digest())
    return found.hexdigest()[:16]


def _counted(asked: Sequence[Asked], said: Mapping[Any, str | Failed], model: str) -> Duels:
    choices: dict[Any, Winner | Failed] = {
        key: reply if isinstance(reply, Failed) else read_choice(reply)
        for key, reply in said.items()
    }
    told: dict[Any, Winner] = {
        key: own for key, own in choices.items() if not isinstance(own, Failed)
    }
    if len(told) < MIN_COVERAGE * len(asked):
        failed = next(own.reason for own in choices.values() if isinstance(own, Failed))
        raise ConfigError(
            f"need a choice on {MIN_COVERAGE:.0%} of {len(asked)} questions, got {len(told)} "
            f"({failed}); fix the judge and start the same command again, with --again where it "
            "answered without a choice"
        )
    battles, agreed = [], []
    for number, one in enumerate(asked):
        winner = told.get(one.key)
        if winner is None:
            continue
        a, b = json.loads(one.question.name)
        prompt = one.item.prompt
        battles.append(
            Battle(
                battle=f"{number // 2}-{'ab'[number % 2]}", prompt=prompt.id,
                category=prompt.category, a=a, b=b, winner=winner, voter=f"judge:{model}",
            )
        )  # fmt: skip
        if number % 2 and asked[number - 1].key in told:
            agreed.append(told[asked[number - 1].key] == _turned(winner))
    return Duels(battles, sum(agreed) / max(len(agreed), 1))


def _turned(winner: Winner) -> Winner:
    """The same choice, the other way round."""
    turned: Mapping[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad"}
    return turned[winner]
