"""Commands about reward models: train a judge from annotations, serve one over HTTP."""

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

reward = typer.Typer(help="Reward models: train them, serve them.", rich_markup_mode=None)
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

    PATH is a Qwen-VL model on disk, ANNOTATIONS a list of files. Start the same command again to
    resume. The judge is in DIR/judge.
    """
    from burnish.reward_training import RewardTrainingConfig, train_judge

    given = {} if config is None else read_yaml(config)
    settings = parse(RewardTrainingConfig, given, overrides or (), where=str(config or ""))
    rt = settings.runtime.build()
    try:
        folder = train_judge(settings, out, rt)
    finally:
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
) -> None:
    """Serve a judge over HTTP, for the reward `remote`.

    Askers must send the token in the variable BURNISH_TOKEN. Stop with Ctrl-C.
    """
    if not (folder / "judge.json").is_file():
        raise ConfigError(
            f"need the folder of a judge, with its judge.json, got {folder}; train one with "
            "`burnish reward train`"
        )
    from burnish import serving
    from burnish.rewards.vlm import Judge
    from burnish.runtime import choose_device

    token = os.environ.get(TOKEN)
    serving.check_token(token, host, is_open=is_open)
    judge = Judge.load(folder, choose_device("auto"))
    shown = name or folder.resolve().name
    print(f"serving {shown} on http://{host}:{port}", flush=True)
    serving.serve(judge, name=shown, token=token, host=host, port=port, is_open=is_open)
