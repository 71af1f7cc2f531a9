"""GenEval (arXiv 2310.11513): 553 prompts of six tasks, four pictures each, judged by a detector.

The official scorer is a program of its own, with a detector and its pinned libraries: Burnish draws
the pictures in its layout and reads the `results.jsonl` that it leaves. As in the official summary,
a task is the share of its pictures that are right, and the whole is the mean of the tasks. The
official summary says nothing of pictures that are missing; here they are failures.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from burnish import records
from burnish.bench.base import (
    OVERALL,
    Bench,
    BenchConfig,
    Node,
    Response,
    Share,
    ancestors,
)
from burnish.config import ConfigError
from burnish.questions import Item, Question
from burnish.types import Failed, Prompt, Task

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_PLACE = re.compile(r"(?:^|/)(\d{1,9})/samples/(\d{1,9})\.png$")
_QUESTION = Question(name="correct", parts=())


class GenevalConfig(BenchConfig):
    """Where the bench lies."""

    kind: Literal["geneval"] = "geneval"
    checkout: Path
    """Of github.com/djghosh13/geneval."""
    num_images: int = Field(default=4, ge=1)

    def asks(self) -> Task:
        return "t2i"

    def build(self) -> "Geneval":
        return Geneval(self.checkout / "prompts" / "evaluation_metadata.jsonl")


class Geneval(Bench):
    """Prompts by their line; a picture is right or wrong."""

    def __init__(self, path: Path) -> None:
        self._items = []
        for number, (where, row) in enumerate(records.json_lines(path)):
            task = records.text(row, "tag", where)
            if task not in TASKS:
                raise records.wrong(where, "tag", f"one of {', '.join(TASKS)}", task, "check it")
            prompt = Prompt(id=f"{number:05d}", text=records.text(row, "prompt", where))
            self._items.append(Item(prompt=prompt, facts=row))

    def items(self) -> Sequence[Item]:
        """In the order of the official file."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """The whole and its six tasks."""
        return ancestors((task,) for task in TASKS)

    def averages(self) -> Mapping[Node, Sequence[Node]]:
        """The whole is the mean of the tasks."""
        return {OVERALL: [(task,) for task in TASKS]}

    def layout(self, item: Item, number: int) -> str:
        """`00000/samples/0000.png`, as the official README has it."""
        return f"{item.id}/samples/{number:04d}.png"

    def companions(self, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        """Each folder has its line of the official file."""
        for item in items:
            yield f"{item.id}/metadata.jsonl", (json.dumps(dict(item.facts)) + "\n").encode()

    def questions(self, item: Item) -> Sequence[Question]:
        """One: whether the picture is right."""
        return (_QUESTION,)

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """A line of the official result."""
        is_right = json.loads(reply).get("correct")
        if not isinstance(is_right, bool):
            return Failed(reason="the result tells neither right nor wrong")
        return {(item.facts["tag"],): self.scale * is_right}

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """One picture of its task."""
        return {node: Share(value) for node, value in verdicts[_QUESTION.name].items()}

    def responses(self, path: Path) -> Iterator[Response]:
        """Lines of a `results.jsonl`, in any order; the model is named after the file's folder."""
        by_id = {item.id: item for item in self._items}
        seen: set[tuple[str, int]] = set()
        for where, row in records.json_lines(path):
            match = _PLACE.search(records.text(row, "filename", where))
            item = match and by_id.get(f"{int(match[1]):05d}")
            if not match or item is None:
                raise records.wrong(
                    where, "filename", "a path such as 00000/samples/0000.png", row.get("filename"),
                    "draw with this bench's layout",
                )  # fmt: skip
            if row.get("prompt") != item.prompt.text:
                raise ConfigError(
                    f"{where}: need the prompt of item {item.id}, got another; take the results of "
                    "this bench's pictures"
                )
            if (place := (item.id, int(match[2]))) in seen:
                raise ConfigError(
                    f"{where}: need one line for a picture, got a second for {match[0]}; give the "
                    "results of each model as a file of its own, NAME=FILE"
                )
            seen.add(place)
            yield Response(
                path.resolve().parent.name, item.id, int(match[2]), _QUESTION.name, json.dumps(row)
            )
