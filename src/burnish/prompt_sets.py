"""A set of prompts that is held by its labels: texts and images are read when a prompt is drawn.

Whoever looks through a whole set, to choose, to count or to sort, reads its `entries`, which hold
id, task and category of every prompt and cost about 300 bytes each. Whoever indexes or iterates
gets prompts, each read at that moment and kept by nobody.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload

from burnish.config import ConfigError
from burnish.types import Labelled, Prompt, Task

if TYPE_CHECKING:
    _Prompts = Sequence[Prompt]
else:
    # Who checks types at run time would draw a prompt to see that it is one.
    _Prompts = Sequence


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
    content: int
    """Of what is asked for, see `content_of`."""
    reader: Reader
    row: int


def content_of(prompt: Prompt, sources: Iterable[str | bytes]) -> int:
    """A number that prompts have in common only if they ask for the same: text, task and sources.

    Args:
        prompt: its sources may be marks.
        sources: what tells each source apart: its bytes, or the place of its file.
    """
    digest = hashlib.blake2b(repr((prompt.task, prompt.text)).encode(), digest_size=8)
    for source in sources:
        # What is no whole character is refused when the image is read.
        own = source if isinstance(source, bytes) else source.encode(errors="surrogatepass")
        digest.update(b"\0" + own)
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
            Entry(p.id, p.task, p.category, p.num_sources, content_of(p, p.sources), held, row)
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
        """The prompts that another set asks for too, under whatever id; none is read.

        Sources are the same by their file or by what a row spells out. Images that a row holds as
        bytes are not read: such prompts are the same where their ids are, too.
        """
        known = {entry.content for entry in other.entries}
        return PromptSet(entry for entry in self._entries if entry.content in known)

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
