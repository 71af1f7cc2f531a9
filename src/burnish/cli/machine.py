"""Commands about what is installed: `burnish doctor`, and building the embedded models."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.options import Json, Overrides
from burnish.cli.program import app
from burnish.cli.recipes import evidence, known_recipes, recipe_path
from burnish.config import ConfigError, load

miniature = typer.Typer(help="The embedded models.", rich_markup_mode=None)
app.add_typer(miniature, name="miniature")


@app.command(epilog="Example: burnish doctor --recipe grpo policy.path=DIR --memory 80")
def doctor(
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Plan the memory of a recipe instead.", metavar="NAME")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="Memory of each device in GiB; this machine's if left out.", min=0),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Plan for N devices: runtime.processes=N runtime.sharding=full.",
            metavar="N",
            min=1,
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Find the largest micro-batches that fit, in minutes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Examine the machine, or plan the memory of a recipe.

    A plan reads settings, prompts and headers, no weights. Of a GPU that is not here, ask with
    --memory and runtime.device=cuda.
    """
    if recipe is not None:
        _plan(recipe, overrides or [], memory, devices, as_json, fit=fit)
        return
    options = {"--fit": fit, "--memory": memory is not None, "--devices": devices is not None}
    alone = [*map(repr, overrides or ()), *(name for name, is_on in options.items() if is_on)]
    if alone:
        raise ConfigError(f"need --recipe for settings, got {alone[0]} alone; name a recipe")
    from burnish import machine

    findings = machine.examine()
    findings += [
        machine.Finding(name=f"recipe {name}", is_fine=True, found=evidence(path))
        for name, path in known_recipes().items()
    ]
    for finding in findings:
        advice = "" if finding.is_fine else f"; {finding.advice}"
        print(f"{'ok' if finding.is_fine else 'BROKEN':<8}{finding.name}: {finding.found}{advice}")
    if as_json:
        print(json.dumps({"findings": [dataclasses.asdict(finding) for finding in findings]}))
    if not all(finding.is_fine for finding in findings):
        raise typer.Exit(1)


def _plan(
    recipe: str,
    overrides: list[str],
    memory: float | None,
    devices: int | None,
    as_json: bool,
    *,
    fit: bool,
) -> None:
    """Show what every stage of a recipe needs, and refuse what a device does not have; or what it
    has room for."""
    from burnish import preflight
    from burnish.planning import micro_batches
    from burnish.planning.forecast import forecast
    from burnish.planning.plan import check, table
    from burnish.run_config import RunConfig

    if devices is not None:
        sharding = "full" if devices > 1 else "none"
        overrides = [*overrides, f"runtime.processes={devices}", f"runtime.sharding={sharding}"]
    config = load(RunConfig, recipe_path(recipe), overrides)
    preflight.check_recipe(config)
    device, available, beside = _planned_for(config.runtime.device, memory)
    preflight.check_devices(config, device)
    if fit:
        if available is None:
            raise ConfigError("need the memory of each device to fit, got none; add --memory GiB")
        found = micro_batches.largest(config, device, available)
        for key, size in found.items():
            print(f"{key}={size}")
        if as_json:
            print(json.dumps({"micro_batches": found}))
        return
    plans = forecast(config, device)
    for plan in plans:
        print(table(plan, available), end="\n\n")
    if as_json:
        print(json.dumps({"plans": [plan.as_json(available) for plan in plans]}))
    check(plans, available, beside)


def _planned_for(device: str, memory: float | None) -> tuple[str, int | None, int | None]:
    """Device of a plan, bytes of it, and of the machine beside it; None is not known."""
    from burnish import runtime
    from burnish.planning.forecast import memory_beside
    from burnish.planning.plan import GIBIBYTE

    if memory is not None:
        if not math.isfinite(memory):
            raise ConfigError(f"--memory: need a number of GiB, got {memory}; give what it has")
        # Of a GPU that is somewhere else nothing can be asked.
        name = device if device == "cuda" else runtime.choose_device(device).type
        return name, round(memory * GIBIBYTE), None
    if device == "cuda" and not runtime.has_gpu():
        raise ConfigError(
            "need the memory of a GPU that is not here, got runtime.device=cuda alone; add "
            "--memory GiB"
        )
    place = runtime.choose_device(device)
    return place.type, runtime.memory(place), memory_beside(place)


@miniature.command(epilog="Example: burnish miniature build --out /tmp/miniature --quick")
def build(
    out: Annotated[Path, typer.Option(help="Where to write.", metavar="DIR")] = Path("miniature"),
    quick: Annotated[bool, typer.Option("--quick", help="Reduced: learns, draws badly.")] = False,
) -> None:
    """Build the embedded models and prompts from nothing, below DIR."""
    from burnish.miniature.build import build

    print(json.dumps(build(out, quick=quick)))


@miniature.command(epilog="Example: burnish miniature annotate --out held-out --prompts 40")
def annotate(
    out: Annotated[Path, typer.Option(help="Where to write.", metavar="DIR")] = Path("annotated"),
    prompts: Annotated[
        int, typer.Option(help="Prompts of each of the seven kinds of picture.", min=1)
    ] = 50,
    seed: Annotated[int, typer.Option(help="Another seed, other pictures.", min=0)] = 1,
) -> None:
    """Write pictures that no judge was trained on, with the opinions of the world's raters.

    Their prompts ask for combinations that no model of the miniature has seen. DIR/pictures.jsonl
    is what `burnish reward report JUDGE annotations='[{path: DIR/pictures.jsonl}]' held_out=false`
    reads.
    """
    from burnish.miniature.annotated import PicturesPlan, write_pictures

    plan = PicturesPlan(
        rendered_scenes=prompts,
        rendered_edits=prompts,
        portraits=prompts,
        mismatched_scenes=prompts,
        mismatched_edits=prompts,
        sampled_scenes=prompts,
        sampled_edits=prompts,
        held_out=True,
        seed=seed,
    )
    print(write_pictures(out, plan))
