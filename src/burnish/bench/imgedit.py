"""ImgEdit-Bench, basic suite (arXiv 2505.20275): 737 edits of nine types, three grades from 1 to 5.

Read from the user's disk: a checkout of the official repository (edits and the judge's words) and
the source pictures. As in the official code, the grades of a reply are the lines that end in
`: N`, a picture's score is their mean, and a type's the mean of its pictures. The official code has
no whole; here it is the mean of the types, as most published rows have it. The official parser
takes any number of grades; here a reply without exactly three from 1 to 5 is a failure.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from burnish import records
from burnish.bench.base import OVERALL, Bench, BenchConfig, Node, Share, ancestors
from burnish.chat_judge import ChatJudge, ChatJudgeConfig, Decoding, Preparation
from burnish.config import ConfigError
from burnish.questions import Item, Judge, Question, Slot
from burnish.types import Failed, Prompt, Task

TYPES = (
    "add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action",
)  # fmt: skip
GRADES = 3
"""Instruction, then two of what the picture is like."""
_EDIT = "<edit_prompt>"


class ImgeditConfig(BenchConfig):
    """Where the bench lies."""

    kind: Literal["imgedit"] = "imgedit"
    checkout: Path
    """Of github.com/PKU-YuanGroup/ImgEdit."""
    pictures: Path
    """Folder of the source pictures (`singleturn` of the released Benchmark.tar)."""
    judge: ChatJudgeConfig | None = None
    """Published rows are of GPT-4.1; a result is known by its judge."""

    def asks(self) -> Task:
        return "edit"

    def build(self) -> "Imgedit":
        return Imgedit(self)


class Imgedit(Bench):
    """Edits by their key."""

    scale = 5.0

    def __init__(self, config: ImgeditConfig) -> None:
        self._config = config
        folder = config.checkout / "Benchmark" / "Basic"
        words = records.json_object(folder / "prompts.json")
        missing = [kind for kind in TYPES if _EDIT not in str(words.get(kind, ""))]
        if missing:
            raise ConfigError(
                f"need the words of the judge for {missing[0]!r} with {_EDIT} in {folder}, got "
                "none; check `checkout`"
            )
        self._words = {kind: str(words[kind]) for kind in TYPES}
        self._items = []
        for key, row in records.json_object(folder / "basic_edit.json").items():
            where = f"{folder / 'basic_edit.json'}, key {key}"
            if not isinstance(row, dict) or row.get("edit_type") not in TYPES:
                given = row.get("edit_type") if isinstance(row, dict) else row
                needed = f"one of {', '.join(TYPES)}"
                raise records.wrong(where, "edit_type", needed, given, "fix it")
            prompt = Prompt(id=str(key), text=records.text(row, "prompt", where), task="edit")
            self._items.append(Item(prompt=prompt, facts={**row, "where": where}))

    def items(self) -> Sequence[Item]:
        """In the order of the official file."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """The whole and its nine types."""
        return ancestors((kind,) for kind in TYPES)

    def averages(self) -> Mapping[Node, Sequence[Node]]:
        """The whole is the mean of the types."""
        return {OVERALL: [(kind,) for kind in TYPES]}

    def sources(self, item: Item) -> tuple[bytes]:
        """The picture that is edited."""
        facts = item.facts
        return (records.image_file(self._config.pictures, facts, "id", facts["where"]),)

    def questions(self, item: Item) -> Sequence[Question]:
        """One: the words of its type, the source, the output."""
        text = self._words[item.facts["edit_type"]].replace(_EDIT, item.prompt.text)
        return (Question(name="grades", parts=(text, Slot.SOURCE, Slot.OUTPUT)),)

    def judge(self) -> Judge | None:
        """Greedy, as the official code leaves decoding to the server."""
        if self._config.judge is None:
            return None
        return ChatJudge(self._config.judge, Decoding(max_tokens=2048), Preparation())

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """The mean of three grades."""
        lines = [line.strip().split(": ") for line in reply.splitlines()]
        grades = [int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdecimal()]
        if len(grades) != GRADES or not all(1 <= grade <= 5 for grade in grades):
            return Failed(reason=f"need {GRADES} grades from 1 to 5 in the reply, got others")
        return {(item.facts["edit_type"],): round(math.fsum(grades) / GRADES, 2)}

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """One picture of its type."""
        return {node: Share(value) for own in verdicts.values() for node, value in own.items()}
