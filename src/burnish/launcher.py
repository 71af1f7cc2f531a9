"""Run the jobs of a run, each in a process of its own, as many at once as there are cores or GPUs.

Decided here: a job whose input is made again is run again too; the first failure stops everything,
because later jobs wait for it or would hide it. A child lives as long as its standard input is
open: the launcher holds the other end, so however it ends, its children end. Children have sessions
of their own, so that Ctrl-C reaches the launcher alone and it can stop them in order. This file
loads torch only where it must, so that the command line starts quickly.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burnish.run_config import RunConfig
    from burnish.runtime import RuntimeConfig

STOPPED = 75
"""Exit code of a program that was asked to stop and can be started again."""

Jobs = Mapping[str, Sequence[str]]
"""Job -> the jobs it waits for."""

NOTE = "burnish: note: "
"""Beginning of a line in a child's log that the launcher shows to its user."""

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
_LINE_SECONDS = 10.0
_TIED = "BURNISH_TIED_TO_STDIN"
_ERROR = "burnish: "
_EXIT = re.compile(r"\s*exitcode\s*: (?P<code>(?!-15)-?\d+) ")
"""How torchrun tells of a process that failed, but for those that it then ends itself."""
_PROGRESS = re.compile(r"[^:]+: (?P<done>\d+)(/(?P<total>\d+))?, \d+ s\b")
_KEEP_FREED = {name: str(1 << 30) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}


class JobError(RuntimeError):
    """A job failed; the message is one line, `exit_code` is the job's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(BaseException):
    """The user or the system asked to stop; no error, hence no `Exception`."""


# --- The jobs of a run -----------------------------------------------------------------------


def run_jobs(config: "RunConfig", folder: Path, *, force: bool = False) -> None:
    """Run every job of a run that has not left its result.

    Args:
        config: of the run.
        folder: its run folder, which holds `config.yaml`.
        force: drop all results and run every job again.

    Raises:
        JobError: a job failed; the others have been stopped.
        Stopped: by a signal; the jobs have been stopped.
    """
    from burnish.run_folder import drop_result, is_complete

    jobs = config.jobs()
    todo = pending(folder, jobs, force=force)
    for job in todo:
        # What a job may resume from stays.
        if force or is_complete(folder, job):
            drop_result(folder, job)
    launch(
        todo,
        command=lambda job: command(config.runtime, folder, job),
        log_file=lambda job: log_file(folder, job),
        environments=environments(config.runtime, todo),
        num_complete=len(jobs) - len(todo),
    )


def command(settings: "RuntimeConfig", folder: Path, job: str) -> list[str]:
    """The command line of a job; a training stage may have several processes."""
    start = [sys.executable, "-m"]
    if (ranks := _ranks(settings, job)) > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return [*start, "burnish", "job", str(folder), job]


def _ranks(settings: "RuntimeConfig", job: str) -> int:
    """Processes of a job."""
    return settings.processes if job.startswith("train/") else 1


def pending(folder: Path, jobs: Jobs, *, force: bool = False) -> dict[str, tuple[str, ...]]:
    """The jobs that must be run: not complete, or waiting for one that must be run."""
    from burnish.run_folder import is_complete

    todo: dict[str, tuple[str, ...]] = {}
    for job, needs in jobs.items():
        if force or not is_complete(folder, job) or any(need in todo for need in needs):
            todo[job] = tuple(needs)
    return todo


def log_file(folder: Path, job: str) -> Path:
    """What a job prints; outside of the job's folder, which must be empty when it starts."""
    return folder / "logs" / f"{job.replace('/', '-')}.txt"


def environments(config: "RuntimeConfig", jobs: Collection[str]) -> list[dict[str, str]]:
    """The environment of each of the jobs that may run at once."""
    import torch

    from burnish import runtime
    from burnish.config import ConfigError

    ranks = max((_ranks(config, job) for job in jobs), default=1)
    if runtime.choose_device(config.device).type == "cuda":
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        if len(names) < ranks:
            raise ConfigError(
                f"runtime.processes: need a GPU for each of {ranks}, found {len(names)}; set "
                f"runtime.processes={len(names)}"
            )
        starts = range(0, len(names) - ranks + 1, ranks)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(names[n : n + ranks])} for n in starts]
    threads = config.threads or 1
    count = max(1, min(runtime.usable_cores() // (threads * ranks), len(jobs)))
    limits = {"OMP_NUM_THREADS": str(threads)} if count * ranks > 1 else {}
    return [{**_KEEP_FREED, **limits} for _ in range(count)]


# --- Processes -------------------------------------------------------------------------------


def follow_launcher() -> None:
    """In a child: end this process as soon as its launcher has ended; elsewhere nothing."""
    if os.environ.pop(_TIED, None) is None:
        return

    def wait() -> None:
        # Nothing is ever written: the read returns when the last writer, the launcher, is gone.
        while os.read(0, 1):
            pass
        os._exit(STOPPED)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


@dataclass
class _Child:
    """A job under way."""

    job: str
    process: subprocess.Popen[bytes]
    log: Path
    environment: Mapping[str, str]
    offset: int
    """How much of the log has been read; earlier attempts are before it."""
    progress: str = ""
    last: str = ""
    error: str = ""
    share: float = 0.0
    """How much of the job is done."""
    notes: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    """Of the job's processes that failed, where it has several."""

    def read(self) -> None:
        """Take in the whole lines that were written since the last time."""
        has_ended = self.process.poll() is not None
        with self.log.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        whole = data if has_ended else data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._take(line.rstrip())

    def _take(self, line: str) -> None:
        self.last = line or self.last
        if line.startswith(NOTE):
            self.notes.append(f"burnish: {self.job}: {line.removeprefix(NOTE)}")
        elif line.startswith(_ERROR):
            # What other processes say of it later is that this one has left them.
            self.error = self.error or line.removeprefix(_ERROR)
        elif match := _EXIT.match(line):
            self.codes.append(int(match["code"]))
        elif match := _PROGRESS.match(line):
            self.progress = line
            if total := int(match["total"] or 0):
                self.share = min(1.0, int(match["done"]) / total)

    @property
    def line(self) -> str:
        """One line for the screen; most progress lines begin with the name of the stage."""
        is_named = self.progress.partition(":")[0].endswith(self.job.split("/")[-1])
        return self.progress if is_named else f"{self.job}: {self.progress or 'starting'}"

    def failure(self) -> JobError:
        """Why the job ended, in the words of the job where it had any."""
        code = next((own for own in self.codes if own < 0 or own == 2), self.process.returncode)
        if code < 0:
            name = signal.Signals(-code).name
            return JobError(
                f"{self.job}: the process was killed by {name}, perhaps for want of memory;"
                " start the same command again to resume",
                1,
            )
        reason = self.error or self.last or "it said nothing"
        where = "" if code == 2 and self.error else f"; all it said is in {self.log}"
        return JobError(f"{self.job}: {reason}{where}", code)


def launch(
    jobs: Jobs,
    *,
    command: Callable[[str], Sequence[str]],
    log_file: Callable[[str], Path],
    environments: Sequence[Mapping[str, str]],
    num_complete: int = 0,
) -> None:
    """Run jobs in processes; a job starts when those it waits for are done and there is
    an environment for it.

    Args:
        jobs: in the order in which they should start; a job that is waited for but not among them
            counts as done.
        command: the command line of a job; its process should call `follow_launcher`.
        log_file: where its output goes, after what is there.
        environments: one for each process that may run at once.
        num_complete: jobs that were done before, for the progress bar.

    Raises:
        JobError: a job failed; the others have been stopped.
        Stopped: SIGINT, SIGTERM or SIGHUP came, or a job was stopped by one.
    """
    waiting, free = dict(jobs), list(environments)
    running: list[_Child] = []
    with _listening() as stops, _Screen(len(jobs) + num_complete) as screen:
        try:
            while waiting or running:
                ended = [child for child in running if child.process.poll() is not None]
                if stops:  # Who stops a whole group of processes stops what ended, too.
                    raise Stopped
                for child in ended:
                    running.remove(child)
                    free.append(child.environment)
                    child.read()
                    _check_end(child, screen)
                for job in _ready(waiting, running)[: len(free)]:
                    del waiting[job]
                    running.append(_start(job, command(job), log_file(job), free.pop(0)))
                for child in running:
                    child.read()
                screen.show(running, len(waiting))
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            _end(running, stops)


def _ready(waiting: Jobs, running: Sequence[_Child]) -> list[str]:
    unfinished = {*waiting, *(child.job for child in running)}
    ready = [job for job, needs in waiting.items() if not unfinished.intersection(needs)]
    assert ready or running or not waiting, f"jobs wait for each other: {list(waiting)}"
    return ready


def _start(job: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> _Child:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    except OSError:
        from burnish.tracking import writing

        with writing(log):
            raise
    with output:
        offset = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, _TIED: "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    return _Child(job, process, log, environment, offset)


def _check_end(child: _Child, screen: "_Screen") -> None:
    screen.note(child)
    if (code := child.process.returncode) in (STOPPED, -signal.SIGTERM):
        raise Stopped
    if code != 0:
        raise child.failure()


def _end(running: Sequence[_Child], stops: Sequence[int]) -> None:
    """Ask the children to end, and kill those that do not; a second signal kills at once."""
    for child in running:
        child.process.terminate()
    asked, deadline = len(stops), time.monotonic() + _GRACE_SECONDS
    while any(child.process.poll() is None for child in running):
        if time.monotonic() > deadline or len(stops) > max(asked, 1):
            for child in running:
                child.process.kill()
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """The signals to stop that have come; they interrupt nothing while inside."""
    came: list[int] = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
    # What is ignored on purpose stays ignored: nohup does that.
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number in heard:
            signal.signal(number, before[number])


class _Screen:
    """What runs: a bar and a line per job on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._lines = total, [""]
        self._live: Any = None
        self._bar: Any = None
        self._last = time.monotonic()

    def __enter__(self) -> "_Screen":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            console = Console(stderr=True)
            words, elapsed = TextColumn("{task.description}"), TimeElapsedColumn()
            self._bar = Progress(BarColumn(), words, elapsed, console=console)
            self._bar.add_task("", total=self._total)
            self._live = Live(get_renderable=self._picture, console=console, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, running: Sequence[_Child], num_waiting: int) -> None:
        """Bring the screen up to date."""
        for child in running:
            self.note(child)
        done = self._total - num_waiting - len(running)
        self._lines = [child.line for child in running]
        if self._live is not None:
            share = done + sum(child.share for child in running)
            text = f"{done}/{self._total} jobs"
            self._bar.update(self._bar.task_ids[0], completed=share, description=text)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            line = "; ".join([f"{done}/{self._total} jobs", *self._lines])
            print(line, file=sys.stderr, flush=True)

    def note(self, child: _Child) -> None:
        """Pass on what the job wants its user to know."""
        for line in child.notes:
            print(line, file=sys.stderr, flush=True)
        child.notes.clear()

    def _picture(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines]
        return Group(*lines, self._bar.get_renderable())
