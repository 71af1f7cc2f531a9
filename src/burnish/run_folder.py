"""The folder of a run: where each of its jobs leaves its result, and what its stages have cost.

curation/<stage>/     every prompt as the stage's start draws it, and the prompts that are kept
stages/<stage>/       run folder of the stage, its pipeline in model/; that of a merge, too
evaluation/<policy>/  scores.jsonl and pictures/
benches/<policy>/     pictures and replies of every bench that it took
arena/<task>/         battles.jsonl
summary.json          the table of the report
"""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from burnish.algorithms.distill import DistillConfig, TeacherConfig
from burnish.config import located
from burnish.curation import num_drawn
from burnish.evaluation import Row
from burnish.run_config import BASE, BASES, STAGE, RunConfig, teachers_of
from burnish.stability import norms, runaway
from burnish.tracking import read_rows, write_atomic, writing
from burnish.training import StageConfig, is_unscored

BATTLES = "battles.jsonl"
DONE = "DONE"
"""The file that says that a job's result is whole."""
_FOLDERS = {
    "curate": "curation",
    "train": "stages",
    "merge": "stages",
    "measure": "evaluation",
    "bench": "benches",
    "arena": "arena",
}
PARTS = ("rollout", "credit", "update")
"""Parts of a training step that are timed."""


def is_complete(folder: Path, job: str) -> bool:
    """Whether a job has left its result."""
    return (job_folder(folder, job) / DONE).is_file()


def mark_complete(folder: Path, job: str) -> None:
    """Say that the result of a job is whole: last, as all else must be there before."""
    write_atomic(job_folder(folder, job) / DONE, "")


def mark_incomplete(folder: Path, job: str) -> None:
    """Take that back; what the job has left stays."""
    marker = job_folder(folder, job) / DONE
    with writing(marker):
        marker.unlink(missing_ok=True)


def drop_result(folder: Path, job: str) -> None:
    """Remove what a job has left."""
    # First the marker: a kill in between must not leave a complete job without its files.
    mark_incomplete(folder, job)
    place = job_folder(folder, job)
    with writing(place), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place)


def job_folder(folder: Path, job: str) -> Path:
    """Where a job leaves its result."""
    kind, name = job.split("/", 1)
    return folder / _FOLDERS[kind] / name


def model_folder(folder: Path, path: str) -> Path:
    """Where the pipeline of a path is: a stage's result, an embedded model, or a plain folder."""
    if path.startswith(STAGE):
        return folder / "stages" / path.removeprefix(STAGE) / "model"
    return located(path)


def bench_places(folder: Path, policy: str, bench: str) -> tuple[Path, Path]:
    """Where a policy's pictures of a bench are, and the replies about them."""
    place = job_folder(folder, f"bench/{policy}") / bench
    return place / "pictures", place


def contestants(config: RunConfig, folder: Path, task: str) -> dict[str, Path]:
    """The folder of pictures of everybody who can do a task."""
    return {name: folder / "evaluation" / name / "pictures" for name in config.able(task)}


def with_folders(config: RunConfig, stage: StageConfig, folder: Path) -> StageConfig:
    """The stage with `stage:` paths resolved into a run folder, teachers as they are deployed."""
    if not isinstance(stage.algorithm, DistillConfig):
        return stage
    teachers = {
        label: config.deployed_teacher(teacher).model_copy(
            update=_teacher_folders(config, stage, folder, teacher)
        )
        for label, teacher in stage.algorithm.teachers.items()
    }
    algorithm = stage.algorithm.model_copy(update={"teachers": teachers})
    return stage.model_copy(update={"algorithm": algorithm})


def _teacher_folders(
    config: RunConfig, stage: StageConfig, folder: Path, teacher: TeacherConfig
) -> dict[str, str]:
    """Where a teacher is; one that is a LoRA on what a student's LoRA stands beside is named as
    that, so that it can borrow those weights."""
    name = teacher.path.removeprefix(STAGE)
    own = config.stages.get(name) if teacher.path.startswith(STAGE) else None
    is_alike = own is not None and own.start == stage.start and None not in (own.lora, stage.lora)
    if not is_alike or teacher.lora is not None:
        return {"path": str(model_folder(folder, teacher.path))}
    lora = job_folder(folder, f"train/{name}") / "lora"
    return {"path": str(start_folder(config, stage, folder)), "lora": str(lora)}


def start_folder(config: RunConfig, stage: StageConfig, folder: Path) -> Path:
    """Of the model that a stage starts from."""
    path = config.policy.path if stage.start == BASE else STAGE + stage.start
    return model_folder(folder, path)


def may_borrow(config: RunConfig, stage: StageConfig, folder: Path) -> bool:
    """Whether frozen policies of a stage, given with its folders, need no transformer of their own:
    it trains a LoRA, and its teachers are LoRAs on what that stands beside."""
    if stage.lora is None or config.runtime.sharding != "none":
        return False
    start = str(start_folder(config, stage, folder))
    return all(teacher.lora and teacher.path == start for teacher in teachers_of(stage).values())


def spent(config: RunConfig, folder: Path, stage: str) -> dict[str, Any]:
    """Steps, pictures drawn, network evaluations, and minutes of one stage of the run in a folder.

    `curated` are the pictures that chose its prompts; stages that share a profile all needed it.
    `unscored` are steps that taught nothing because a reward failed; `runaway` tells where its
    updates began to run away, if they did.
    """
    place = folder / "stages" / stage
    steps, times = read_rows(place / "metrics.jsonl"), read_rows(place / "timings.jsonl")
    drawn = [row["data/images"] for row in steps if row.get("data/images") is not None]
    asked = [row["data/evaluations"] for row in steps if row.get("data/evaluations") is not None]
    profile = config.profile_of(stage)
    minutes = {p: sum(row.get(f"time/{p}") or 0.0 for row in times) / 60 for p in PARTS}
    return {
        "steps": len(steps),
        "unscored": sum(map(is_unscored, steps)),
        "runaway": str(found) if (found := runaway(norms(steps))) else None,
        "images": sum(drawn) if drawn else None,
        "evaluations": sum(asked) if asked else None,
        "curated": num_drawn(job_folder(folder, f"curate/{profile}")) if profile else 0,
        "minutes": {p: minutes[p] if times else None for p in PARTS}
        | {"total": sum(minutes.values()) if times else None},
    }


def all_scores(config: RunConfig, folder: Path) -> list[Row]:
    """The rows of every policy measured so far."""
    names = (*BASES, *config.policies())
    files = [folder / "evaluation" / name / "scores.jsonl" for name in names]
    return [row for file in files if file.is_file() for row in read_rows(file)]
