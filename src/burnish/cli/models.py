"""Commands that make one model of several."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from burnish.cli.program import app
from burnish.config import ConfigError, located, parse
from burnish.wording import nearest


@app.command(
    epilog="Example: burnish merge ties runs/miniature/stages/t2i_teacher "
    "runs/miniature/stages/edit_teacher --out merged"
)
def merge(
    method: Annotated[
        str, typer.Argument(help="average, task_arithmetic, ties, or lora for files of LoRAs.")
    ],
    models: Annotated[
        list[Path],
        typer.Argument(help="Pipeline folders, folders of stages, or LoRAs, of one base."),
    ],
    base: Annotated[
        str, typer.Option("--base", help="What all were trained from.", metavar="DIR")
    ] = "embedded:weights/base",
    scale: Annotated[
        list[float] | None,
        typer.Option(
            "--scale",
            help="Of what a model learnt: once for each with task_arithmetic and lora, once for "
            "all with ties; 1 if left out.",
        ),
    ] = None,
    density: Annotated[
        float, typer.Option(help="Of ties: share of each model's changes that is kept.")
    ] = 0.2,
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")] = Path("merged"),
) -> None:
    """Merge models of one base by arithmetic on their weights.

    The control of a distilled student: it costs nothing, and draws with guidance as its parts do.
    A run measures merges of its own stages if its recipe has `merges`.
    """
    from burnish.adapters import read_adapter, write_adapter
    from burnish.merging import MergeConfig, Method, merge_adapters, merge_into
    from burnish.residency import Source, Stored
    from burnish.shelves import family_of, policy_class

    if out.exists():
        raise ConfigError(f"need a folder that does not exist yet, got {out}; change --out")
    if method == "lora":
        merged = merge_adapters([read_adapter(model) for model in models], scale)
        print(f"LoRA: {write_adapter(out, merged)}")
        return
    if method not in (known := (*get_args(Method), "lora")):
        near = nearest(method, known)
        advice = f"did you mean {near}?" if near else "choose one of them"
        raise ConfigError(f"METHOD: need one of {', '.join(known)}, got {method!r}; {advice}")
    settings = {"method": method, "density": density} | ({"scales": scale} if scale else {})
    config = parse(MergeConfig, settings)
    folders = [pipeline_folder(model) for model in models]
    start = located(base)
    # Nothing is drawn, so that any resolution does, and no device is needed.
    family = policy_class(family_of(start))
    if (other := family_of(folders[0])) != family.family:
        raise ConfigError(
            f"--base: need the {other} that the models were trained from, got a {family.family} in "
            f"{start}; give its folder"
        )
    policy = family.load(start, dtype=Stored(Source(start)).dtype, resolution=64)
    merge_into(policy, folders, config)
    policy.save(out)
    print(f"Model: {out}")


@app.command(epilog="Example: burnish export runs/miniature/student --licence apache-2.0")
def export(
    model: Annotated[
        Path, typer.Argument(metavar="RUN/POLICY", help="A stage or merge of a run folder.")
    ],
    licence: Annotated[
        str,
        typer.Option(
            help="Its licence, for the card: an identifier of the hub, such as apache-2.0, or any "
            "name with --licence-link.",
            metavar="NAME",
        ),
    ] = "other",
    licence_link: Annotated[
        str | None,
        typer.Option(
            "--licence-link",
            help="Of a licence that the hub has no identifier for: its text, as a URL or a file "
            "beside the card.",
            metavar="URL",
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="The base's name on the hub, for the card; unnamed if left out.",
            metavar="ORG/NAME",
        ),
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="The LoRA of a stage that trained one, alone.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; exports/RUN-POLICY if left out.", metavar="DIR"),
    ] = None,
) -> None:
    """Write a trained model for others, with a model card.

    It becomes a diffusers pipeline, or a LoRA that diffusers loads on the base.
    The card says what the model started from, what it was trained on, how it must be drawn, and
    what was measured with which intervals. The export is read again and must draw what the model
    draws.
    """
    from burnish import exporting, runtime
    from burnish.model_card import Terms

    folder, policy = _policy_of_run(model)
    target = out or Path("exports") / f"{folder.resolve().name}-{policy}"
    exporting.export(
        folder,
        policy,
        target,
        runtime.start(),
        terms=Terms(licence, licence_link, base_model),
        as_lora=lora,
    )
    print(f"Model: {target}\nCard: {target / 'README.md'}")


def _policy_of_run(place: Path) -> tuple[Path, str]:
    """The folder of the run, and the name of its policy; the folder of a stage serves, too.

    Raises:
        ConfigError: it is a run's.
    """
    from burnish.summary import read_run

    if (place / "run.json").is_file() and (place / "stages").is_dir():
        names = ", ".join(str(place / name) for name in read_run(place).policies())
        raise ConfigError(f"need RUN/POLICY, got the run {place}; take one of {names}")
    folder = place.parent
    return folder.parent if folder.name == "stages" else folder, place.name


def pipeline_folder(place: Path) -> Path:
    """The folder of a pipeline, or that inside a stage's folder.

    Raises:
        ConfigError: there is none.
    """
    for folder in (place, place / "model"):
        if (folder / "model_index.json").is_file():
            return folder
    raise ConfigError(
        f"need a folder that a pipeline was saved in, got {place}; take one with model_index.json, "
        "or a stage's folder with model/"
    )
