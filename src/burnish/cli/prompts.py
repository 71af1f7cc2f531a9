"""Commands before a training: look through sets of prompts, keep the prompts that can teach, weigh
what rewards have to say.
"""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.options import Json, Overrides
from burnish.cli.program import app
from burnish.cli.recipes import recipe_path
from burnish.config import ConfigError, load, parse
from burnish.wording import nearest

if TYPE_CHECKING:
    from burnish.curation import CurationConfig


prompts = typer.Typer(help="Sets of prompts.", rich_markup_mode=None)
app.add_typer(prompts, name="prompts")

_TOLD = 20
"""Broken prompts that are named one by one."""


Set = Annotated[
    str,
    typer.Argument(
        help="A JSONL or Parquet file, a folder of Parquet files, or a folder that `datasets` has "
        "saved."
    ),
]


@prompts.command(epilog="Example: burnish prompts check data.parquet columns.text=caption")
def check(
    path: Set,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Read every prompt of a set and decode all of its images.

    A run looks at 500 of them before it starts. Broken ones are named by file and row, and end the
    command with exit code 2.
    """
    from burnish.progress import track
    from burnish.prompts import PromptsConfig

    found = parse(PromptsConfig, {"path": path}, overrides or ()).open()
    broken: list[str] = []
    for place in track(range(len(found)), "prompts"):
        try:
            found.check(place)
        except ConfigError as error:
            broken.append(str(error))
            if len(broken) <= _TOLD:
                print(f"broken: {error}")
    counts = Counter(f"{entry.task}/{entry.category}" for entry in found.entries)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count} prompts")
    if broken:
        raise ConfigError(
            f"need whole prompts, got {len(broken)} broken ones of {len(found)}, such as "
            f"{broken[0]}"
        )
    print(f"{len(found)} prompts, all readable")
    if as_json:
        print(json.dumps({"path": path, "prompts": len(found), "by": dict(counts)}))


@prompts.command(
    epilog="Example: burnish prompts write data.parquet columns.text=caption limit=200 "
    "--out held-out.jsonl"
)
def write(
    path: Set,
    out: Annotated[Path, typer.Option("--out", help="JSONL file to write.", metavar="FILE")],
    overrides: Overrides = None,
) -> None:
    """Write a set, or what `tasks`, `categories` and `limit` leave of it, as JSONL with images.

    For the sets that measure: only those of a stage may have columns with names of their own.
    """
    from burnish.progress import track
    from burnish.prompts import PromptsConfig, write_prompts

    if out.exists():
        raise ConfigError(f"need a file that does not exist yet, got {out}; change --out")
    config = parse(PromptsConfig, {"path": path}, overrides or ())
    there = {entry.task for entry in config.open().entries}
    tasks = tuple(task for task in config.tasks if task in there)
    found = config.model_copy(update={"tasks": tasks or config.tasks}).read()
    write_prompts(out, track(found, "prompts"))
    print(f"{len(found)} prompts: {out}")


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
            help="Rule, may be given several times. chance=0.05 (default): ranges that noise alone "
            "reaches so seldom; chance=null takes it out. min_range=0.5: larger ranges, in points. "
            "top=0.5: that share with the largest. band=[0.25,0.75]: of middling difficulty.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder; runs/curation/RECIPE-STAGE if left out.", metavar="DIR"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep the prompts whose pictures differ in reward.

    The base draws a group of every prompt. That is resumed and not repeated: the same command with
    another rule only selects again. A stage reads what is kept, see the last line that is printed.
    Started by torchrun, the processes share the prompts.
    """
    from burnish.curation import SelectionConfig, measure_prompts, read_profile, select, write_kept
    from burnish.pages.curation import write_curation_page
    from burnish.policy_config import load_policy
    from burnish.run_folder import model_folder
    from burnish.shelves import policy_class
    from burnish.tracking import Run

    rule = parse(SelectionConfig, {}, keep or ())
    name, config = _of_stage(recipe, stage, overrides or ())
    folder = out or Path("runs/curation") / f"{name}-{stage}"
    prompts = config.prompts.read()
    policy_class(config.policy.family).check_sources(prompts.entries)
    rt = config.runtime.build()
    command = shlex.join(["burnish", *sys.argv[1:]])
    policy = load_policy(config.policy, model_folder(folder, config.policy.path), rt)
    if rt.is_main:
        Run.create(folder, config, command=command, environment=rt.describe())
    rt.barrier()
    measure_prompts(config, prompts, policy, folder, rt)
    if rt.is_main:
        found = write_kept(folder, prompts, rule)
        rows = read_profile(folder, prompts)
        kept = frozenset(select(rows, rule))
        shown = write_curation_page(folder, stage, rows, kept, found, command)
        _show_kept(found, stage, folder, shown, as_json)
    rt.close()


def _of_stage(recipe: str, stage: str, overrides: Sequence[str]) -> "tuple[str, CurationConfig]":
    """The recipe's own name, and what is drawn for one of its stages."""
    path = recipe_path(recipe)
    from burnish.run_config import RunConfig

    whole = load(RunConfig, path, overrides)
    if stage not in whole.stages:
        near = nearest(stage, list(whole.stages)) or next(iter(whole.stages))
        raise ConfigError(f"need a stage of {recipe}, got {stage!r}; did you mean {near!r}?")
    plan = whole.stages[stage]
    if not plan.rewards:
        raise ConfigError(f"need a stage with rewards, got {stage!r}; a student needs no curation")
    return whole.name, whole.curated(stage)


def _show_kept(found: dict[str, Any], stage: str, folder: Path, shown: Path, as_json: bool) -> None:
    for name, part in {"all": found["all"], **found["categories"]}.items():
        middle = part["range"].get(0.5)
        spread = "" if middle is None else f", middle range {middle:.3g}"
        failed = f", {part['not_scored']} not scored" if part["not_scored"] else ""
        print(f"{name}: {part['kept']} of {part['prompts']} kept{spread}{failed}")
    for reason in found["all"]["failures"]:
        print(f"failed: {reason}")
    print(f"Use them with stages.{stage}.prompts.path={folder / 'kept.jsonl'}")
    print(f"Page: {shown}")
    if as_json:
        print(json.dumps({"folder": str(folder), "curation": found}))


@app.command(epilog="Example: burnish calibrate runs/curation/miniature-t2i_teacher")
def calibrate(
    folder: Annotated[Path, typer.Argument(help="The folder of `burnish curate`.")],
    as_json: Json = False,
) -> None:
    """Weigh rewards by what they say in each category.

    Prints how much each reward varies inside groups beside its own noise, how rewards go together,
    and the proposal as settings of the stage. It is a proposal: what a category is about, no
    number knows.
    """
    from burnish.calibration import calibrate as measured
    from burnish.curation import CurationConfig, read_profile
    from burnish.tracking import Run, write_json

    given = Run.open(folder).config()
    if "rollout" not in given:
        raise ConfigError(f"need the folder of `burnish curate`, got {folder}, another run's")
    config = parse(CurationConfig, given, where=str(folder / "config.yaml"))
    rows = read_profile(folder, config.prompts.read())
    if not rows:
        raise ConfigError(f"need a measured profile in {folder}, got none; run burnish curate")
    found = measured(rows, config.rewards)
    write_json(folder / "calibration.json", found)
    _show_loudness(found)
    for name, reward in config.rewards.items():
        weights = {**reward.weights, **{c: own[name] for c, own in found["weights"].items()}}
        told = ", ".join(f"{category}: {weight:g}" for category, weight in weights.items())
        print(shlex.quote(f"stages.{config.stage}.rewards.{name}.weights={{{told}}}"))
    for category in sorted(found["loudness"].keys() - found["weights"].keys()):
        print(
            f"{category}: no weights are proposed, as a reward would need another one on each of "
            "its tasks; give the recipe a reward for each task"
        )
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
    for category, pairs in found["correlation"].items():
        for pair, value in pairs.items():
            told = "none" if value is None else f"{value:.2f}"
            print(f"{category}, correlation of {pair}: {told}")
