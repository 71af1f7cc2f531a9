"""Parts of messages in one line: a value that was given, why something failed, the nearest name."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def shown(value: Any) -> str:
    """A value in a message: one line, at most sixty characters."""
    text = "nothing" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def brief(error: BaseException, *, names_file: bool = False) -> str:
    """What an error of a library or of the system says: one line, at most 160 characters.

    Args:
        error: the error.
        names_file: add the name of the file that the system told of; without, its path is left out,
            for messages that name it themselves.
    """
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
    file = getattr(error, "filename", None)
    return f"{text}: {Path(str(file)).name}" if names_file and file else text


def nearest(name: object, choices: Sequence[object]) -> str | None:
    """The choice that looks most like `name`, or None where none looks like it."""
    likeness = 0.5 if len(str(name)) > 3 else 0.7  # Two of three letters are little: gpu is no cpu.
    return next(iter(difflib.get_close_matches(str(name), map(str, choices), 1, likeness)), None)
