"""Commands about reward models: train a judge from annotations, examine one, serve one."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.options import Json, Overrides
from burnish.cli.program import app
from burnish.config import ConfigError, parse, read_yaml

TOKEN = "BURNISH_TOKEN"
"""The variable that holds a server's token: an argument could be read by everybody."""

reward = typer.Typer(help="Reward models: train, examine, serve.", rich_markup_mode=None)
app.add_typer(reward, name="reward")


@reward.command(
    epilog="Example: burnish reward train path=MODEL annotations='[{path: pictures.jsonl}]' "
    "--out runs/judge"
)
def train(
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings.", metavar="FILE")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Run folder.", metavar="DIR")] = Path(
        "runs/judge"
    ),
    as_json: Json = False,
) -> None:
    """Train a judge from annotations, and measure it on prompts it never saw.

    PATH is a Qwen-VL model or a judge on disk, ANNOTATIONS a list of files; other settings are
    loss, lora_rank, learning_rate, batch_size, steps or epochs, held_out: docs/judges.md has more,
    and a key that does not exist names the nearest. Start the same command again to resume. The
    judge is in DIR/judge.
    """
    from burnish.reward_training import RewardTrainingConfig, train_judge

    given = {} if config is None else read_yaml(config)
    settings = parse(RewardTrainingConfig, given, overrides or (), where=str(config or ""))
    rt = settings.runtime.build()
    folder = train_judge(settings, out, rt)
    rt.close()
    found = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    for dimension, values in found.get("held_out", {}).items():
        print(f"{dimension}: {_line(values)}")
    print(f"Judge: {folder}")
    if as_json:
        print(json.dumps({"judge": str(folder), "held_out": found.get("held_out", {})}))


def _line(values: dict[str, Any]) -> str:
    shown = ("count", "spearman", "pair_accuracy", "absolute_error", "failed")
    parts = [(name, values[name]) for name in shown if values.get(name) is not None]
    return ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in parts)


@reward.command(
    epilog="Example: burnish reward report runs/judge/judge annotations='[{path: pictures.jsonl}]'"
)
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a judge.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the page goes.", metavar="DIR"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Examine a judge: may a policy be trained against it?

    Reads annotated pictures of prompts that its training held out, compares its scores with raters'
    over all pictures and inside each prompt, asks again, tries harmless changes and attacks, and
    writes one page with the worst disagreements. With `held_out=false` all prompts of ANNOTATIONS
    are read, which is right for files that the judge was not trained on.
    """
    from burnish.judges.trust import TrustConfig, examine, unseen
    from burnish.pages.trust import write_trust_report
    from burnish.rewards.vlm import Judge, judge_facts
    from burnish.runtime import choose_device
    from burnish.tracking import writing

    settings = parse(TrustConfig, {}, overrides or ())
    facts = judge_facts(folder)
    target = folder.resolve().parent / "report" if out is None else out
    # A place that cannot be written is found before the work.
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    annotations = unseen(settings, facts.get("split"))
    judge = Judge.load(folder, choose_device("auto"))
    found = examine(judge, annotations, settings)
    name = folder.resolve().name
    page = write_trust_report(target, name, judge, found, worst=settings.disagreements)
    numbers = {examination.dimension: examination.to_json() for examination in found}
    for dimension, values in numbers.items():
        print(f"{dimension}: {_intervals(values)}")
    print(f"Page: {page}")
    if as_json:
        print(json.dumps({"judge": str(folder), "page": str(page), "dimensions": numbers}))


def _intervals(values: dict[str, Any]) -> str:
    shown = ("spearman", "within_prompt", "pair_accuracy", "calibration_error", "repeat_noise")
    parts = [f"{values['count']} pictures"]
    for name in shown:
        found = values.get(name)
        if found is not None and found["value"] is not None:
            is_known = found["low"] is not None
            ends = f" [{found['low']:.2f}, {found['high']:.2f}]" if is_known else ""
            parts.append(f"{name.replace('_', ' ')} {found['value']:.2f}{ends}")
    return ", ".join(parts)


@reward.command(
    epilog="Example: burnish reward reason runs/judge/judge annotations='[{path: pictures.jsonl}]'"
    " --out own.jsonl"
)
def reason(
    folder: Annotated[Path, typer.Argument(help="The folder of a judge.")],
    overrides: Overrides = None,
    out: Annotated[
        Path,
        typer.Option("--out", help="File of annotations, .jsonl or .parquet.", metavar="FILE"),
    ] = Path("own.jsonl"),
    as_json: Json = False,
) -> None:
    """Have a judge write its own reasoning for the pictures it was trained on.

    A second training on FILE beside the raters' annotations teaches the judge what score to give
    after its own words, which are not as good as raters': `burnish reward train path=JUDGE
    annotations='[{path: pictures.jsonl}, {path: FILE}]'`. Started by torchrun, the processes share
    the pictures; start the same command again to resume.
    """
    from burnish.annotations.base import check_writable, write_annotations
    from burnish.judges.rationales import RationalesConfig, seen, write_rationales
    from burnish.ledger import digest_of, pin
    from burnish.rewards.vlm import Judge, judge_facts
    from burnish.tracking import Run

    rows = out.with_name(f"{out.stem}-rows")
    check_writable(out)
    if out.exists() and not (rows / "run.json").is_file():
        raise ConfigError(
            f"need a new file for --out, got {out}, which this command did not write; choose "
            "another name"
        )
    settings = parse(RationalesConfig, {"judge": str(folder)}, overrides or ())
    known = judge_facts(folder).get("split")
    chosen = seen(settings, {path.stem for path in folder.glob("rubrics/*.md")}, known)
    rt = settings.runtime.build()
    judge = Judge.load(folder, rt.device)
    if rt.is_main:
        Run.create(rows, settings, environment=rt.describe())
        files = [*folder.glob("*.safetensors"), *folder.glob("rubrics/*.md")]
        pin(rows, "judge", {"the judge's weights and rubrics": digest_of(files)})
    rt.barrier()
    found = write_rationales(judge, chosen, rows, rt, batch_size=settings.batch_size)
    if rt.is_main:
        if not found:
            raise ConfigError(
                f"need answers with a score, got none about {len(chosen)} pictures; the judge "
                "does not answer as it was taught, see `burnish reward report`"
            )
        write_annotations(out, found)
        print(f"{len(found)} of {len(chosen)} pictures: {out}")
        if as_json:
            print(json.dumps({"path": str(out), "asked": len(chosen), "written": len(found)}))
    rt.close()


@reward.command(epilog="Example: burnish reward serve runs/judge/judge --port 8100")
def serve(
    folder: Annotated[Path, typer.Argument(help="The folder of a judge.")],
    name: Annotated[
        str | None, typer.Option(help="The model's name; the folder's if left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    is_open: Annotated[
        bool, typer.Option("--open", help="Admit everybody on this machine, without a token.")
    ] = False,
    batch: Annotated[
        int, typer.Option(help="Questions that are written together; 1 repeats exactly.", min=1)
    ] = 8,
    waiting: Annotated[
        int, typer.Option(help="Questions that may wait; others are told to come back.", min=1)
    ] = 64,
) -> None:
    """Serve a judge over HTTP, for the reward `remote`.

    Askers must send the token in the variable BURNISH_TOKEN. Stop with Ctrl-C.
    """
    from burnish.rewards.vlm import Judge, judge_facts

    # Before what needs the extra: without a judge nobody needs it.
    judge_facts(folder)
    from burnish.runtime import choose_device
    from burnish.serving import server
    from burnish.serving.translation import Limits

    token = os.environ.get(TOKEN)
    server.check_token(token, host, is_open=is_open)
    judge = Judge.load(folder, choose_device("auto"))
    shown = name or folder.resolve().name
    print(f"serving {shown} on http://{host}:{port}", flush=True)
    server.serve(
        judge,
        name=shown,
        token=token,
        host=host,
        port=port,
        is_open=is_open,
        limits=Limits(batch=batch, waiting=waiting),
    )
