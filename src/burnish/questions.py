"""Questions about pictures, and who answers them: a judge in words, or a program that measures."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from burnish.types import Failed, Prompt


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that a model is asked to draw."""

    prompt: Prompt
    """Its id is the item's; the sources of an edit may be left out, see `Asked.sources`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the bench knows of it."""

    @property
    def id(self) -> str:
        """Unique in the bench; the unit of resampling."""
        return self.prompt.id


class Slot(Enum):
    """A picture's place in a question."""

    SOURCE = "source"
    """All sources of an edit, in order: as many pictures."""
    OUTPUT = "output"
    OTHER = "other"
    """What another model drew for the same prompt."""


@dataclass(frozen=True)
class Question:
    """What a judge is asked about one picture."""

    name: str
    """Unique among the questions of an item."""
    parts: tuple[str | Slot, ...]
    """Words and pictures, in order."""
    system: str = ""


@dataclass(frozen=True)
class Asked:
    """A question about a picture that is there."""

    item: Item
    number: int
    """Which of the item's pictures."""
    question: Question
    picture: Path
    other: Path | None = None
    """Another model's picture, where two are compared."""
    read_sources: Callable[[], tuple[bytes, ...]] = tuple
    """Reads the encoded pictures that an edit changes; none for anything else."""

    @property
    def key(self) -> tuple[str, int, str]:
        """Unique among all that is asked about a model."""
        return self.item.id, self.number, self.question.name


class Judge(ABC):
    """Who answers questions."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Name, decoding and all else that decides its replies; part of the key of a result."""

    @abstractmethod
    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, str | Failed]]:
        """Replies as they come, in any order; never raises for a bad picture.

        Raises:
            ConfigError: there is no such judge.
        """
