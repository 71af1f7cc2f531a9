"""Take up a run whose settings have changed, without doing again what they do not touch.

A run folder belongs to one configuration, because results of two must never be mixed. Some settings
decide no result that is there: what is said of the recipe, and which benches are taken and who
votes in the arena, which only read what was trained. A finished run may be given those later, or
others. How many processes train a stage decides none, either, so that a run may go on with another
number; nor who judges, before anything is measured. A study's arms do not know each other, so an
arm that has changed is run again alone; with the base, where all of them do other tasks then. A
profile of prompts that several of them share stays as long as one draws the same.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from burnish.curation import KEPT
from burnish.run_config import BASE, FREE_RUNTIME, RunConfig, drawn
from burnish.run_folder import (
    drop_result,
    is_complete,
    job_folder,
    mark_complete,
    mark_incomplete,
)
from burnish.summary import read_run
from burnish.tracking import Run, lock

_FREE = ("study", "evidence", "benches", "arena")
"""Settings that a run may be given at any time."""
_JUDGES = ("judge", "edit_judge")
"""Settings that a run may be given until something is measured."""


def take_up(
    config: RunConfig,
    folder: Path,
    *,
    arms: bool = False,
    look: Callable[[Collection[str]], None] | None = None,
) -> list[str]:
    """Bind the folder to settings that differ from its own only where they may.

    A run that differs in more is left as it is, for `Run.create` to refuse.

    Args:
        config: of the run now.
        folder: of the run, which need not exist.
        arms: whether stages may differ, too; results of those, and all that was made of them, are
            dropped.
        look: called with the jobs whose results will be dropped, before any is; what it raises
            leaves them all.

    Returns:
        The stages whose results were dropped.

    Raises:
        RunError: another process is in the folder.
    """
    if not (folder / "run.json").is_file():
        return []
    before = read_run(folder)
    loose = [*_FREE, *(["stages"] if arms else [])]
    if not any(folder.glob("evaluation/*/DONE")):
        loose += _JUDGES
    same = {name: getattr(config, name) for name in loose}
    own = {name: getattr(config.runtime, name) for name in FREE_RUNTIME}
    same["runtime"] = before.runtime.model_copy(update=own)
    if before == config or before.model_copy(update=same) != config:
        return []
    # Before anything is touched: its run may be going on.
    lock(folder)
    changed = [name for name, arm in before.stages.items() if config.stages.get(name) != arm]
    stale = _stale(before, config, changed)
    if stale and look is not None:
        look(stale)
    _hand_on(config, folder, _profiles(before, config))
    for job in stale:
        drop_result(folder, job)
    for job in {*before.jobs(), *config.jobs()}:
        kind, name = job.split("/", 1)
        # Pictures and replies stay: whatever has not changed in a bench is not asked again.
        is_stale = (kind == "bench" and before.benches_of(name) != config.benches_of(name)) or (
            kind == "arena" and before.arena != config.arena
        )
        if is_stale:
            mark_incomplete(folder, job)
    Run.open(folder).rebind(config)
    return changed


def with_later(config: RunConfig, folder: Path) -> RunConfig:
    """The settings of a run with what its folder was given since it was begun."""
    if not (folder / "run.json").is_file():
        return config
    before = read_run(folder)
    return config.model_copy(update={name: getattr(before, name) for name in _FREE})


def _stale(before: RunConfig, config: RunConfig, stages: list[str]) -> set[str]:
    """The jobs of stages, that of a base which is measured on other tasks then, and every job that
    waits for one of those."""
    stale = {f"{kind}/{name}" for name in stages for kind in ("train", "curate", "measure")}
    profiles = {f"curate/{name}" for name in config.stages if config.profile_of(name) == name}
    stale = (stale | profiles) - {f"curate/{name}" for name in _profiles(before, config)}
    if set(before.tasks(BASE)) != set(config.tasks(BASE)):
        stale.add(f"measure/{BASE}")
    for job, waits in config.jobs().items():
        if stale & {job, *waits}:
            # What was begun with the old results must not be resumed, either.
            stale.add(job)
    return stale


def _profiles(before: RunConfig, config: RunConfig) -> dict[str, str]:
    """The profiles of prompts that stay what they are: which stage has each then, and which had."""
    had = {name: own for name, own in before.stages.items() if before.profile_of(name) == name}
    found: dict[str, str] = {}
    for name, stage in config.stages.items():
        for other, own in had.items() if config.profile_of(name) == name else ():
            # A folder has one profile: two stages do not change theirs for each other's.
            if drawn(own) == drawn(stage) and (other == name or name not in had):
                found[name] = other
    return found


def _hand_on(config: RunConfig, folder: Path, profiles: Mapping[str, str]) -> None:
    """Give stages the profiles that others had; what each keeps of it stays its own."""
    for name, other in profiles.items():
        jobs = [f"curate/{n}" for n in (other, name)]
        source, target = (job_folder(folder, job) for job in jobs)
        if name == other or not (source / "run.json").is_file():
            continue
        target.mkdir(parents=True, exist_ok=True)
        is_done = is_complete(folder, jobs[0])
        mark_incomplete(folder, jobs[0])
        for path in source.glob("[!.]*"):
            if path.name not in ("run.json", *KEPT):
                path.replace(target / path.name)
        Run(target, Run.open(source).facts).rebind(config.curated(name))
        (source / "run.json").unlink()
        if is_done:
            mark_complete(folder, jobs[1])
