"""The command that runs a recipe's stages as the arms of a study, with several seeds."""

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.options import Json, Overrides
from burnish.cli.program import app
from burnish.cli.recipes import known_recipes, recipe_path
from burnish.cli.runs import carry_out
from burnish.config import ConfigError, load, read_yaml
from burnish.launcher import JobError


@app.command(epilog="Example: burnish study judges study.seeds=[0,1] --out runs/studies/two")
def study(
    name: Annotated[
        str | None, typer.Argument(help="A study's name, or the path of a recipe with `study:`.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Study folder; runs/studies/NAME if left out.", metavar="DIR"),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all studies, one by one.")] = False,
    as_json: Json = False,
) -> None:
    """Run the arms of a study with several seeds and compare them.

    Every seed is a run of its own, with its report; scores, table and page are in the study's
    folder. Start the same command again to go on where it stopped.
    """
    if every and (name is not None or overrides or out is not None):
        raise ConfigError("need --all alone, got more; name one study to change its settings")
    names = known_studies() if every else [name] if name is not None else []
    if not names:
        raise ConfigError(f"need a study, got none; the studies are {', '.join(known_studies())}")
    from burnish.tracking import RunError

    found, failed = [], []
    for one in names:
        try:
            found.append(_study(one, list(overrides or ()), out))
        except (ConfigError, JobError, RunError) as error:
            if not every:
                raise
            # A night's work does not end with the first study that does.
            print(f"burnish: {one}: {error}", file=sys.stderr)
            failed.append(one)
    if as_json:
        print(json.dumps({"studies": found}))
    if failed:
        raise JobError(
            f"{len(failed)} of {len(names)} studies failed ({', '.join(failed)}); fix what they "
            "say and start the same command again",
            1,
        )


def known_studies() -> list[str]:
    """Names of the recipes that are studies."""
    return [name for name, path in known_recipes().items() if "study" in read_yaml(path)]


def _study(name: str, overrides: list[str], out: Path | None) -> dict[str, Any]:
    path = recipe_path(name)
    if any(override.partition("=")[0].strip() == "seed" for override in overrides):
        raise ConfigError("need the seeds of a study, got seed; set study.seeds=[0,1,2]")
    from rich.console import Console
    from rich.markdown import Markdown

    from burnish import preflight, report, revision
    from burnish.run_config import RunConfig
    from burnish.studies.study import (
        check_comparisons,
        of_seed,
        seed_folder,
        share_base,
        write_study,
    )

    config = load(RunConfig, path, overrides)
    if config.study is None:
        raise ConfigError(
            f"need a recipe with `study:`, got {name}; the studies are {', '.join(known_studies())}"
        )
    check_comparisons(config)
    folder = out or Path("runs/studies") / config.name
    seeds = config.study.seeds
    for seed in seeds:
        run = seed_folder(folder, seed)
        own = revision.with_later(of_seed(config, seed), run)
        look = partial(preflight.check_inputs, own)
        for arm in revision.take_up(own, run, arms=True, look=look):
            print(
                f"burnish: note: {arm} of seed {seed} has other settings, it is run again",
                file=sys.stderr,
            )
        before = partial(share_base, folder, seeds, seed)
        carry_out(own, run, before=before)
        report.write_report(run)
    command = shlex.join(["burnish", "study", name, *overrides])
    found = write_study(config, folder, command)
    Console(width=None if sys.stdout.isatty() else 160).print(
        Markdown((folder / "study.md").read_text(encoding="utf-8"))
    )
    print(f"Table: {folder / 'study.md'}")
    print(f"Page: {folder / 'study.html'}")
    return {"folder": str(folder), **found}
