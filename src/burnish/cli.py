"""The commands. Their job is to read what the user means; what they do is written elsewhere.

Decided here: whatever the user got wrong is one line on stderr and exit code 2, without a traceback
and before anything is written; our own faults keep their traceback and exit with 1. Nothing heavy
is imported before a command needs it, so that help comes at once.
"""

import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish import __version__, launcher
from burnish.config import EMBEDDED, ConfigError, load, located, nearest, read_yaml
from burnish.launcher import STOPPED, JobError, Stopped

if TYPE_CHECKING:
    from burnish.stages import PolicyConfig

RECIPES = Path(__file__).parent / "recipes"
"""Complete runs that ship with the package."""

# By name, because most of these modules load torch.
_USER_ERRORS = {
    "burnish.config.ConfigError",
    "burnish.images.ImageError",
    "burnish.tracking.RunError",
}

# Plain help, because rich would take `[key=value]` for its markup.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
miniature = typer.Typer(help="The embedded models.", rich_markup_mode=None)
app.add_typer(miniature, name="miniature")

_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, e.g. seed=1."),
]
_Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder; runs/NAME if left out.", metavar="DIR")
]
_Force = Annotated[
    bool, typer.Option("--force", help="Drop the results in the folder and start over.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 our fault, 2 the user's, 75 stopped."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
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
    if not os.environ.get("BURNISH_TRACEBACK"):
        traceback.print_exc()
    return _say(f"{type(error).__name__}: {error}; this is a fault of Burnish, please report it", 1)


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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Post-train flow-matching image models, and measure what that gained."""


# --- Runs ------------------------------------------------------------------------------------


@app.command(epilog="Example: burnish run miniature seed=1 --out runs/second")
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    overrides: _Overrides = None,
    out: _Out = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Run a recipe: train, measure, report.

    Start the same command again to resume a run that was stopped. `burnish recipes` lists the
    recipes, and KEY=VALUE changes any setting of theirs.
    """
    _run(recipe, overrides, out, force, as_json)


@app.command(epilog="Example: burnish grpo stages.teacher.steps=20 --out runs/grpo-short")
def grpo(
    overrides: _Overrides = None, out: _Out = None, force: _Force = False, as_json: _Json = False
) -> None:
    """Train by GRPO: `burnish run grpo`."""
    _run("grpo", overrides, out, force, as_json)


@app.command(epilog="Example: burnish nft policy.path=MODEL policy.resolution=512")
def nft(
    overrides: _Overrides = None, out: _Out = None, force: _Force = False, as_json: _Json = False
) -> None:
    """Train by the forward process: `burnish run nft`."""
    _run("nft", overrides, out, force, as_json)


@app.command(epilog="Example: burnish distill stages.student.algorithm.teachers.t2i.path=DIR ...")
def distill(
    overrides: _Overrides = None, out: _Out = None, force: _Force = False, as_json: _Json = False
) -> None:
    """Distill your teachers: `burnish run distill`."""
    _run("distill", overrides, out, force, as_json)


def _run(
    recipe: str, overrides: Sequence[str] | None, out: Path | None, force: bool, as_json: bool
) -> None:
    path = _recipe_path(recipe)
    from burnish import preflight, runtime
    from burnish.stages import RunConfig
    from burnish.tracking import Run

    config = load(RunConfig, path, overrides or ())
    preflight.check_inputs(config)
    device = runtime.choose_device(config.runtime.device)
    dtype = runtime.choose_dtype(config.runtime.dtype, device)
    here = runtime.Runtime(device=device, dtype=dtype).describe()
    # Absolute, because the settings of a stage hold the folders of its teachers.
    folder = (out or Path("runs") / config.name).resolve()
    is_new = not folder.exists()
    Run.create(folder, config, command=shlex.join(["burnish", *sys.argv[1:]]), environment=here)
    try:
        launcher.run_jobs(config, folder, force=force)
    except JobError as error:
        if is_new and error.exit_code == 2 and not _has_results(folder):
            # Or else the corrected command would find the folder of another run.
            shutil.rmtree(folder)
        raise
    _finish(folder, as_json)


def _has_results(folder: Path) -> bool:
    """Whether a run has anything that took time: a result, or a checkpoint to resume from."""
    return any(folder.glob("*/*/DONE")) or any(folder.glob("stages/*/checkpoints/*"))


def _finish(folder: Path, as_json: bool) -> None:
    """Write and show what a run found."""
    from rich.console import Console

    from burnish import report, summary

    page = report.write_report(folder)
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    console = Console()
    console.print(summary.table(found), summary.cost_table(found))
    console.print(f"Report: {page}", soft_wrap=True, highlight=False, markup=False)
    if as_json:
        print(json.dumps({"folder": str(folder), "report": str(page), "summary": found}))


@app.command(hidden=True)
def job(folder: Path, name: str) -> None:
    """Do one job of a run in this process; `burnish run` starts these."""
    # First of all, so that no child outlives its launcher while it still loads libraries.
    launcher.follow_launcher()
    from burnish import stages, summary

    config = summary.read_run(folder)
    if name not in config.jobs():
        jobs = list(config.jobs())
        raise ConfigError(
            f"need a job of the run, got {name!r}; did you mean {nearest(name, jobs) or jobs[0]!r}?"
        )
    rt = config.runtime.build()
    try:
        stages.run_job(config, folder, name, rt)
    finally:
        rt.close()


@app.command(epilog="Example: burnish report runs/miniature")
def report(folder: Path, as_json: _Json = False) -> None:
    """Write report.html and the table of a run again."""
    _finish(folder, as_json)


# --- Recipes ---------------------------------------------------------------------------------


@app.command(epilog="Example: burnish recipes")
def recipes() -> None:
    """List the recipes: purpose, hardware, time."""
    for name, path in _recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        header = itertools.takewhile(lambda line: line.startswith("#"), lines)
        words = [f"    {line[1:].strip()}".rstrip() for line in header]
        print(f"{name} ({_evidence(path)})", *words, "", sep="\n")


def _recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _evidence(path: Path) -> str:
    return str(read_yaml(path).get("evidence", "untested"))


def _recipe_path(recipe: str) -> Path:
    """The file of a recipe's name or path."""
    known = _recipes()
    if recipe in known:
        return known[recipe]
    if recipe.endswith((".yaml", ".yml")) or Path(recipe).is_file():
        return Path(recipe)
    near = nearest(recipe, list(known))
    advice = f"did you mean {near!r}?" if near else f"the recipes are {', '.join(known)}"
    raise ConfigError(f"need a recipe's name or a YAML file, got {recipe!r}; {advice}")


# --- Pictures --------------------------------------------------------------------------------


@app.command(epilog="Example: burnish sample 'a large red circle' --model runs/miniature/student")
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Annotated[
        str, typer.Option(help="A pipeline folder, RUN/STAGE of a run folder, or embedded:...")
    ] = "embedded:weights/base",
    source: Annotated[Path | None, typer.Option(help="Picture to edit.", metavar="IMAGE")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="1 is no guidance; a stage's own if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps.")] = None,
    resolution: Annotated[int | None, typer.Option(min=32, help="Side in pixels.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of a prompt's first picture.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="PNG to write.", metavar="FILE")] = Path("sample.png"),
) -> None:
    """Draw, or edit a picture; one row per prompt.

    Every row has the same seeds. A prompt says what to draw, or with --source what to change.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"need a file name that ends in .png, got {out}; change --out")
    from burnish import images, rollout, runtime, stages, tracking
    from burnish.types import Prompt

    picture = None if source is None else images.encode_png(images.read(source))
    model_folder, defaults = _model(model)
    policy = defaults.policy.model_copy(
        update={"resolution": resolution or defaults.policy.resolution}
    )
    rt = runtime.start()
    drawer = stages.load_policy(policy, model_folder, rt)
    asked = [
        Prompt(id=str(row), text=text, task="t2i" if picture is None else "edit", source=picture)
        for row, text in enumerate(prompts)
        for _ in range(count)
    ]
    with rt.autocast():
        drawn = rollout.draw(
            drawer,
            asked,
            num_steps=steps or defaults.num_steps,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            seeds=[seed + place for _ in prompts for place in range(count)],
        )
    sheet = images.grid([images.to_pil(image) for image in drawn], count)
    with tracking.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tracking.write_atomic(out, images.encode_png(sheet))
    print(out)


@dataclasses.dataclass(frozen=True)
class _Defaults:
    """How a model is drawn with unless the command says otherwise."""

    policy: "PolicyConfig"
    num_steps: int
    guidance_scale: float


def _model(text: str) -> tuple[Path, _Defaults]:
    """The pipeline folder that `--model` means, and how its run draws with it."""
    from burnish import stages, summary

    place = located(text)
    options = (place, place / "model", place.parent / "stages" / place.name / "model")
    folder = next((path for path in options if (path / "model_index.json").is_file()), None)
    if folder is None:
        known = [str(place / path.parent.name) for path in sorted(place.glob("stages/*/model"))]
        advice = f"take {known[-1]}" if known else "check --model"
        raise ConfigError(f"need a folder that a pipeline was saved in, got {text}; {advice}")
    name, ran = folder.parent.name, folder.parents[2] if len(folder.parents) > 2 else folder
    if folder.name == "model" and (ran / "run.json").is_file():
        if not stages.is_complete(ran, f"train/{name}"):
            raise ConfigError(
                f"need a stage that is complete, {name} of {ran} is not; resume its run first"
            )
        config = summary.read_run(ran)
        scale = config.deployed_scale(name)
        return folder, _Defaults(config.policy, config.evaluation.num_steps, scale)
    if text.startswith(EMBEDDED):
        return folder, _Defaults(stages.PolicyConfig(resolution=64), 10, 3.0)
    return folder, _Defaults(stages.PolicyConfig(), 40, 4.0)


# --- The installation ------------------------------------------------------------------------


@app.command(epilog="Example: burnish doctor --json")
def doctor(as_json: _Json = False) -> None:
    """Examine installation and machine."""
    from burnish import preflight

    findings = preflight.examine()
    findings += [
        preflight.Finding(name=f"recipe {name}", is_fine=True, found=_evidence(path))
        for name, path in _recipes().items()
    ]
    for finding in findings:
        advice = "" if finding.is_fine else f"; {finding.advice}"
        print(f"{'ok' if finding.is_fine else 'BROKEN':<8}{finding.name}: {finding.found}{advice}")
    if as_json:
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}))
    if not all(finding.is_fine for finding in findings):
        raise typer.Exit(1)


@miniature.command(epilog="Example: burnish miniature build --out /tmp/miniature --quick")
def build(
    out: Annotated[Path, typer.Option(help="Where to write.", metavar="DIR")] = Path("miniature"),
    quick: Annotated[bool, typer.Option("--quick", help="Reduced: learns, draws badly.")] = False,
) -> None:
    """Build the embedded models and prompts from nothing, below DIR."""
    from burnish.miniature.build import build

    print(json.dumps(build(out, quick=quick)))
