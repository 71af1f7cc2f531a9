"""The program `burnish`: its commands hang on `app`, and `main` turns what happens into exit codes.

Decided here: whatever the user got wrong is one line on stderr and exit code 2, without a traceback
and before anything is written; our own faults keep their traceback and exit with 1. Nothing heavy
is imported before a command needs it, so that help comes at once.
"""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from burnish import __version__, launcher
from burnish.launcher import STOPPED, JobError, Stopped
from burnish.wording import brief

# By name, because most of these modules load torch.
_USER_ERRORS = {
    "burnish.config.ConfigError",
    "burnish.images.ImageError",
    "burnish.tracking.RunError",
}

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that have no type for it."""

_FIRST = ("run", "recipes", "report", "sample")


class _Commands(TyperGroup):
    """Lists the commands that a newcomer needs first, then the others by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        others = sorted(name for name in self.commands if name not in _FIRST)
        return [*(name for name in _FIRST if name in self.commands), *others]


# Plain help, because rich would take `[key=value]` for its markup.
app = typer.Typer(
    cls=_Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user's fault, 75 stopped, 1 else."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Imported by diffusers where it is installed, it warns of a kernel on a hub.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        for number, handler in before.items():
            # What is ignored on purpose stays ignored, as in a shell's background jobs.
            signal.signal(number, handler if handler is signal.SIG_IGN else _stop)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command = typer.main.get_command(app)
            found = command.main(args=given, prog_name="burnish", standalone_mode=False)
        return found if isinstance(found, int) else 0
    except Stopped:
        return _say("stopped; start the same command again to resume", STOPPED)
    except Exception as error:
        return _explained(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _explained(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    if os.environ.get("BURNISH_TRACEBACK"):
        traceback.print_exc()
    if hasattr(error, "format_message"):
        # Of click, or of the copy of click in newer versions of typer.
        place = getattr(getattr(error, "ctx", None), "command_path", "burnish")
        text = error.format_message().rstrip(".?")  # pyright: ignore[reportAttributeAccessIssue]
        return _say(f"{text}; see {place} --help", 2)
    if isinstance(error, JobError):
        return _say(str(error), error.exit_code)
    if _USER_ERRORS & {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}:
        return _say(str(error), 2)
    if _is_out_of_memory(error):
        reason = brief(error) or type(error).__name__
        return _say(
            f"need more memory than there is ({reason}); take fewer or smaller pictures at once, "
            "in a run smaller micro-batches in another folder (--out), of which `burnish doctor "
            "--recipe RECIPE --fit` finds the largest",
            2,
        )
    if not os.environ.get("BURNISH_TRACEBACK"):
        traceback.print_exc()
    return _say(f"{type(error).__name__}: {error}; this is a fault of Burnish, please report it", 1)


def _is_out_of_memory(error: Exception) -> bool:
    """Torch has a type of its own for what its allocator lacks, and texts for all else."""
    is_typed = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return is_typed or any(text in str(error) for text in _OUT_OF_MEMORY)


def _say(text: str, exit_code: int) -> int:
    print(f"burnish: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return exit_code


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Our own warnings are for the user, in one line; those of libraries look as ever."""
    is_ours = category.__module__.startswith("burnish.")
    theirs = warnings.formatwarning(message, category, *place[:2])
    sys.stderr.write(f"{launcher.NOTE}{message}\n" if is_ours else theirs)


def _version(is_wanted: bool) -> bool:
    if is_wanted:
        print(f"burnish {__version__}")
        raise typer.Exit
    return is_wanted


@app.callback(epilog="Start with: burnish run smoke")
def burnish(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Post-train flow-matching image models, and measure what that gained."""
