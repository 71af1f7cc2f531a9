"""How far a long task is: a bar with the time left on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import rich.progress
from rich.console import Console

ItemT = TypeVar("ItemT")


class Progress:
    """Progress of one task: a bar on a terminal, elsewhere a line every ten seconds at most."""

    LINE_SECONDS = 10.0
    """Least time between two lines where there is no terminal."""

    # Shared by nested tasks: one screen and one clock.
    _screen: rich.progress.Progress | None = None
    _depth = 0
    _last_line = 0.0

    def __init__(self, label: str, total: int | None, done: int, *, is_shown: bool = True) -> None:
        self.label, self.total, self.done, self._is_shown = label, total, done, is_shown
        self._first, self._start = done, time.monotonic()
        if Progress._depth == 0:
            Progress._last_line = self._start
            is_terminal = sys.stderr.isatty() and is_shown
            Progress._screen = _screen() if is_terminal else None
        Progress._depth += 1
        screen = Progress._screen
        self._task = screen and screen.add_task(label, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count work done; `note` is shown behind the bar."""
        self.done += count
        if Progress._screen is not None and self._task is not None:
            Progress._screen.update(self._task, completed=self.done, note=note)
        elif self._is_shown and time.monotonic() - Progress._last_line >= self.LINE_SECONDS:
            self._print(note)

    def close(self) -> None:
        """End the task; the outermost one leaves its last state on the screen."""
        Progress._depth -= 1
        if Progress._screen is not None and self._task is not None:
            if Progress._depth == 0:
                Progress._screen.stop()
                Progress._screen = None
            else:
                Progress._screen.remove_task(self._task)
        elif self._is_shown and Progress._depth == 0 and time.monotonic() - self._start > 2:
            self._print("")

    def _print(self, note: str) -> None:
        now = time.monotonic()
        Progress._last_line, elapsed, moved = now, now - self._start, self.done - self._first
        total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.label}: {self.done}{total}", f"{elapsed:.0f} s"]
        if self.total is not None and moved > 0 and self.done < self.total:
            parts.append(f"{elapsed / moved * (self.total - self.done):.0f} s left")
        print(", ".join([*parts, note] if note else parts), file=sys.stderr, flush=True)


def _screen() -> rich.progress.Progress:
    columns = rich.progress.Progress.get_default_columns()[:-1]
    screen = rich.progress.Progress(
        *columns,
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        # What is printed for another program must reach it while a bar is shown.
        redirect_stdout=sys.stdout.isatty(),
    )
    screen.start()
    return screen


@contextlib.contextmanager
def progress(
    label: str, total: int | None = None, *, done: int = 0, is_shown: bool = True
) -> Iterator[Progress]:
    """Show progress on stderr while inside; `done` is what a resumed task had done before, and one
    of several processes shows it for all."""
    bar = Progress(label, total, done, is_shown=is_shown)
    try:
        yield bar
    finally:
        bar.close()


def track(items: Iterable[ItemT], label: str, total: int | None = None) -> Iterator[ItemT]:
    """Yield the items and show how many have been worked on."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(label, total) as bar:
        for item in items:
            yield item
            bar.advance()
