"""A set of prompts that is held by its labels: texts and images are read when a prompt is drawn.

Whoever looks through a whole set, to choose, to count or to sort, reads its `entries`, which hold
id, task and category of every prompt and cost about 300 bytes each. Whoever indexes or iterates
gets prompts, each read at that moment and kept by nobody.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload, runtime_checkable

from burnish.config import ConfigError
from burnish.types import Labelled, Prompt, Task

if TYPE_CHECKING:
    _Prompts = Sequence[Prompt]
else:
    # Who checks types at run time would draw a prompt to see that it is one.
    _Prompts = Sequence


@runtime_checkable
class Reader(Protocol):
    """Where prompts are read from, by their row."""

    def prompt(self, row: int) -> Prompt:
        """The whole prompt.

        Raises:
            ConfigError: it cannot be read.
        """
        ...

    def check(self, row: int) -> None:
        """Read a prompt and decode its images, only to see that they are whole.

        Raises:
            ConfigError: it cannot be read.
        """
        ...


class Entry(NamedTuple):
    """The labels of one prompt, and where it is."""

    id: str
    task: Task
    category: str
    num_sources: int
    asked: int
    """Of task and text: those that are the same have one number."""
    sources: int
    """Likewise of the sources, as far as a row tells them apart without an image being read."""
    reader: Reader
    row: int


def number_of(*parts: str | bytes) -> int:
    """A number that equal parts have in common, and others do not.

    >>> number_of("a", "b") == number_of(b"a", "b") != number_of("ab")
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # What is no whole character is refused when it is read.
        own = part if isinstance(part, bytes) else part.encode(errors="surrogatepass")
        digest.update(len(own).to_bytes(8) + own)
    return int.from_bytes(digest.digest())


class PromptSet(_Prompts):
    """Prompts in order, read when they are asked for; a slice is a set that has read nothing."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "PromptSet":
        """Prompts that are in memory, or a set as it is."""
        if isinstance(prompts, PromptSet):
            return prompts
        held = _Held(prompts)
        return cls(
            Entry(
                *(p.id, p.task, p.category, p.num_sources),
                *(number_of(p.task, p.text), number_of(*p.sources)),
                *(held, row),
            )
            for row, p in enumerate(prompts)
        )

    @property
    def entries(self) -> Sequence[Entry]:
        """The labels of all prompts, in order; nothing is read for them."""
        return self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptSet": ...

    def __getitem__(self, index: int | slice) -> "Prompt | PromptSet":
        if isinstance(index, slice):
            return PromptSet(self._entries[index])
        entry = self._entries[index]
        found = entry.reader.prompt(entry.row)
        if (found.id, found.task, found.category) != entry[:3]:
            raise ConfigError(
                f"need a set of prompts that stays as it is, got {found.id!r} in the place of "
                f"{entry.id!r}; start again"
            )
        return found

    def select(self, keep: Callable[[Labelled], bool]) -> "PromptSet":
        """The prompts whose labels pass, in order."""
        return PromptSet(entry for entry in self._entries if keep(entry))

    def shared(self, other: "PromptSet") -> "PromptSet":
        """The prompts that another set has, too; none is read.

        Prompts are the same where task and text are, and besides, the sources or else the ids. A
        source is told by its file in JSON lines, and by nothing in Parquet and Arrow, where images
        are not read.
        """
        known = {(e.asked, key) for e in other.entries for key in (e.id, e.sources)}
        return PromptSet(
            e for e in self._entries if {(e.asked, e.id), (e.asked, e.sources)} & known
        )

    def check(self, index: int) -> None:
        """Read one prompt and decode its images, only to see that they are whole.

        Raises:
            ConfigError: it cannot be read.
        """
        entry = self._entries[index]
        entry.reader.check(entry.row)


class _Held:
    """Prompts in memory."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts

    def prompt(self, row: int) -> Prompt:
        return self._prompts[row]

    def check(self, row: int) -> None:
        """Nothing can be wrong."""
