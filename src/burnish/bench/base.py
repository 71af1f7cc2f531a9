"""What a bench must offer: items, where their pictures lie, what a judge is asked, what it meant.

    items -> pictures (drawn, or the user's) -> questions -> replies -> verdicts -> tree

A reply is kept as it was given; everything after it is computed again whenever it is looked at. A
verdict is numbers on leaves of the bench's tree, or `Failed`, which is never a number. What a
picture adds to each node is a total and a weight, so that a node can be a mean over pictures, over
questions, or over other nodes, as each bench has it.

Benches of others are read from the user's disk: no prompt, checklist or picture of theirs is part
of Burnish.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from burnish.config import Config, ConfigError
from burnish.prompts import spaced
from burnish.questions import Item, Judge, Question
from burnish.types import Failed, Task

Node = tuple[str, ...]
"""A place in a bench's tree, from the top; the empty one is the whole."""
OVERALL: Node = ()


class Response(NamedTuple):
    """A reply that somebody else's program has had from a judge."""

    model: str
    item: str
    number: int
    question: str
    reply: str


class Share(NamedTuple):
    """What a picture adds to the mean of a node."""

    total: float
    weight: float = 1.0


class Bench(ABC):
    """One bench, ready to be asked."""

    scale: float = 100.0
    """The best score."""

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All items, in their own order.

        Raises:
            ConfigError: the files of the bench are not as they should be.
        """

    @abstractmethod
    def nodes(self) -> Sequence[Node]:
        """The tree in the order in which it is shown, every node after its parent."""

    def layout(self, item: Item, number: int) -> str:
        """Relative path of a picture, as the official scorer expects it: `ID.png`, then
        `ID-1.png`."""
        return f"{item.id}.png" if number == 0 else f"{item.id}-{number}.png"

    @abstractmethod
    def questions(self, item: Item) -> Sequence[Question]:
        """What is asked about each picture of an item."""

    @abstractmethod
    def parse(self, item: Item, question: str, reply: str) -> Mapping[Node, float] | Failed:
        """The verdict of a reply: values of leaves; a leaf that does not apply is left out."""

    @abstractmethod
    def shares(
        self, item: Item, verdicts: Mapping[str, Mapping[Node, float]]
    ) -> Mapping[Node, Share]:
        """What one picture adds to every node that it has a say on.

        Args:
            item: of the picture.
            verdicts: by question; those that failed are missing.
        """

    def averages(self) -> Mapping[Node, Sequence[Node]]:
        """Nodes that are the mean of other nodes' means and not of pictures, in this order."""
        return {}

    def sources(self, item: Item) -> tuple[bytes, ...]:
        """The encoded pictures that an edit changes; none for anything else."""
        return item.prompt.sources

    def judge(self) -> Judge | None:
        """Who answers; None where nobody is named, or the official scorer is a program of its
        own."""
        return None

    def companions(self, items: Sequence[Item]) -> Iterator[tuple[str, bytes]]:
        """Path and content of the files beside the pictures that the official scorer expects."""
        yield from ()

    def responses(self, path: Path) -> Iterator[Response]:
        """Replies out of a file of the official program.

        Raises:
            ConfigError: not such a file, or the bench knows none.
        """
        raise ConfigError(
            f"need a bench whose official program leaves replies, got {type(self).__name__}; "
            "judge the pictures with `burnish bench run`"
        )


class BenchConfig(Config, ABC):
    """Base of the one config of each file on the shelf; its `kind` is the file's name."""

    num_images: int = Field(default=1, ge=1)
    """Pictures of each item."""
    limit: int | None = Field(default=None, ge=2)
    """Items, at even distances; None is all. A part has another result than the whole."""

    @abstractmethod
    def asks(self) -> Task:
        """What a model must be able to do."""

    @abstractmethod
    def build(self) -> Bench:
        """The bench itself.

        Raises:
            ConfigError: its files are not as they should be.
        """

    def chosen(self, bench: Bench) -> list[Item]:
        """The items that are asked.

        Raises:
            ConfigError: there are none, or two have one id or one place.
        """
        items = list(bench.items())
        if not items:
            raise ConfigError("need items, got none: the files of the bench have no prompts")
        seen: set[str] = set()
        paths: set[str] = set()
        for item in items:
            if item.id in seen:
                raise ConfigError(f"need items with ids of their own, got {item.id!r} twice")
            seen.add(item.id)
            for path in (bench.layout(item, number) for number in range(self.num_images)):
                # Ids are other people's text, and name files.
                if Path(path).is_absolute() or ".." in Path(path).parts or path in paths:
                    raise ConfigError(
                        f"need a place of its own for every picture, got {path!r} for item "
                        f"{item.id!r}; check the files of the bench"
                    )
                paths.add(path)
        return items if self.limit is None else spaced(items, self.limit)


def nested_shares(leaves: Mapping[Node, float]) -> dict[Node, Share]:
    """A picture's value on every node: the mean of its children's, from the leaves to the top.

    >>> nested_shares({("a", "x"): 1.0, ("a", "y"): 0.0, ("b", "z"): 1.0})[()]
    Share(total=0.75, weight=1.0)
    """
    values: dict[Node, float] = dict(leaves)
    for depth in range(max(map(len, leaves), default=0), 0, -1):
        children: dict[Node, list[float]] = {}
        for node, value in values.items():
            if len(node) == depth:
                children.setdefault(node[:-1], []).append(value)
        # A leaf may stand higher than others, beside nodes that have children.
        values |= {node: math.fsum(own) / len(own) for node, own in children.items()}
    return {node: Share(value) for node, value in values.items()}


def ancestors(leaves: Iterable[Node]) -> list[Node]:
    """Leaves with all that is above them, each after its parent, in the order of the leaves.

    >>> ancestors([("a", "x"), ("a", "y"), ("b",)])
    [(), ('a',), ('a', 'x'), ('a', 'y'), ('b',)]
    """
    found: dict[Node, None] = {OVERALL: None}
    for leaf in leaves:
        for depth in range(1, len(leaf) + 1):
            found.setdefault(leaf[:depth])
    order = {node: place for place, node in enumerate(found)}
    return sorted(found, key=lambda node: [order[node[:depth]] for depth in range(len(node) + 1)])
