"""Commands of the arena: votes on pictures of several models, and ratings from votes."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from burnish.cli.options import Again, Json
from burnish.cli.places import named
from burnish.cli.program import app
from burnish.config import ConfigError, located, parse, parse_yaml

if TYPE_CHECKING:
    from burnish.arena.battles import Battle
    from burnish.arena.contest import Contest

arena = typer.Typer(help="Battles of pictures and ratings from votes.", rich_markup_mode=None)
app.add_typer(arena, name="arena")

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN | NAME=FOLDER",
        help="Run folders, whose policies meet, or folders of pictures named by prompt ids.",
    ),
]

TaskOption = Annotated[str, typer.Option("--task", help="t2i or edit: each is its own arena.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Set of prompts of the pictures; that of the first run, or else the embedded one, if "
        "left out.",
    ),
]
PerPrompt = Annotated[
    int | None,
    typer.Option("--per-prompt", min=1, help="Meetings of a prompt; all if left out."),
]
Battles = Annotated[Path, typer.Option("--out", help="JSONL file to write.", metavar="FILE")]
BATTLES = Path("battles.jsonl")


@arena.command(epilog="Example: burnish arena rate battles.jsonl --json")
def rate(
    battles: Annotated[Path, typer.Argument(metavar="BATTLES", help="JSONL file of votes.")],
    anchor: Annotated[
        str | None, typer.Option(help="Model at 1000 points; base, or the first, if left out.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=200, help="Of prompts, for intervals.")] = 2000,
    out: Annotated[
        Path | None, typer.Option(help="HTML page to write; beside BATTLES if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rate models from any file of votes: Elo with 95 % intervals over prompts.

    A line of the file: {"battle", "prompt", "category", "a", "b", "winner", "voter"}; winner is a,
    b, tie or both_bad, and a stood on the left.
    """
    from rich.console import Console

    from burnish.arena.battles import read_battles
    from burnish.arena.board import rate as rated
    from burnish.pages.arena import leaderboard, write_arena_page

    target = out or battles.with_suffix(".html")
    if target.resolve() == battles.resolve():
        raise ConfigError(f"need a page beside the votes, got {target} for both; change --out")
    found = rated(read_battles(battles), anchor=anchor, resamples=resamples)
    page = write_arena_page(found, target, shlex.join(["burnish", *sys.argv[1:]]))
    Console(width=None if sys.stdout.isatty() else 120).print(leaderboard(found))
    print(f"Page: {page}")
    if as_json:
        print(json.dumps({"page": str(page), **found}))


@arena.command(epilog="Example: burnish arena vote runs/miniature --task t2i --out battles.jsonl")
def vote(
    places: Places,
    judge: Annotated[
        str, typer.Option(help="Reward that votes, as in a recipe.", metavar="YAML")
    ] = "{kind: oracle}",
    raters: Annotated[
        str,
        typer.Option(help="The crowd: count, noise, margin, bad, seed.", metavar="YAML"),
    ] = "{}",
    task: TaskOption = "t2i",
    prompts: Prompts = None,
    per_prompt: PerPrompt = None,
    out: Battles = BATTLES,
) -> None:
    """Let a reward vote on pictures of several models, as a crowd of simulated raters.

    The voters are named after the reward, so that nobody takes them for people. Rate the votes
    with `burnish arena rate`.
    """
    from burnish.arena.raters import CrowdConfig, scores
    from burnish.arena.raters import vote as voted

    _check_new(out)
    settings = {
        "judge": parse_yaml(judge, where="--judge"),
        "raters": parse_yaml(raters, where="--raters"),
    }
    crowd = parse(CrowdConfig, settings)
    contest = _contest(places, prompts, task)
    print(_power(contest))
    seen = scores(contest, crowd.judge.build())
    kind = crowd.judge.kind
    _write(out, contest, voted(contest, seen, crowd.raters, crowd=kind, per_prompt=per_prompt))


@arena.command(
    epilog="Example: burnish arena judge runs/miniature --judge '{url: http://127.0.0.1:8000, "
    "model: Qwen/Qwen3-VL-32B-Instruct}'"
)
def judge(
    places: Places,
    judge: Annotated[
        str, typer.Option(help="Served judge: url, model, thinking, ...", metavar="YAML")
    ],
    task: TaskOption = "t2i",
    prompts: Prompts = None,
    per_prompt: PerPrompt = None,
    out: Battles = BATTLES,
    again: Again = False,
) -> None:
    """Let a judge in words vote, which sees both pictures of a pair, in both orders.

    The judge is behind an OpenAI-compatible server. Its replies are kept beside --out: the same
    command goes on where it stopped.
    """
    from burnish import runtime
    from burnish.arena.duels import DuelConfig, duel

    _check_new(out)
    served = parse(DuelConfig, parse_yaml(judge, where="--judge"), where="--judge").build()
    contest = _contest(places, prompts, task)
    print(_power(contest))
    replies = out.with_name(f"{out.name}.replies")
    found = duel(contest, served, replies, runtime.start(), per_prompt=per_prompt, again=again)
    _write(out, contest, found.battles)
    print(f"The judge chose alike in both orders on {found.agreement:.0%} of the pairs")


@arena.command(epilog="Example: burnish arena serve runs/miniature --task t2i --votes votes.sqlite")
def serve(
    places: Places,
    votes: Annotated[Path, typer.Option(help="SQLite file of the votes; made if missing.")] = Path(
        "votes.sqlite"
    ),
    task: TaskOption = "t2i",
    prompts: Prompts = None,
    gold: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.5,
            help="Share of attention checks: a picture against a degraded copy of itself.",
        ),
    ] = 0.05,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; all but loopback can be reached from outside."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.")] = 8200,
    public_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that voters reach it by; once for each. Others are refused."),
    ] = None,
) -> None:
    """Serve the voting page: two anonymous pictures, keys 1 to 4, undo.

    Stop it with Ctrl-C; the same command goes on with the same votes. `burnish arena votes`
    writes them as battles. Put a proxy with encryption in front before you leave loopback.
    """
    import uvicorn

    from burnish.arena.ballots import Ballots
    from burnish.arena.server import app as served

    contest = _contest(places, prompts, task)
    print(_power(contest))
    ballots = Ballots(votes, contest, gold=gold)
    print(f"Vote at http://{host}:{port}; votes go to {votes}", flush=True)
    # No log of requests: it would join voters to battles. No name of the program in headers.
    uvicorn.run(
        served(contest, ballots, names=(host, *(public_host or ()))), host=host, port=port,
        log_level="warning", access_log=False, server_header=False,
    )  # fmt: skip


@arena.command(epilog="Example: burnish arena votes votes.sqlite --out battles.jsonl")
def votes(
    database: Annotated[Path, typer.Argument(metavar="VOTES", help="SQLite file of the votes.")],
    out: Battles = BATTLES,
) -> None:
    """Write the votes of a voting page as battles, and tell how voters did on gold pairs."""
    from burnish.arena.ballots import read_votes
    from burnish.arena.battles import write_battles

    _check_new(out)
    found, gold = read_votes(database)
    write_battles(out, found)
    print(f"{len(found)} votes: {out}")
    for voter, (right, asked) in sorted(gold.items()):
        print(f"{voter}: {right} of {asked} gold pairs")


def _check_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"need a file that does not exist yet, got {out}; change --out")


def _write(out: Path, contest: "Contest", battles: "Sequence[Battle]") -> None:
    from burnish.arena.battles import write_battles

    write_battles(out, battles)
    names = ", ".join(sorted(contest.pictures))
    print(f"{len(battles)} votes on {len(contest.prompts)} prompts between {names}: {out}")


def _power(contest: "Contest") -> str:
    """What so many prompts can show, told before anybody votes."""
    from burnish import ratings

    count = len(contest.prompts)
    least = ratings.detectable(count)
    return (
        f"{count} prompts: two models must differ by {least:.0f} Elo to be told apart four times "
        "in five if all votes on a prompt agree, by less if they do not"
    )


def _contest(places: list[str], prompts: str | None, task: str) -> "Contest":
    """The contestants that the command line names."""
    from burnish.arena.contest import gather
    from burnish.evaluation import EvaluationConfig
    from burnish.prompts import read_prompts
    from burnish.run_config import RunConfig
    from burnish.run_folder import contestants

    if task not in ("t2i", "edit"):
        raise ConfigError(f"need the task t2i or edit, got {task!r}; change --task")
    sets = [prompts] if prompts else []

    def of_run(config: RunConfig, folder: Path) -> Mapping[str, Path]:
        sets.append(config.evaluation.prompts)
        return contestants(config, folder, task)

    folders = named(places, of_run)
    path = [*sets, EvaluationConfig().prompts][0]
    return gather(folders, read_prompts(located(path)), tasks=(task,))
