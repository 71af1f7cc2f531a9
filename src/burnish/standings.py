"""What the benches and arenas of a run say: their results, and a page of each beside the report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.arena.battles import read_battles
from burnish.arena.board import rate
from burnish.benching import ChosenBench, Sources, read_replies, result
from burnish.config import ConfigError
from burnish.pages.arena import write_arena_page
from burnish.pages.bench import write_bench_page
from burnish.run_config import BASE, RunConfig
from burnish.run_folder import BATTLES, bench_places, is_complete, job_folder
from burnish.tracking import write_json

Pictures = Mapping[str, Mapping[str, Path]]
"""File of every item's first picture, by model and item."""


def bench_results(
    config: RunConfig, folder: Path, command: str
) -> dict[str, tuple[dict[str, Any], Pictures, Sources]]:
    """The result of every bench that somebody has taken, by its name.

    Leaves `benches/NAME.json` and `.html`, which lead to the pictures behind the numbers.
    """
    found = {}
    for name, settings in config.benches.items():
        able = [p for p in (BASE, *config.policies()) if name in config.benches_of(p)]
        done = [policy for policy in able if is_complete(folder, f"bench/{policy}")]
        if BASE not in done:
            continue
        try:
            chosen = ChosenBench.of(settings)
        except ConfigError:
            # A report is also written where the files of the bench are not.
            kept = folder / "benches" / f"{name}.json"
            if kept.is_file():
                found[name] = (json.loads(kept.read_text(encoding="utf-8")), {}, lambda _: None)
                continue
            raise
        places = {policy: bench_places(folder, policy, name) for policy in done}
        replies = {
            policy: read_replies(chosen, pictures, place / chosen.replies_folder)
            for policy, (pictures, place) in places.items()
        }
        shown = {
            policy: {item.id: pictures / path for item, k, path in chosen.places() if k == 0}
            for policy, (pictures, _) in places.items()
        }
        own = result(chosen, replies, base=BASE, judge=chosen.judge)
        write_json(folder / "benches" / f"{name}.json", own)
        write_bench_page(own, folder / "benches" / f"{name}.html", command, shown, chosen.sources)
        found[name] = (own, shown, chosen.sources)
    return found


def arena_results(config: RunConfig, folder: Path, command: str) -> dict[str, dict[str, Any]]:
    """The leaderboard of every task whose arena has closed.

    Leaves `arena/TASK/board.json` and `.html`.
    """
    found = {}
    for task in config.tasks(BASE):
        job = f"arena/{task}"
        if config.arena is None or not is_complete(folder, job):
            continue
        place = job_folder(folder, job)
        own = rate(read_battles(place / BATTLES))
        write_json(place / "board.json", own)
        write_arena_page(own, place / "board.html", command)
        found[task] = own
    return found
