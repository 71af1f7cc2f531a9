"""Commands before a training: keep the prompts that can teach, weigh what rewards have to say."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.options import Json, Overrides
from burnish.cli.program import app
from burnish.cli.recipes import recipe_path
from burnish.config import ConfigError, load, nearest, parse


@app.command(epilog="Example: burnish curate miniature t2i_teacher --keep top=0.5")
def curate(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    stage: Annotated[str, typer.Argument(help="Whose prompts, rollout and rewards are taken.")],
    overrides: Overrides = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="KEY=VALUE",
            help="Rule: noise_multiple, min_range, top or band; may be given several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; runs/curation/STAGE if left out.", metavar="DIR"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw a group of every prompt with the base, keep the prompts whose rewards differ.

    Drawing is resumed and not repeated: the same command with another rule only selects again. A
    stage reads what is kept with `prompts.path=DIR/kept.jsonl`. Started by torchrun, the processes
    share the prompts.
    """
    path = recipe_path(recipe)
    from burnish.curation import CurationConfig, SelectionConfig, measure_prompts, write_kept
    from burnish.stages import RunConfig, load_policy, model_folder
    from burnish.tracking import Run

    rule = parse(SelectionConfig, {}, keep or ())
    whole = load(RunConfig, path, overrides or ())
    if stage not in whole.stages:
        near = nearest(stage, list(whole.stages)) or next(iter(whole.stages))
        raise ConfigError(f"need a stage of {recipe}, got {stage!r}; did you mean {near!r}?")
    plan = whole.stages[stage]
    if not plan.rewards:
        raise ConfigError(f"need a stage with rewards, got {stage!r}; a student needs no curation")
    config = CurationConfig(
        seed=whole.seed,
        prompts=plan.prompts,
        rollout=plan.rollout.model_copy(update={"window": 0, "keep": "none"}),
        rewards=plan.rewards,
        block=plan.prompts_per_step,
    )
    folder = out or Path("runs/curation") / stage
    rt = whole.runtime.build()
    try:
        if rt.is_main:
            command = shlex.join(["burnish", *sys.argv[1:]])
            Run.create(folder, config, command=command, environment=rt.describe())
        rt.barrier()
        policy = load_policy(whole.policy, model_folder(folder, whole.policy.path), rt)
        prompts = measure_prompts(config, policy, folder, rt)
        if rt.is_main:
            _show(write_kept(folder, prompts, rule), folder, as_json)
    finally:
        rt.close()


def _show(found: dict[str, Any], folder: Path, as_json: bool) -> None:
    for name, part in found.items():
        if name != "rule":
            middle = part["range"].get(0.5)
            spread = "" if middle is None else f", middle range {middle:.3g}"
            print(f"{name}: {part['kept']} of {part['prompts']} kept{spread}")
    print(f"Kept: {folder / 'kept.jsonl'}")
    if as_json:
        print(json.dumps({"folder": str(folder), "curation": found}))


@app.command(epilog="Example: burnish calibrate runs/curation/t2i_teacher")
def calibrate(
    folder: Annotated[Path, typer.Argument(help="The folder of `burnish curate`.")],
    as_json: Json = False,
) -> None:
    """Propose weights of the rewards for each category, from groups that are drawn already.

    Prints how much each reward varies inside groups beside its own noise, how rewards go together,
    and the proposal as settings of the stage. It is a proposal: what a category is about, no
    number knows.
    """
    from burnish.calibration import calibrate as measured
    from burnish.curation import CurationConfig, read_profile
    from burnish.tracking import Run, write_json

    config = parse(CurationConfig, Run.open(folder).config(), where=str(folder / "config.yaml"))
    rows = read_profile(folder)
    if not rows:
        raise ConfigError(
            f"need a measured profile in {folder}, got none; run burnish curate first"
        )
    found = measured(rows, config.rewards)
    write_json(folder / "calibration.json", found)
    _show_loudness(found)
    for name in config.rewards:
        own = {category: weights[name] for category, weights in found["weights"].items()}
        told = ", ".join(f"{category}: {weight:g}" for category, weight in own.items())
        print(f"rewards.{name}.weights='{{{told}}}'")
    if as_json:
        print(json.dumps({"folder": str(folder), "calibration": found}))


def _show_loudness(found: dict[str, Any]) -> None:
    for category, rewards in found["loudness"].items():
        for name, heard in rewards.items():
            print(
                f"{category}, {name}: mean {heard['mean']:.3g}, spread {heard['spread']:.3g} in "
                f"groups, {heard['signal']:.0%} of it signal, {heard['saturated']:.0%} of "
                f"{heard['prompts']} groups below the floor"
            )
    for pair, value in found["correlation"].items():
        print(f"correlation of {pair}: {'none' if value is None else f'{value:.2f}'}")
