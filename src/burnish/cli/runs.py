"""Commands that run a recipe, show what it found, and do one of its jobs."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish import launcher
from burnish.cli.options import Force, Json, Out, Overrides
from burnish.cli.program import app
from burnish.cli.recipes import recipe_path
from burnish.config import ConfigError, load
from burnish.launcher import JobError
from burnish.wording import nearest

if TYPE_CHECKING:
    from burnish.run_config import RunConfig

_ROWS = (
    "stages/*/metrics.jsonl",
    "curation/*/profile-*.jsonl",
    "benches/**/pictures-*.jsonl",
    "benches/**/replies-*.jsonl",
)
"""What jobs add to as they go on, and do not do again."""


@app.command(epilog="Example: burnish run miniature seed=1 --out runs/second")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    force: Force = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Make the folder, and only print the jobs."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: train, measure, report.

    Start the same command again to resume a run that was stopped. `burnish recipes` lists the
    recipes, and KEY=VALUE changes any setting of theirs.
    """
    _run(recipe, overrides, out, force, as_json, prepare=prepare)


@app.command(epilog="Example: burnish grpo stages.teacher.steps=20 --out runs/grpo-short")
def grpo(
    overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Train by GRPO: `burnish run grpo`."""
    _run("grpo", overrides, out, force, as_json)


@app.command(epilog="Example: burnish nft stages.teacher.steps=20 --out runs/nft-short")
def nft(
    overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Train by the forward process: `burnish run nft`."""
    _run("nft", overrides, out, force, as_json)


@app.command(epilog="Example: burnish distill stages.student.algorithm.teachers.t2i.path=DIR ...")
def distill(
    overrides: Overrides = None, out: Out = None, force: Force = False, as_json: Json = False
) -> None:
    """Distill your teachers: `burnish run distill`."""
    _run("distill", overrides, out, force, as_json)


def _run(
    recipe: str,
    overrides: Sequence[str] | None,
    out: Path | None,
    force: bool,
    as_json: bool,
    *,
    prepare: bool = False,
) -> None:
    path = recipe_path(recipe)
    from burnish.run_config import RunConfig

    config = load(RunConfig, path, overrides or ())
    folder = (out or Path("runs") / config.name).resolve()
    if folder.is_file():
        raise ConfigError(f"--out: need a folder, got the file {folder}; name another place")
    if prepare:
        if force:
            raise ConfigError("need --prepare or --force, got both; run with --force to begin anew")
        make_folder(config, folder)
        todo = launcher.pending(folder, config.jobs())
        commands = {job: launcher.command(config.runtime, folder, job) for job in todo}
        for command in commands.values():
            print(shlex.join(command))
        if as_json:
            print(json.dumps({"folder": str(folder), "jobs": commands}))
        return
    carry_out(config, folder, force=force)
    _finish(folder, as_json)


def carry_out(
    config: "RunConfig",
    folder: Path,
    *,
    force: bool = False,
    before: Callable[[], None] | None = None,
) -> None:
    """Run every job of a run that has not left its result, after checking all that can be checked.

    Args:
        config: of the run.
        folder: made if missing.
        force: drop what is there.
        before: called when the folder exists and no job runs yet.
    """
    folder = folder.resolve()
    is_new = not folder.exists()
    make_folder(config, folder, force=force)
    if before is not None:
        before()
    try:
        launcher.run_jobs(config, folder, force=force)
    except JobError as error:
        if is_new and error.exit_code == 2 and not _has_results(folder):
            # Or else the corrected command would find the folder of another run.
            shutil.rmtree(folder)
        raise


def make_folder(config: "RunConfig", folder: Path, *, force: bool = False) -> None:
    """Make the folder of a run, or take it up, after checking all that can be checked."""
    from burnish import preflight, revision, runtime
    from burnish.precision import choose_dtype
    from burnish.tracking import Run

    preflight.check_inputs(config, launcher.pending(folder, config.jobs(), force=force))
    device = runtime.choose_device(config.runtime.device)
    dtype = choose_dtype(config.runtime.dtype, device)
    here = runtime.Runtime(device=device, dtype=dtype).describe()
    # Absolute, because the settings of a stage hold the folders of its teachers.
    folder = folder.resolve()
    revision.take_up(config, folder)
    Run.create(folder, config, command=shlex.join(["burnish", *sys.argv[1:]]), environment=here)


def _has_results(folder: Path) -> bool:
    """Whether a run has anything that took time: a result, or a row of one that was begun."""
    rows = (path.stat().st_size for pattern in _ROWS for path in folder.glob(pattern))
    return any(folder.glob("*/*/DONE")) or any(rows)


def _finish(folder: Path, as_json: bool) -> None:
    """Write and show what a run found."""
    from rich.console import Console

    from burnish import report, tables

    page = report.write_report(folder)
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    # Where no terminal says how wide it is, eighty columns would break the tables' words.
    is_told = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if is_told else 120)
    console.print(tables.table(found), tables.cost_table(found))
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    for note in _invalid(folder):
        print(f"burnish: note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps({"folder": str(folder), "report": str(page), "summary": found}))


def _invalid(folder: Path) -> Iterator[str]:
    """What the benches of a run do not say."""
    from burnish.pages.bench import why_invalid
    from burnish.summary import read_run

    for name in read_run(folder).benches:
        path = folder / "benches" / f"{name}.json"
        # A report is also written before a bench is taken.
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
        for model, own in found["models"].items():
            if not own["is_valid"]:
                yield f"bench {name} is invalid for {model}: {why_invalid(found, model)}"


@app.command(hidden=True)
def job(folder: Path, name: str) -> None:
    """Do one job of a run in this process; `burnish run` starts these."""
    # First of all, so that no child outlives its launcher while it still loads libraries.
    launcher.follow_launcher()
    from burnish.jobs import run_job
    from burnish.summary import read_run

    config = read_run(folder)
    if name not in config.jobs():
        jobs = list(config.jobs())
        raise ConfigError(
            f"need a job of the run, got {name!r}; did you mean {nearest(name, jobs) or jobs[0]!r}?"
        )
    rt = config.runtime.build()
    run_job(config, folder, name, rt)
    rt.close()
    if rt.world_size > 1:
        # The result is there: an abort of a library that is unloaded would end the others, too.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


@app.command(epilog="Example: burnish report runs/miniature")
def report(
    folder: Annotated[Path, typer.Argument(help="Of a run, complete or not.")],
    as_json: Json = False,
) -> None:
    """Write report.html and the table of a run again."""
    _finish(folder, as_json)
