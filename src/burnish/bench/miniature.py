"""The miniature's bench: the tree of Qwen-Image-Bench over the embedded world, its truth as judge.

Held-out prompts, and the prompts of named people and styles that no reward asks for. Text to image
and editing are two benches, as in the paper's arena.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from burnish import images
from burnish.bench.base import (
    Bench,
    BenchConfig,
    Node,
    Share,
    ancestors,
    nested_shares,
)
from burnish.config import ConfigError, located
from burnish.images import ImageError
from burnish.prompt_sets import PromptSet
from burnish.prompts import read_prompts, spaced
from burnish.questions import Asked, Item, Judge, Question, Slot
from burnish.types import Failed, Task
from burnish.world.edits import Edit
from burnish.world.facets import FACETS, facets_of_edit, facets_of_scene
from burnish.world.render import SIZE
from burnish.world.scenes import Scene

_QUESTION = Question(name="truth", parts=(Slot.OUTPUT,))


class MiniatureConfig(BenchConfig):
    """Which prompts."""

    kind: Literal["miniature"] = "miniature"
    task: Task = "t2i"
    prompts: str = "embedded:prompts/held-out.jsonl"
    """Set of prompts that tell facts of the embedded world."""
    knowledge: str | None = "embedded:prompts/knowledge.jsonl"
    """Another one, of named people and styles."""
    num_knowledge: int = Field(default=96, ge=1)
    """Prompts of that one, at even distances."""

    def asks(self) -> Task:
        return self.task

    def build(self) -> "Miniature":
        return Miniature(self)


class Miniature(Bench):
    """Judged from pixels by analysis by synthesis; see `burnish.world.oracle`."""

    def __init__(self, config: MiniatureConfig) -> None:
        own = list(_of_task(config.prompts, config.task))
        if config.knowledge is not None:
            own += spaced(_of_task(config.knowledge, config.task), config.num_knowledge)
        if not own or not all(prompt.facts for prompt in own):
            raise ConfigError(
                f"need prompts of task {config.task} that tell facts of the embedded world, got "
                f"{'none' if not own else 'some without'}; correct `prompts`"
            )
        self._items = [Item(prompt=prompt) for prompt in own]

    def items(self) -> Sequence[Item]:
        """Prompts of one task."""
        return self._items

    def nodes(self) -> Sequence[Node]:
        """The whole tree."""
        return ancestors(FACETS)

    def questions(self, item: Item) -> Sequence[Question]:
        """One: everything."""
        return (_QUESTION,)

    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """Facets, from 0 to 100."""
        found = json.loads(reply)
        return {tuple(path.split("/")): 100 * value for path, value in found.items()}

    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """Means of means within the picture, as in Qwen-Image-Bench."""
        return nested_shares(verdicts[_QUESTION.name])

    def judge(self) -> Judge:
        """The truth."""
        return _Truth()


def _of_task(path: str, task: str) -> PromptSet:
    return read_prompts(located(path)).select(lambda prompt: prompt.task == task)


class _Truth(Judge):
    """Measures pictures against what their prompts tell."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": "the embedded world's truth", "facets": ["/".join(f) for f in FACETS]}

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, str | Failed]]:
        for one in asked:
            try:
                picture = images.read(one.picture)
            except ImageError as error:
                yield one, Failed(reason=str(error))
                continue
            if picture.size != (SIZE, SIZE):
                got = " x ".join(map(str, picture.size))
                yield one, Failed(reason=f"need a picture of {SIZE} x {SIZE} pixels, got {got}")
                continue
            found = _facets(one.item.prompt.facts, np.asarray(picture, dtype=np.float32) / 255)
            yield one, json.dumps({"/".join(facet): value for facet, value in found.items()})


def _facets(facts: Mapping[str, Any], pixels: np.ndarray) -> Mapping[Node, float]:
    if "changes" in facts:
        return facets_of_edit(pixels, Edit.from_json(facts))
    return facets_of_scene(pixels, Scene.from_json(facts))
