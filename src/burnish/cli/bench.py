"""Commands of the benches: draw, judge, compare."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.options import Again, Json
from burnish.cli.places import named
from burnish.cli.program import app
from burnish.config import ConfigError, parse, parse_yaml, read_yaml
from burnish.wording import nearest

if TYPE_CHECKING:
    from burnish.bench.base import BenchConfig
    from burnish.bench_tree import Replies
    from burnish.benching import ChosenBench
    from burnish.exporting import Deployment
    from burnish.run_config import RunConfig
    from burnish.runtime import Runtime

bench = typer.Typer(help="Benches: draw, judge, compare.", rich_markup_mode=None)
app.add_typer(bench, name="bench")

Which = Annotated[
    str,
    typer.Argument(
        metavar="BENCH",
        help="A bench's name, its settings as YAML, or a YAML file; see `burnish bench list`.",
    ),
]
Base = Annotated[
    str | None, typer.Option(help="Model that the others are compared with; the first if left out.")
]
OutFolder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for pictures, replies and the result.", metavar="DIR"),
]


@bench.command("list")
def list_benches() -> None:
    """List the benches, and the files and servers that each needs."""
    for kind, config in _kinds().items():
        fields = config.model_fields
        needed = [name for name in fields if fields[name].is_required() or name == "judge"]
        told = sys.modules[config.__module__].__doc__ or ""
        print(f"{kind}: {told.splitlines()[0]}")
        for name in needed:
            print(f"    needs {name}{': url and model of a server' if name == 'judge' else ''}")


@bench.command(epilog="Example: burnish bench run '{kind: miniature, task: edit}' runs/miniature")
def run(
    which: Which,
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN | NAME=FOLDER",
            help="Run folders, whose policies are measured, pipelines, or folders of pictures.",
        ),
    ],
    base: Base = None,
    out: OutFolder = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the pictures; a run's own, or 0 for others, if left out."),
    ] = None,
    again: Again = False,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a bench, have them judged, and compare the models.

    Pictures and replies that are there are kept: the same command goes on where it stopped. A
    pipeline draws as its run or its export says; pictures of yours are judged as they are.
    """
    from burnish import benching, runtime
    from burnish.pages.bench import power
    from burnish.tracking import lock

    chosen = _chosen_bench(which)
    folder = out or Path("bench") / chosen.name
    found = {name: _source(chosen, place) for name, place in _models(places, chosen).items()}
    base = _base(base, list(found))
    print(power(len(chosen.items), _known_spread(folder, chosen), chosen.bench.scale))
    rt = runtime.start()
    if rt.is_main:
        # Or two would pay for the same replies.
        lock(folder)
    pictures = {
        name: _pictures(chosen, name, source, folder, rt, seed) for name, source in found.items()
    }
    if chosen.bench.judge() is None:
        for name, place in pictures.items():
            print(f"Pictures of {name}: {place}")
        print("No judge: run the official program on them, then `burnish bench read` on its result")
        if as_json:
            print(json.dumps({"pictures": {name: str(place) for name, place in pictures.items()}}))
        return
    replies, shown = {}, {}
    for name, place in pictures.items():
        kept = folder / chosen.replies_folder / name
        benching.judge_pictures(chosen, place, kept, rt, label=name, again=again)
        replies[name] = benching.read_replies(chosen, place, kept)
        shown[name] = {i.id: place / path for i, number, path in chosen.places() if not number}
    advice = "ask what cannot be read with --again, or fix the judge"
    _finish(chosen, replies, chosen.judge, folder, base, shown, as_json, advice)


@bench.command(epilog="Example: burnish bench read geneval.yaml results.jsonl")
def read(
    which: Which,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE | NAME=FILE", help="What the official program left."),
    ],
    base: Base = None,
    out: OutFolder = None,
    as_json: Json = False,
) -> None:
    """Read the replies of an official program, and compare the models in them.

    Of Qwen-Image-Bench the released response file, or what its judge.py writes; of GenEval its
    results.jsonl.
    """
    from burnish import benching
    from burnish.ledger import digest_of

    chosen = _chosen_bench(which)
    given = [(name if sign else None, Path(path if sign else name))
             for name, sign, path in (file.partition("=") for file in files)]  # fmt: skip
    found: dict[str, Replies] = {}
    for name, path in given:
        own = benching.released(chosen, path)
        if name is not None and len(own) > 1:
            raise ConfigError(f"need one model in {path} to call it {name}, got {len(own)}")
        for model, said in own.items():
            if (name or model) in found:
                raise ConfigError(
                    f"need one file a model, got two for {name or model!r}; NAME=FILE"
                )
            found[name or model] = said
    folder = out or Path("bench") / f"{chosen.name}-read"
    judge = {"model": "official program", "file": digest_of([path for _, path in given])}
    advice = "take the result of a complete run of the official program"
    _finish(chosen, found, judge, folder, _base(base, list(found)), {}, as_json, advice)


def _kinds() -> dict[str, type["BenchConfig"]]:
    """The settings of every bench, by its name."""
    from burnish.bench.base import BenchConfig
    from burnish.config import shelf

    return {one.__module__.rpartition(".")[2]: one for one in shelf("burnish.bench", BenchConfig)}


def _chosen_bench(which: str) -> "ChosenBench":
    """The bench that the command line names."""
    from burnish.benching import BenchChoice, ChosenBench

    if which.lower().endswith((".yaml", ".yml")):
        settings: Any = read_yaml(which)
    elif which.lstrip().startswith("{"):
        settings = parse_yaml(which, where="BENCH")
    else:
        settings = {"kind": which}
    kinds = _kinds()
    if (kind := str(settings.get("kind"))) in kinds:
        fields = kinds[kind].model_fields
        needed = [name for name in fields if fields[name].is_required()]
        if missing := [name for name in needed if name not in settings]:
            example = ", ".join([f"kind: {kind}", *(f"{name}: ..." for name in needed)])
            raise ConfigError(
                f"BENCH: {missing[0]}: need a value, got none; give '{{{example}}}' or a YAML file"
            )
    return ChosenBench.of(parse(BenchChoice, {"bench": settings}, where="BENCH").bench)


def _models(places: list[str], chosen: "ChosenBench") -> dict[str, Path]:
    """What the command line names: where each model or folder of pictures is, by name."""
    from burnish.run_config import BASE

    tasks = {item.prompt.task for item in chosen.items}

    def able(config: "RunConfig", folder: Path) -> dict[str, Path]:
        every = (BASE, *config.policies())
        return {name: folder / name for name in every if tasks <= set(config.tasks(name))}

    found = named(places, able)
    if not found:
        raise ConfigError(
            f"need models that do {' and '.join(sorted(tasks))}, got none in {', '.join(places)}; "
            "name others, or a bench of what they do"
        )
    return found


def _source(chosen: "ChosenBench", place: Path) -> "Path | tuple[Path, Deployment]":
    """A folder of pictures that is complete, or a pipeline and how it draws."""
    from burnish import benching
    from burnish.exporting import deployed_model

    if place.is_dir() and not benching.is_model(place):
        benching.check_pictures(chosen, place)
        return place
    return deployed_model(str(place))


def _pictures(
    chosen: "ChosenBench",
    name: str,
    source: "Path | tuple[Path, Deployment]",
    folder: Path,
    rt: "Runtime",
    seed: int | None,
) -> Path:
    """The folder of a model's pictures, which are drawn where they are not there."""
    from burnish import benching
    from burnish.policy_config import load_policy
    from burnish.precision import choose_dtype

    if isinstance(source, Path):
        return source
    model, deployed = source
    rt = replace(rt, dtype=choose_dtype(deployed.dtype, rt.device))
    own = deployed.seed if seed is None else seed
    sizes = deployed.policy.buckets.names
    drawing = benching.Drawing(deployed.guidance, deployed.num_steps, own, str(rt.dtype), sizes)
    facts = benching.model_facts(model, drawing)
    pictures = folder / "pictures" / name
    if not benching.are_drawn(chosen, pictures, facts):
        policy = load_policy(deployed.policy.drawing(rt.dtype), model, rt)
        benching.draw_pictures(
            chosen, policy, rt, pictures, drawing, facts=facts, label=f"{name} ({deployed})"
        )
    return pictures


def _base(given: str | None, names: Sequence[str]) -> str:
    """The model that the others are compared with."""
    if given is None:
        return names[0]
    if given not in names:
        near = nearest(given, names) or names[0]
        raise ConfigError(f"--base: need one of the models, got {given!r}; did you mean {near!r}?")
    return given


def _known_spread(folder: Path, chosen: "ChosenBench") -> float | None:
    """How much prompts differ in the newest result of this bench there."""
    try:
        found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        spread, key = found["spread"], found["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return spread if isinstance(spread, float) and key == chosen.key(chosen.judge) else None


def _finish(
    chosen: "ChosenBench",
    replies: "Mapping[str, Replies]",
    judge: Mapping[str, Any],
    folder: Path,
    base: str,
    pictures: Mapping[str, Mapping[str, Path]],
    as_json: bool,
    advice: str,
) -> None:
    """Write and show a result; one that is invalid ends the command with an error."""
    from rich.console import Console

    from burnish import benching
    from burnish.pages.bench import heading, tree_table, why_invalid, write_bench_page
    from burnish.tracking import write_json

    found = benching.result(chosen, replies, base=base, judge=judge)
    write_json(folder / "bench.json", found)
    command = shlex.join(["burnish", *sys.argv[1:]])
    page = write_bench_page(found, folder / "bench.html", command, pictures, chosen.sources)
    print(heading(found))
    Console(width=None if sys.stdout.isatty() else 120).print(tree_table(found))
    print(f"Page: {page}")
    if as_json:
        print(json.dumps({"page": str(page), **found}))
    invalid = [name for name, own in found["models"].items() if not own["is_valid"]]
    if invalid:
        raise ConfigError(
            f"need a verdict on every question, got an invalid result for {invalid[0]}: "
            f"{why_invalid(found, invalid[0])}; {advice}"
        )
